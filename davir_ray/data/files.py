"""Sources → files → tasks: which files a source has, and what each task reads of them.

    Source ─list_files─► [SourceFile] ─plan_tasks─► [[Slice]] ─read_records─► Record | Reject

A source is Parquet, Arrow, JSON lines, JSON arrays, CSV or TSV (the last four plain, .gz or .zst), or a folder written
by `datasets`: one file, a folder, a glob, a list of these (local or any URI that fsspec knows) or a hub name. Bad
content becomes a Reject; a bad request (no such file, no access) is a DataError; a disk or network that fails during a
read is a StorageError, so that a failed read never looks like a short file.
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
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import chain
from typing import Any, Literal, NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from davir_ray.config.sources import DEFAULT_SPLIT, Source
from davir_ray.errors import DataError, StorageError
from davir_ray.run.files import file_digest
from davir_ray.run.location import CYCLE, DANGLING, LFS_POINTER, FileInfo, Location, each, file_info, file_system
from davir_ray.run.manifest import CONFIG_FILE, CONFIG_HEAD
from davir_ray.run.storage_errors import CONTINUES, explain, store_errors

logger = logging.getLogger(__name__)

Layout = Literal["jsonl", "json", "csv", "tsv", "parquet", "arrow"]

_T = TypeVar("_T")

_LAYOUTS: dict[str, Layout] = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet",
    ".arrow": "arrow",
}  # fmt: skip

_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}

_ACCEPTED = ".parquet, .arrow, .jsonl, .ndjson, .json, .csv and .tsv, the last five also with .gz or .zst"

CORRUPT = (OSError, EOFError, zlib.error, pa.ArrowException)  # Arrow reports damaged content as OSError, too
BUFFER_BYTES = 1 << 18

RANGE_BLOCK_BYTES = 2 * 2**20
"""Bytes that a remote store reads ahead in a part of a file; the 50 MiB of s3fs would be more than the part."""

UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)

_WILDCARD = re.compile(r"[*?\[]")

_HUB_NAME = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<config>[\w.-]+))?(@(?P<revision>[\w.-]+(/[\w.-]+)*))?")
"""A data set of the hub, its configuration and its revision, as in openai/gsm8k:main@e53f048."""

_HUB_ROOT = re.compile(r"hf://datasets/[^@]+@[^/]+/")

_REVISION = re.compile(r"(?P<cache>.*/datasets--[^/]+)/snapshots/(?P<revision>[^/]+)/")


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """One file of a source."""

    source: str
    """Name of the source."""
    uri: str
    relative_path: str
    """Path below the source's root, so that it stays the same when the root moves; part of example_id."""
    layout: Layout
    num_bytes: int
    mark: str | None = field(default=None, compare=False)
    """Etag or modification time (see FileInfo) when it was listed."""

    def digest(self) -> str:
        """A string that changes when the content does (see file_digest), without another look at a file with an etag.

        DataError if a local file has changed since it was listed: its parts would not be those of the content.
        """
        place = Location.of(self.uri)
        if not place.is_local:
            return f"{self.num_bytes}-{self.mark}" if self.mark else file_digest(place)
        found = file_digest(place)
        if self.mark is not None and place.info() != FileInfo(self.num_bytes, self.mark):
            raise DataError(f"{self.uri} was changed while the run read it; start the run again when it is complete")
        return found


def digests_of(files: list[SourceFile]) -> dict[str, str]:
    """The digest of each file, by relative path."""
    return dict(zip((file.relative_path for file in files), each(SourceFile.digest, files), strict=True))


class Slice(NamedTuple):
    """The part of a file that a task reads: the whole file if nothing else is given."""

    file: SourceFile
    row_groups: range | None = None
    """Row groups of a Parquet file."""
    byte_range: range | None = None
    """Bytes of a file of JSON lines: the slice has the lines that begin in this range."""
    rows: range | None = None
    """Index in the file of each of these lines, once they are counted."""


CountBytes = Callable[[int], None]
"""Receives the number of bytes of each read from storage."""


def count_nothing(num_bytes: int) -> None:
    """Ignore the bytes that were read."""


class _Stored(io.RawIOBase):
    """An fsspec file that raises its read errors as StorageError; decoders of its content raise OSError as well."""

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
        except Exception as error:  # each file system has a library with errors of its own (httpx, aiohttp, botocore)
            raise StorageError(f"{self._uri}: {explain(error, self._uri)}") from error
        buffer[: len(data)] = data
        self._count(len(data))
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


@dataclass(frozen=True, kw_only=True)
class _Found:
    """The files that one path of a source refers to."""

    fs: Any
    root: str
    infos: dict[str, FileInfo]
    """Size and mark by path; paths are written as the file system does."""
    is_datasets_folder: bool = False
    has_splits: bool = False


def list_files(source: Source, written: Iterable[Location] = ()) -> list[SourceFile]:
    """The files of a source, sorted by relative path.

    Relative paths begin at the given folder, at the fixed part of a glob, or at the folder of a file; for a list, at
    the common part of these; for a hub name, at the repository.

    In folders and globs, names that begin with a dot or an underscore and everything in the places `written` by this
    job are skipped; other extensions, outputs of other runs and the JSON files of models are skipped with a warning. A
    link counts as its target, under the link's own path; a link to a folder that contains it is skipped with a
    warning. Raises DataError if nothing is found, for a broken link, and for a path in a place that this job writes.
    """
    path = source.path
    hub_name = _HUB_NAME.fullmatch(path) if isinstance(path, str) and _layout(path) is None else None
    if hub_name and not os.path.lexists(hub_name.string):
        files = _hub_files(source, hub_name)
    else:
        outputs = [Location(place.fs, _real(place.fs, place.path)) for place in written]
        found = [_find(path, source.split, outputs) for path in source.paths]
        if any(one.fs != found[0].fs for one in found):
            raise DataError(
                f"source {source.name!r} lists several file systems ({source.paths}); make one source of each"
            )
        if source.split != DEFAULT_SPLIT and not any(one.has_splits for one in found):
            raise DataError(
                f"split of source {source.name!r} is {source.split!r}, but {source.path} has no splits; leave it out, "
                "or give the files of that split"
            )
        root = found[0].root if len(found) == 1 else posixpath.commonpath([one.root for one in found])
        files = [
            SourceFile(
                source=source.name,
                uri=path if isinstance(one.fs, LocalFileSystem) else one.fs.unstrip_protocol(path),
                relative_path=_relative(path, root),
                layout="arrow" if one.is_datasets_folder else _layout(path) or "jsonl",
                num_bytes=info.bytes,
                mark=info.mark,
            )
            for one in found
            for path, info in one.infos.items()
        ]
    for file in files:
        try:
            file.uri.encode()
        except UnicodeEncodeError:
            raise DataError(
                f"the file name {file.uri!r} is not UTF-8 and cannot be recorded; rename the file"
            ) from None
    return sorted(set(files), key=lambda file: file.relative_path)


def _find(path: str, split: str, written: list[Location]) -> _Found:
    """The files that one path refers to: a file, a folder, a folder written by `datasets`, or a glob."""
    absolute = path if "://" in path else os.path.abspath(os.path.expanduser(path))
    try:
        fs, stripped = file_system(absolute)
        fs.invalidate_cache()  # a notebook may have written files since fsspec listed the folder
        is_there = fs.exists(stripped)
        if not (is_there or _WILDCARD.search(stripped)):
            if fs.lexists(stripped):
                raise _dangling(stripped)
            raise DataError(f"{path} does not exist; give a file, a folder, a glob or a hub name that does")
        named = stripped if is_there else _fixed_part(stripped)
        if place := _place_of(fs, named, written, partial(_real, fs)):
            raise DataError(f"{path} is in {place}, which this job writes; choose another --output, or other data")
        if not is_there:
            return _find_glob(fs, stripped, written)
        if fs.isdir(stripped):
            if found := _find_datasets_folder(fs, stripped, split):
                return found
            infos = fs.find(stripped, detail=True)
            data = _data_among(fs, stripped, infos, infos, written)
            return _Found(fs=fs, root=stripped, infos=_keep_readable(stripped, data))
        if _layout(stripped) is None:
            raise DataError(f"{path} has an extension that is not supported; give {_ACCEPTED}")
        return _Found(fs=fs, root=posixpath.dirname(stripped), infos={stripped: file_info(fs.info(stripped))})
    except DataError:
        raise
    except Exception as error:  # the libraries behind fsspec raise errors of their own for access and credentials
        refused = getattr(error, "filename", None) or path  # it may be a folder below the path
        raise DataError(f"{refused} cannot be listed: {explain(error, path)}") from error


def _dangling(path: str) -> DataError:
    return DataError(
        f"{path} is a link to {os.readlink(path)}, which does not exist or cannot be read; restore it or remove the "
        "link"
    )


def _find_glob(fs: Any, pattern: str, written: list[Location]) -> _Found:
    root = _fixed_part(pattern)
    infos: dict[str, Any] = {}
    for path, info in fs.glob(pattern, detail=True).items():
        infos |= fs.find(path, detail=True) if info["type"] == "directory" else {path: info}
    # A pattern without ** matches at one depth only, so what it finds is enough to recognise runs and models.
    around = fs.find(root, detail=True) if "**" in pattern else infos
    data = _data_among(fs, root, infos, around, written)
    return _Found(fs=fs, root=root, infos=_keep_readable(root, data, pattern))


def _fixed_part(pattern: str) -> str:
    """The folder of a glob before its first wildcard."""
    return posixpath.dirname(_WILDCARD.split(pattern)[0])


def _real(fs: Any, path: str) -> str:
    """The path with its links resolved; only the local file system has links."""
    return os.path.realpath(path) if isinstance(fs, LocalFileSystem) else path.rstrip("/")


def _place_of(fs: Any, path: str, places: list[Location], real: Callable[[str], str]) -> Location | None:
    """The first of the places that a path is in, or equal to; the places have their links resolved.

    The path and each of its parents are resolved (by `real`): any of them may be a link into a place.
    """
    resolved = [real(path)]
    while (parent := posixpath.dirname(path)) not in ("", path):
        path = parent
        resolved.append(real(path))
    candidates = [place for place in places if place.fs.protocol == fs.protocol]
    return next(
        (place for place in candidates if any(f"{way}/".startswith(f"{place.path}/") for way in resolved)), None
    )


def _data_among(
    fs: Any, root: str, infos: dict[str, Any], around: dict[str, Any], written: list[Location]
) -> dict[str, Any]:
    """The files that may be data: without the output of this job or of another run, and without the JSON of models.

    All files `around` decide whether a folder is a run or a model. Raises DataError if the root is a run or nothing is
    left.
    """
    infos, around = _visible(infos, root), _visible(around, root)
    runs, models = _outputs_among(fs, around), _models_among(around)
    if root in runs:
        raise DataError(f"{root} is the output of a run; give a folder in it that has data, such as {root}/selected")
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


def _visible(infos: dict[str, Any], root: str) -> dict[str, Any]:
    """The files whose path below the root has no name that begins with a dot or an underscore."""
    names = ((path, _relative(path, root).split("/")) for path in infos)
    return {path: infos[path] for path, parts in names if not any(part[:1] in (".", "_") for part in parts)}


def _models_among(infos: dict[str, Any]) -> set[str]:
    """The folders that hold a model, an adapter or a tokenizer."""
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
    """The folders that hold a run, known by the first line of its configuration."""
    marks = [path for path, info in infos.items() if posixpath.basename(path) == CONFIG_FILE and info["type"] == "file"]
    starts = each(lambda path: fs.cat_file(path, end=len(CONFIG_HEAD) + len(codecs.BOM_UTF8)), marks)
    head = CONFIG_HEAD.strip().encode()
    return [
        posixpath.dirname(path)
        for path, start in zip(marks, starts, strict=True)
        if start.removeprefix(codecs.BOM_UTF8).startswith(head)
    ]


def _find_datasets_folder(fs: Any, root: str, split: str) -> _Found | None:
    """The Arrow files that `save_to_disk` of a Dataset or a DatasetDict wrote; None if it did not write this folder."""
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
    infos = {path: file_info(fs.info(path)) for path in paths}
    return _Found(fs=fs, root=root, infos=infos, is_datasets_folder=True, has_splits=has_splits)


def _keep_readable(root: str, infos: dict[str, Any], asked: str | None = None) -> dict[str, FileInfo]:
    """Size and mark by path of the files with a supported extension; a warning counts the others."""
    for path, info in infos.items():
        if info["type"] == DANGLING:
            raise _dangling(path)
        if info["type"] == CYCLE:
            logger.warning("%s is a link to a folder that contains it, and is not followed", path)
    files = {path: info for path, info in infos.items() if info["type"] == "file"}
    kept = {path: file_info(info) for path, info in files.items() if _layout(path) is not None}
    skipped = Counter(posixpath.splitext(path)[1] or "no extension" for path in files if path not in kept)
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
    """Raise DataError if the hub's cache of a data set has several revisions, each of which has every row."""
    revisions: dict[str, set[str]] = defaultdict(set)
    for match in filter(None, map(_REVISION.search, paths)):
        revisions[match["cache"]].add(match["revision"])
    for cache, found in revisions.items():
        if len(found) > 1:
            names = ", ".join(sorted(found))
            raise DataError(f"{cache} has {len(found)} revisions ({names}); give {cache}/snapshots/REVISION")


def _hub_files(source: Source, found: re.Match[str]) -> list[SourceFile]:
    """The files of one split of a hub data set, which the workers stream; nothing is downloaded here."""
    name, config, revision = found["name"], found["config"], found["revision"]
    try:
        import datasets

        data_files = datasets.load_dataset_builder(name, config, revision=revision).config.data_files or {}
        uris = {str(split): [str(uri) for uri in files] for split, files in data_files.items()}
        places = {uri: file_system(uri) for uri in uris.get(source.split, [])}
        infos = {uri: file_info(fs.info(path)) for uri, (fs, path) in places.items()}
    except Exception as error:  # a missing library, no network, no such data set, a configuration to choose
        raise DataError(
            f"{found.string} neither exists here nor loads from the hub ({first_line(error)}); correct the path (a "
            f"configuration and a revision are given as {name}:CONFIG@REVISION), or name the files as "
            f"hf://datasets/{name}/…"
        ) from error
    if not infos:
        splits = ", ".join(uris) or "none"
        raise DataError(f"the hub's {name} has no split {source.split!r}; set split to one of: {splits}")
    files = []
    for uri, info in infos.items():
        layout = _layout(uri)
        if layout is None:
            raise DataError(f"the hub's {name} has {uri}, whose extension is not supported; give {_ACCEPTED}")
        # Without the revision, an unchanged row keeps its example_id when another file of the repository changes.
        files.append(
            SourceFile(
                source=source.name,
                uri=uri,
                relative_path=_HUB_ROOT.sub("", uri),
                layout=layout,
                num_bytes=info.bytes,
                mark=info.mark,
            )
        )
    return files


def _relative(path: str, root: str) -> str:
    return path.removeprefix(root).lstrip("/")


def _layout(path: str) -> Layout | None:
    stem, extension = posixpath.splitext(path.lower())
    if extension not in _COMPRESSIONS:
        return _LAYOUTS.get(extension)
    layout = _LAYOUTS.get(posixpath.splitext(stem)[1])
    return None if layout in ("parquet", "arrow") else layout


def first_line(error: BaseException) -> str:
    """Type and first line of an error, as valid UTF-8 for a message or a column."""
    line = (str(error).strip().splitlines() or [""])[0][:300]
    return f"{type(error).__name__}: {line}".encode(errors="backslashreplace").decode()


Cut = Callable[[SourceFile], list[tuple["Slice", int]]]
"""Cuts a file into slices, with the number of bytes of each."""


def plan_tasks(
    files: list[SourceFile],
    target_bytes: int,
    apply: Callable[[Cut, list[SourceFile]], list[list[tuple[Slice, int]]]] = each,
) -> list[list[Slice]]:
    """Group consecutive slices into tasks of about `target_bytes` of storage; depends on files and target only.

    `apply` calls the function that cuts a file for each of them, and returns the results in order.

    A Parquet file is cut between row groups. Uncompressed JSON lines are cut at multiples of the target; the rows of
    such slices are not counted yet. A task exceeds the target if a single row group or other file does. If a Parquet
    footer cannot be read, read_records reports it. Raises DataError if a file cannot be opened, StorageError if the
    storage fails, because the plan must be the same when the files are.
    """
    return _grouped(chain.from_iterable(apply(partial(_cut, target_bytes=target_bytes), files)), target_bytes)


def _grouped(sized: Iterable[tuple[_T, int]], target_bytes: int) -> list[list[_T]]:
    """Groups of consecutive items, each within the target bytes; a larger item is a group of its own."""
    groups: list[list[_T]] = []
    room = 0
    for item, num_bytes in sized:
        if not groups or num_bytes > room:
            groups.append([])
            room = target_bytes
        groups[-1].append(item)
        room -= num_bytes
    return groups


def _cut(file: SourceFile, target_bytes: int) -> list[tuple[Slice, int]]:
    """The slices of a file, with the number of bytes of each."""
    if file.num_bytes > target_bytes and file.layout == "parquet":
        return _cut_row_groups(file, target_bytes)
    if file.num_bytes > target_bytes and _has_lines(file):
        starts = range(0, file.num_bytes, target_bytes)
        ranges = [range(start, min(start + target_bytes, file.num_bytes)) for start in starts]
        return [(Slice(file, byte_range=part), len(part)) for part in ranges]
    return [(Slice(file), file.num_bytes)]


def _cut_row_groups(file: SourceFile, target_bytes: int) -> list[tuple[Slice, int]]:
    whole = [(Slice(file), file.num_bytes)]
    try:
        with open_source(file) as stream:
            footer = pq.ParquetFile(stream).metadata
            groups = [footer.row_group(index) for index in range(footer.num_row_groups)]
            sizes = [sum(group.column(i).total_compressed_size for i in range(group.num_columns)) for group in groups]
    except CORRUPT:
        return whole
    parts = _grouped(enumerate(sizes), target_bytes)
    if len(parts) < 2:
        return whole
    return [(Slice(file, range(part[0], part[-1] + 1)), sum(sizes[index] for index in part)) for part in parts]


def _has_lines(file: SourceFile) -> bool:
    """Whether a file can be read from any of its line ends: JSON lines in UTF-8, not compressed."""
    if file.layout not in ("jsonl", "json") or compression(file) is not None:
        return False
    with open_source(file, block_bytes=RANGE_BLOCK_BYTES) as stream:
        try:
            stream.seek(file.num_bytes)
        except ValueError:  # a web server that sends files only from their beginning
            return False
        stream.seek(0)
        head = stream.peek(1)
    is_other = head.startswith(UTF16_MARKS) or LFS_POINTER.match(head)  # read_records refuses both
    return not (is_other or (file.layout == "json" and begins_array(head)))


def begins_array(head: bytes) -> bool:
    """Whether a file that begins with these bytes is one JSON array, rather than lines."""
    return head.lstrip(codecs.BOM_UTF8 + b" \t\r\n").startswith(b"[")


def compression(file: SourceFile) -> str | None:
    """Arrow's name of a file's compression, by its extension; None if it has none."""
    return _COMPRESSIONS.get(posixpath.splitext(file.uri.lower())[1])


def open_source(
    file: SourceFile, count: CountBytes = count_nothing, block_bytes: int | None = None
) -> io.BufferedReader:
    """The file's stored bytes, counted as they are read; `block_bytes` replaces what a remote store reads ahead."""
    try:
        fs, path = file_system(file.uri)
        stored = fs.open(path, "rb", block_size=block_bytes)
        return io.BufferedReader(_Stored(stored, file.uri, count), BUFFER_BYTES)
    except (FileNotFoundError, PermissionError) as error:
        raise DataError(f"{file.uri} cannot be opened: {explain(error, file.uri)}") from error
    except store_errors() as error:
        raise StorageError(f"{file.uri}: {explain(error, file.uri)}. {CONTINUES}") from error
