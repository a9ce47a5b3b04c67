"""Files → records, with a named reason for every row that is not one.

    Source ─list_files─► [SourceFile] ─plan_tasks─► [[Slice]] ─read_records─► Record | Reject

Parquet, JSON lines and JSON arrays (plain, .gz or .zst) and folders written by `datasets`; one file, a folder, a glob,
a list of these (local or any URI that fsspec knows) or a hub name. What is wrong with the content becomes a Reject;
what is wrong with the request (no such file, no access) is a DataError; a disk or network that fails during a read is
a StorageError, so that a hiccup never looks like a short file.
"""

import codecs
import io
import json
import logging
import os
import posixpath
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from davir_ray.config.sources import DEFAULT_SPLIT, Source
from davir_ray.errors import DataError, StorageError
from davir_ray.run.location import CYCLE, DANGLING, Location, each, file_system
from davir_ray.run.manifest import CONFIG_FILE, CONFIG_HEAD
from davir_ray.run.storage_errors import CONTINUES, STORE_ERRORS, explain

logger = logging.getLogger(__name__)

Layout = Literal["jsonl", "json", "parquet", "arrow"]

_T = TypeVar("_T")

_LAYOUTS: dict[str, Layout] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet"}

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}

_ACCEPTED = ".parquet, .jsonl, .ndjson and .json, the last three also with .gz or .zst"

CORRUPT = (OSError, EOFError, zlib.error, pa.ArrowException)  # Arrow reports damaged content as OSError, too
BUFFER_BYTES = 1 << 18

_MAGIC = re.compile(r"[*?\[]")

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")

_HUB_ROOT = re.compile(r"hf://datasets/[^@]+@[^/]+/")

_REVISION = re.compile(r"(?P<cache>.*/datasets--[^/]+)/snapshots/(?P<revision>[^/]+)/")


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """One file of a source. `relative_path` does not change when the source's root moves; example_id is made of it."""

    source: str
    uri: str
    relative_path: str
    layout: Layout
    num_bytes: int


class Slice(NamedTuple):
    """What a task reads of a file: these row groups of a Parquet file, or (None) all of it."""

    file: SourceFile
    row_groups: range | None = None


CountBytes = Callable[[int], None]


def count_nothing(num_bytes: int) -> None:
    """Nobody wants to know how far reading is."""


class _Stored(io.RawIOBase):
    """An fsspec file whose read errors are told apart from those of the decoders above it, often OSErrors too."""

    def __init__(self, file: Any, uri: str, count: CountBytes) -> None:
        self._file = file
        self._uri = uri
        self._count = count

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._file.read(len(buffer))
        except Exception as error:  # whatever the file system's library raises
            raise StorageError(f"{self._uri}: {explain(error, self._uri)}") from error
        buffer[: len(data)] = data
        self._count(len(data))
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


class _Found(NamedTuple):
    """Files under one root of one file system: path → bytes, the paths as the file system writes them."""

    fs: Any
    root: str
    sizes: dict[str, int]
    is_datasets_folder: bool = False
    has_splits: bool = False


def list_files(source: Source, written: Iterable[Location] = ()) -> list[SourceFile]:
    """The files of a source, sorted by relative path.

    A path is relative to the folder given, to a glob's fixed part, to a file's folder; for a list, to what these have
    in common; for a hub name, to the repository. In folders and globs, names that begin with a dot or an underscore
    are skipped, and so is what lies in the places `written` by the job that reads; with a warning other extensions,
    outputs of other runs, and the JSON files of models. A link is what it points to, under its own path; one that leads
    back to a folder that it lies in is not entered, with a warning. Raises DataError where nothing is found, for a link
    that points to nothing, and where a path is given that lies in a place that is written.
    """
    paths = [source.path] if isinstance(source.path, str) else source.path
    if isinstance(source.path, str) and _looks_like_hub_name(source.path):
        files = _hub_files(source)
    else:
        real = [Location(place.fs, _real(place.fs, place.path)) for place in written]
        found = [_find(path, source.split, real) for path in paths]
        if any(one.fs != found[0].fs for one in found):
            raise DataError(f"source {source.name!r} lists several file systems ({paths}); make one source of each")
        if source.split != DEFAULT_SPLIT and not any(one.has_splits for one in found):
            raise DataError(
                f"split of source {source.name!r} is {source.split!r}, but {source.path} has no splits; leave it out, "
                "or give the files of that split"
            )
        root = found[0].root if len(found) == 1 else posixpath.commonpath([one.root for one in found])
        files = [_source_file(source, one, path, root) for one in found for path in one.sizes]
    for file in files:
        _check_name(file)
    return sorted(set(files), key=lambda file: file.relative_path)


def _find(path: str, split: str, written: list[Location]) -> _Found:
    """The files that one path means: a file, a folder, a folder written by `datasets`, or a glob."""
    absolute = path if "://" in path else os.path.abspath(os.path.expanduser(path))
    try:
        fs, stripped = file_system(absolute)
        fs.invalidate_cache()  # a notebook may have written files since fsspec listed the folder
        is_there = fs.exists(stripped)
        if not (is_there or _MAGIC.search(stripped)):
            if fs.lexists(stripped):
                raise _dangling(stripped)
            raise DataError(f"{path} does not exist; give a file, a folder, a glob or a hub name that does")
        named = stripped if is_there else _fixed_part(stripped)
        if place := _place_of(fs, named, written, partial(_real, fs)):
            raise DataError(f"{path} lies in {place}, which this job writes; choose another --output, or other data")
        if not is_there:
            return _find_glob(fs, stripped, written)
        if fs.isdir(stripped):
            return _find_datasets_folder(fs, stripped, split) or _find_folder(fs, stripped, written)
        if _layout(stripped) is None:
            raise DataError(f"{path} has an extension that is not read; give {_ACCEPTED}")
        return _Found(fs, posixpath.dirname(stripped), {stripped: _size(fs.info(stripped))})
    except DataError:
        raise
    except Exception as error:  # the libraries behind fsspec raise errors of their own for access and credentials
        refused = getattr(error, "filename", None) or path  # perhaps a folder below it
        raise DataError(f"{refused} cannot be listed: {explain(error, path)}") from error


def _dangling(path: str) -> DataError:
    return DataError(
        f"{path} is a link to {os.readlink(path)}, which is not there or may not be read; restore that or remove the "
        "link"
    )


def _find_folder(fs: Any, root: str, written: list[Location]) -> _Found:
    infos = fs.find(root, detail=True)
    return _Found(fs, root, _keep_readable(root, _data_among(fs, root, infos, infos, written)))


def _find_glob(fs: Any, pattern: str, written: list[Location]) -> _Found:
    root = _fixed_part(pattern)
    infos: dict[str, Any] = {}
    for path, info in fs.glob(pattern, detail=True).items():
        infos |= fs.find(path, detail=True) if info["type"] == "directory" else {path: info}
    # A pattern without ** names its folders by their depth, and finds in them what it asks for.
    around = fs.find(root, detail=True) if "**" in pattern else infos
    return _Found(fs, root, _keep_readable(root, _data_among(fs, root, infos, around, written), pattern))


def _fixed_part(pattern: str) -> str:
    """The folder in which a glob's first pattern stands."""
    return posixpath.dirname(_MAGIC.split(pattern)[0])


def _real(fs: Any, path: str) -> str:
    """The path without links, which only this machine's own file system has."""
    return os.path.realpath(path) if isinstance(fs, LocalFileSystem) else path.rstrip("/")


def _place_of(fs: Any, path: str, places: list[Location], real: Callable[[str], str]) -> Location | None:
    """The first of some places without links that a path is, or lies in: by one of its folders, or by where links lead.

    `real` is the path's without links.
    """
    ways = [real(path)]
    while (parent := posixpath.dirname(path)) not in ("", path):
        path = parent
        ways.append(real(path))
    here = [place for place in places if place.fs.protocol == fs.protocol]
    return next((place for place in here if any(f"{way}/".startswith(f"{place.path}/") for way in ways)), None)


def _data_among(
    fs: Any, root: str, infos: dict[str, Any], around: dict[str, Any], written: list[Location]
) -> dict[str, Any]:
    """Of the files that were found those that may be data: not what this job or another run writes, nor a model's JSON.

    The files `around` them say what a folder holds. Raises DataError where the root is a run's, or nothing is left.
    """
    infos, around = _shown(infos, root), _shown(around, root)
    runs, models = _outputs_among(fs, around), _models_among(around)
    if root in runs:
        raise DataError(f"{root} is the output of a run; give a folder in it that holds data, such as {root}/selected")
    real = lru_cache(None)(partial(_real, fs))
    kept, own, others = {}, Counter[str](), Counter[str]()
    for path, info in infos.items():
        folder = posixpath.dirname(path)
        if place := _place_of(fs, path, written, real):
            own[f"files in {place}, which this job writes"] += 1
        elif run := next((run for run in runs if path.startswith(f"{run}/")), None):
            others[f"files in {run}, the output of another run"] += 1
        elif folder in models and _layout(path) == "json":
            others[f"JSON files of the model in {folder}"] += 1
        else:
            kept[path] = info
    counts = ", ".join(f"{count} {what}" for what, count in (others if kept else own + others).items())
    if counts and not kept:
        raise DataError(f"no data files in {root}: there are {counts}; give a path with other files")
    if counts:
        logger.warning("%s: left out %s", root, counts)
    return kept


def _shown(infos: dict[str, Any], root: str) -> dict[str, Any]:
    """Files without a name below the root that begins with a dot or an underscore."""
    names = ((path, _relative(path, root).split("/")) for path in infos)
    return {path: infos[path] for path, parts in names if not any(part[:1] in (".", "_") for part in parts)}


def _models_among(infos: dict[str, Any]) -> set[str]:
    """The folders of models, adapters and tokenizers."""
    inside: dict[str, set[str]] = defaultdict(set)
    for path in infos:
        inside[posixpath.dirname(path)].add(posixpath.basename(path))
    return {
        folder
        for folder, names in inside.items()
        if "tokenizer_config.json" in names
        or (names & {"config.json", "adapter_config.json"} and any(name.endswith(".safetensors") for name in names))
    }


def _outputs_among(fs: Any, infos: dict[str, Any]) -> list[str]:
    """The folders of runs, by the configuration in each."""
    marks = [path for path, info in infos.items() if posixpath.basename(path) == CONFIG_FILE and info["type"] == "file"]
    starts = each(lambda path: fs.cat_file(path, end=len(CONFIG_HEAD) + len(codecs.BOM_UTF8)), marks)
    head = CONFIG_HEAD.strip().encode()
    return [
        posixpath.dirname(path)
        for path, start in zip(marks, starts, strict=True)
        if start.removeprefix(codecs.BOM_UTF8).startswith(head)
    ]


def _find_datasets_folder(fs: Any, root: str, split: str) -> _Found | None:
    """The Arrow files of what `save_to_disk` of a Dataset or a DatasetDict wrote; None if the folder is not such."""
    folder = root
    has_splits = fs.exists(f"{root}/dataset_dict.json")
    if has_splits:
        splits = json.loads(fs.cat_file(f"{root}/dataset_dict.json"))["splits"]
        if split not in splits:
            raise DataError(f"{root} has no split {split!r}; set split to one of {', '.join(splits)}")
        folder = f"{root}/{split}"
    elif not (fs.exists(f"{root}/state.json") and fs.exists(f"{root}/dataset_info.json")):
        return None
    state = json.loads(fs.cat_file(f"{folder}/state.json"))
    paths = [f"{folder}/{entry['filename']}" for entry in state["_data_files"]]
    if absent := [path for path in paths if not fs.exists(path)]:
        if fs.lexists(absent[0]):
            raise _dangling(absent[0])
        raise DataError(f"{absent[0]} does not exist, but {folder}/state.json names it; restore it")
    return _Found(
        fs, root, {path: _size(fs.info(path)) for path in paths}, is_datasets_folder=True, has_splits=has_splits
    )


def _keep_readable(root: str, infos: dict[str, Any], asked: str | None = None) -> dict[str, int]:
    """Path → bytes of the files with an extension that is read; the others are counted in a warning."""
    for path, info in infos.items():
        if info["type"] == DANGLING:
            raise _dangling(path)
        if info["type"] == CYCLE:
            logger.warning("%s is a link to a folder that it lies in, and is not entered", path)
    visible = {path: info for path, info in infos.items() if info["type"] == "file"}
    kept = {path: _size(info) for path, info in visible.items() if _layout(path) is not None}
    skipped = Counter(posixpath.splitext(path)[1] or "no extension" for path in visible if path not in kept)
    counts = ", ".join(f"{count} {extension}" for extension, count in sorted(skipped.items()))
    if not kept:
        raise DataError(
            f"no data files in {asked or root} ({f'found {counts}' if counts else 'it matches nothing'}; names that "
            f"begin with a dot or an underscore are skipped); give {_ACCEPTED}"
        )
    _check_revisions(kept)
    if skipped:
        logger.warning("%s: skipped %d files with other extensions (%s)", asked or root, skipped.total(), counts)
    return kept


def _check_revisions(paths: Iterable[str]) -> None:
    """DataError where the hub's cache of a data set holds several revisions: each row would be read from each."""
    revisions: dict[str, set[str]] = {}
    for match in filter(None, map(_REVISION.search, paths)):
        revisions.setdefault(match["cache"], set()).add(match["revision"])
    for cache, found in revisions.items():
        if len(found) > 1:
            names = ", ".join(sorted(found))
            raise DataError(f"{cache} holds {len(found)} revisions ({names}); give {cache}/snapshots/REVISION")


def _source_file(source: Source, found: _Found, path: str, root: str) -> SourceFile:
    is_local = isinstance(found.fs, LocalFileSystem)
    return SourceFile(
        source=source.name,
        uri=path if is_local else found.fs.unstrip_protocol(path),
        relative_path=_relative(path, root),
        layout="arrow" if found.is_datasets_folder else _layout(path) or "jsonl",
        num_bytes=found.sizes[path],
    )


def _looks_like_hub_name(path: str) -> bool:
    return bool(_HUB_NAME.fullmatch(path)) and _layout(path) is None and not os.path.lexists(path)


def _hub_files(source: Source) -> list[SourceFile]:
    """The files of one split of a hub data set, for the workers to stream; nothing is downloaded here."""
    name = source.path
    try:
        import datasets

        data_files = datasets.load_dataset_builder(name).config.data_files or {}
        uris = {str(split): [str(uri) for uri in files] for split, files in data_files.items()}
        sizes = {uri: _uri_size(uri) for uri in uris.get(source.split, [])}
    except Exception as error:  # a missing library, no network, no such data set, a configuration to choose
        raise DataError(
            f"{name} neither exists here nor loads from the hub ({first_line(error)}); correct the path, or name the "
            f"files as hf://datasets/{name}/…"
        ) from error
    if not sizes:
        splits = ", ".join(uris) or "none"
        raise DataError(f"the hub's {name} has no split {source.split!r}; set split to one of: {splits}")
    files = []
    for uri, num_bytes in sizes.items():
        layout = _layout(uri)
        if layout is None:
            raise DataError(f"the hub's {name} holds {uri}, whose extension is not read; give {_ACCEPTED}")
        # The revision is left out: an unchanged row keeps its example_id when another file of the repository changes.
        files.append(
            SourceFile(
                source=source.name, uri=uri, relative_path=_HUB_ROOT.sub("", uri), layout=layout, num_bytes=num_bytes
            )
        )
    return files


def _uri_size(uri: str) -> int:
    fs, path = file_system(uri)
    return _size(fs.info(path))


def _size(info: dict[str, Any]) -> int:
    return int(info.get("size") or 0)  # None where a web server does not say


def _relative(path: str, root: str) -> str:
    return path.removeprefix(root).lstrip("/")


def _layout(path: str) -> Layout | None:
    stem, extension = posixpath.splitext(path.lower())
    if extension not in COMPRESSIONS:
        return _LAYOUTS.get(extension)
    layout = _LAYOUTS.get(posixpath.splitext(stem)[1])
    return None if layout == "parquet" else layout


def _check_name(file: SourceFile) -> None:
    try:
        file.uri.encode()
    except UnicodeEncodeError:
        raise DataError(f"the file name {file.uri!r} is not UTF-8 and cannot be recorded; rename the file") from None


def first_line(error: BaseException) -> str:
    """Type and first line of an error, fit for one line of a message and for a UTF-8 column."""
    line = (str(error).strip().splitlines() or [""])[0][:300]
    return f"{type(error).__name__}: {line}".encode(errors="backslashreplace").decode()


def plan_tasks(files: Iterable[SourceFile], target_bytes: int) -> list[list[Slice]]:
    """Runs of consecutive slices of about `target_bytes` on storage each: a function of the files and the target only.

    Only Parquet files are cut, between row groups; so a task exceeds the target where a single text file or row group
    does. A Parquet footer that cannot be read is left for read_records to report.
    """
    return _runs([sized for file in files for sized in _cut(file, target_bytes)], target_bytes)


def _runs(sized: Iterable[tuple[_T, int]], target_bytes: int) -> list[list[_T]]:
    """Consecutive items together as long as their bytes stay within the target; a larger item alone."""
    runs: list[list[_T]] = []
    room = 0
    for item, num_bytes in sized:
        if not runs or num_bytes > room:
            runs.append([])
            room = target_bytes
        runs[-1].append(item)
        room -= num_bytes
    return runs


def _cut(file: SourceFile, target_bytes: int) -> list[tuple[Slice, int]]:
    """The slices of a file with their bytes."""
    whole = [(Slice(file), file.num_bytes)]
    if file.layout != "parquet" or file.num_bytes <= target_bytes:
        return whole
    try:
        with open_source(file) as stream:
            sizes = _row_group_bytes(pq.ParquetFile(stream).metadata)
    except CORRUPT:
        return whole
    runs = _runs(enumerate(sizes), target_bytes)
    if len(runs) < 2:
        return whole
    return [(Slice(file, range(run[0], run[-1] + 1)), sum(sizes[index] for index in run)) for run in runs]


def _row_group_bytes(footer: Any) -> list[int]:
    groups = [footer.row_group(index) for index in range(footer.num_row_groups)]
    return [sum(group.column(i).total_compressed_size for i in range(group.num_columns)) for group in groups]


def open_source(file: SourceFile, count: CountBytes = count_nothing) -> io.BufferedReader:
    """The file as it is stored, its bytes counted as they are read."""
    try:
        fs, path = file_system(file.uri)
        return io.BufferedReader(_Stored(fs.open(path, "rb"), file.uri, count), BUFFER_BYTES)
    except (FileNotFoundError, PermissionError) as error:
        raise DataError(f"{file.uri} cannot be opened: {explain(error, file.uri)}") from error
    except STORE_ERRORS as error:
        raise StorageError(f"{file.uri}: {explain(error, file.uri)}. {CONTINUES}") from error
