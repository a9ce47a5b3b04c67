"""Files of a run, local or in object storage: locations, atomic writes, Parquet with checksums, manifests.

A reader never sees a torn file under its final name: locally a file is written beside its place and renamed, in object
storage it is one PUT. A stage is complete when its manifest is there, and the manifest is written last.
"""

import hashlib
import json
import logging
import os
import platform
import posixpath
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Self

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from davir_ray.errors import IntegrityError, OutputError, UserError

try:
    from botocore.exceptions import BotoCoreError, ClientError
except ModuleNotFoundError:  # the kernel alone, on a machine without s3fs
    _LOCATION_ERRORS: tuple[type[Exception], ...] = (OSError, ValueError, ImportError)
else:
    _LOCATION_ERRORS = (OSError, ValueError, ImportError, BotoCoreError, ClientError)

log = logging.getLogger(__name__)

TEMPORARY = ".partial-"
"""Prefix of files still being written: readers skip it, and a restarted stage removes what a dead attempt left."""

FINGERPRINT_KEY = b"davir_ray.fingerprint"
"""Parquet metadata key of the fingerprint under which a file was written: how a resumed stage knows its own files."""

_PACKAGES = ("davir_ray", "ray", "torch", "transformers", "tokenizers", "datasets", "pyarrow", "numpy")


@dataclass(frozen=True)
class Location:
    """A place in a file system: a file or a folder, which need not exist. Picklable."""

    fs: fsspec.AbstractFileSystem
    path: str

    @classmethod
    def of(cls, uri: str | os.PathLike[str]) -> Self:
        """The location of a local path or a URI such as s3://bucket/key; credentials come from the default chain."""
        fs, path = fsspec.core.url_to_fs(os.fspath(uri))
        return cls(fs, path.rstrip("/") or "/")

    def __truediv__(self, name: str) -> "Location":
        return Location(self.fs, posixpath.join(self.path, name))

    def __str__(self) -> str:
        return self.path if self.is_local else str(self.fs.unstrip_protocol(self.path))

    @property
    def name(self) -> str:
        """The last part of the path."""
        return posixpath.basename(self.path)

    @property
    def is_local(self) -> bool:
        """Whether this is a path of this machine's own file system."""
        return isinstance(self.fs, LocalFileSystem)

    def exists(self) -> bool:
        """Whether a file or folder is there now."""
        self.fs.invalidate_cache()
        return bool(self.fs.exists(self.path))

    def names(self, suffix: str = "") -> list[str]:
        """Sorted names of the finished files directly in this folder; empty if there is no folder."""
        return [name for name in self.sizes() if name.endswith(suffix)]

    def sizes(self) -> dict[str, int]:
        """Bytes of each finished file directly in this folder, by name, from one listing; empty if there is none."""
        self.fs.invalidate_cache()
        try:
            entries = self.fs.ls(self.path, detail=True)
        except FileNotFoundError:
            return {}
        sizes = {posixpath.basename(entry["name"]): int(entry["size"]) for entry in entries if entry["type"] == "file"}
        return {name: sizes[name] for name in sorted(sizes) if not name.startswith(TEMPORARY)}

    def read_bytes(self) -> bytes:
        """The whole file. FileNotFoundError if it is not there."""
        return bytes(self.fs.cat_file(self.path))

    def write_bytes(self, content: bytes) -> None:
        """Write the whole file so that no reader sees a part of it, replacing one that is there."""
        if not self.is_local:
            self.fs.pipe_file(self.path, content)
            return
        target = Path(self.path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{TEMPORARY}{uuid.uuid4().hex}")
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)

    def write_text(self, text: str) -> None:
        """`write_bytes` of UTF-8."""
        self.write_bytes(text.encode())

    def remove(self) -> None:
        """Delete the file or folder, if it is there."""
        if self.exists():
            self.fs.rm(self.path, recursive=True)

    def put_folder(self, local: Path) -> None:
        """Replace this folder by the files of a local folder; a local target is filled beside its place and renamed."""
        if self.is_local:
            target = Path(self.path)
            partial = target.with_name(f"{TEMPORARY}{uuid.uuid4().hex}")
            shutil.copytree(local, partial)
            self.remove()
            partial.replace(target)
            return
        self.remove()
        for file in sorted(path for path in local.rglob("*") if path.is_file()):
            self.fs.put_file(str(file), (self / file.relative_to(local).as_posix()).path)


@dataclass(frozen=True)
class FileEntry:
    """One committed file of a stage. In a manifest its name begins with the stage's folder."""

    name: str
    rows: int
    bytes: int
    sha256: str


def write_parquet(place: Location, table: pa.Table, extra: Mapping[bytes, bytes] | None = None) -> FileEntry:
    """Write a table as one Parquet file, atomically, with `extra` added to its schema metadata."""
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), **(extra or {})})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    content = sink.getvalue().to_pybytes()
    place.write_bytes(content)
    return FileEntry(place.name, table.num_rows, len(content), hashlib.sha256(content).hexdigest())


def read_parquet(place: Location, columns: list[str] | None = None) -> pa.Table:
    """Read one Parquet file, only the named columns of it."""
    with place.fs.open(place.path, "rb") as file:
        return pq.ParquetFile(file).read(columns=columns)


def describe_parquet(place: Location) -> tuple[FileEntry, str | None]:
    """The entry of a file that an earlier attempt committed, and the fingerprint it was written under."""
    content = place.read_bytes()
    footer = pq.ParquetFile(pa.BufferReader(content))
    fingerprint = (footer.schema_arrow.metadata or {}).get(FINGERPRINT_KEY)
    entry = FileEntry(place.name, footer.metadata.num_rows, len(content), hashlib.sha256(content).hexdigest())
    return entry, fingerprint.decode() if fingerprint else None


def digest(value: Any) -> str:
    """SHA-256 of a JSON-ready value, in hex: how fingerprints and lists of files are compared."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def file_digest(place: Location) -> str:
    """What changes when a file's content does: SHA-256 of a local file, the store's etag of a remote one."""
    if place.is_local:
        with Path(place.path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    info = place.fs.info(place.path)
    mark = info.get("ETag") or info.get("etag") or info.get("blob_id") or info.get("LastModified")
    if mark is None:
        return hashlib.sha256(place.read_bytes()).hexdigest()
    return f"{info['size']}-{str(mark).strip(chr(34))}"


@dataclass(frozen=True)
class Manifest:
    """What a complete stage wrote and what its content depends on."""

    stage: str
    fingerprint: dict[str, Any]
    """Everything the content depends on, by name: compared on the next run, and named where it differs."""
    counts: dict[str, int]
    files: list[FileEntry]
    details: dict[str, Any] = field(default_factory=dict)
    """What a reader may want to know and nothing depends on: numerics, timings, curves."""
    versions: dict[str, str] = field(default_factory=lambda: library_versions())
    seconds: float = 0.0

    def files_in(self, folder: str) -> list[FileEntry]:
        """The stage's files in one of its folders, their names without it."""
        start = f"{folder}/"
        return [replace(entry, name=entry.name[len(start) :]) for entry in self.files if entry.name.startswith(start)]

    @property
    def content(self) -> str:
        """Digest of the files' content: what a following stage depends on."""
        return digest([(entry.name, entry.sha256) for entry in self.files])

    def write(self, run: Location) -> None:
        """Commit the stage: write manifests/<stage>.json, with a checksum of itself."""
        body = json.loads(json.dumps(asdict(self)))
        text = json.dumps({**body, "checksum": digest(body)}, indent=1, ensure_ascii=False)
        _manifest_place(run, self.stage).write_text(text + "\n")

    @classmethod
    def read(cls, run: Location, stage: str) -> Self | None:
        """The manifest of a complete stage, else None. IntegrityError if the file was damaged."""
        place = _manifest_place(run, stage)
        try:
            text = place.read_bytes()
        except FileNotFoundError:
            return None
        try:
            body = json.loads(text)
            checksum = body.pop("checksum")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise IntegrityError(f"{place} is not a whole manifest ({error}); delete it to redo the stage") from error
        if digest(body) != checksum:
            raise IntegrityError(f"{place} does not match its own checksum; delete it to redo the stage {stage}")
        return cls(**{**body, "files": [FileEntry(**entry) for entry in body["files"]]})


def _manifest_place(run: Location, stage: str) -> Location:
    return run / "manifests" / f"{stage}.json"


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Readable lines naming what differs between two fingerprints: 'name: old → new'."""
    lines = []
    for name in sorted({*old, *new}):
        before, after = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            lines += differences(before, after, f"{prefix}{name}.")
        elif before != after:
            lines.append(f"{prefix}{name}: {_shorten(before)} → {_shorten(after)}")
    return lines


def _shorten(value: Any, most: int = 60) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def committed_files(folder: Location, fingerprint: str) -> list[FileEntry]:
    """Parquet files in a stage's folder from earlier attempts under the same fingerprint.

    OutputError if one of them was written under another fingerprint: the stage was left unfinished with other settings.
    """
    entries = []
    for name in folder.names(".parquet"):
        entry, written_under = describe_parquet(folder / name)
        if written_under != fingerprint:
            raise OutputError(
                f"{folder / name} was left by an unfinished run with other settings or inputs; "
                "add --overwrite to redo this stage, or choose another --output"
            )
        entries.append(entry)
    return entries


def remove_leftovers(folder: Location) -> None:
    """Delete files that a dead attempt left unfinished in a local folder; object storage has none."""
    if not folder.is_local or not Path(folder.path).is_dir():
        return
    for path in Path(folder.path).glob(f"{TEMPORARY}*"):
        log.info("removing %s, left by an attempt that died", path)
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


@contextmanager
def translated(uri: object, error_class: type[UserError]) -> Iterator[None]:
    """Turn what a file system raises about a path that the user gave into one line of ours."""
    try:
        yield
    except _LOCATION_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise error_class(
            f"{uri} cannot be used ({type(error).__name__}: {reason[:300]}); check path and access"
        ) from error


def in_folder(folder: str, entries: Iterable[FileEntry]) -> list[FileEntry]:
    """Entries as a manifest lists them: named from the run's folder."""
    return [replace(entry, name=f"{folder}/{entry.name}") for entry in entries]


def total_rows(entries: Iterable[FileEntry]) -> int:
    """Rows of all files."""
    return sum(entry.rows for entry in entries)


def library_versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter; recorded in manifests, never compared."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions
