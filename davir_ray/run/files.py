"""Files of a run: their digests, their entries in manifests, and Parquet with page checksums, refused if damaged."""

import hashlib
import json
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from davir_ray.errors import IntegrityError, StorageError
from davir_ray.run.location import TEMPORARY, Location, file_info
from davir_ray.run.storage_errors import storage_errors
from davir_ray.text import one_line

log = logging.getLogger(__name__)

_KEPT_FROM_BYTES = 2**20
"""Bytes of a file from which its digest is kept on the disk: fewer are read in milliseconds."""

_BATCH_ROWS, _BATCH_BYTES = 1024, 2**24
"""Rows that Arrow encodes at once by default, and bytes that make fewer rows enough."""

_SETTLED_NS = 2 * 10**9
"""Age of a file from which its digest is kept: one that was changed just now may change again at the same time."""

_DIGEST = re.compile(b"[0-9a-f]{64}")

FINGERPRINT_KEY = b"davir_ray.fingerprint"
"""Key in a Parquet file's metadata of the fingerprint that the file was written under, by which a resumed stage
recognises its own files."""


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """One complete file of a stage. In a manifest its name is the path relative to the run's folder."""

    name: str
    rows: int
    bytes: int
    sha256: str
    mark: str | None = field(default=None, compare=False)
    """Etag or modification time (see FileInfo) when the file was written, or the stage committed. It says nothing about
    the content, so two entries are equal whatever it is."""


def digest(value: Any) -> str:
    """SHA-256 of a JSON-ready value, in hex: how fingerprints and lists of files are compared."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def content_digest(place: Location) -> str:
    """SHA-256 of a file's content, read now."""
    with storage_errors(place, may_be_absent=True), place.fs.open(place.path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_digest(place: Location) -> str:
    """A string that changes when the file's content does.

    SHA-256 of a local file; size and etag (or time of modification) of a remote one, if its store has them.
    """
    with storage_errors(place, may_be_absent=True):
        if place.is_local:
            return _local_digest(place.path)
        info = file_info(place.fs.info(place.path))
    return content_digest(place) if info.mark is None else f"{info.bytes}-{info.mark}"


class ReadDigest(NamedTuple):
    """The digest of a local file that was read for it, perhaps on another machine."""

    sha256: str
    num_bytes: int
    mtime_ns: int
    begun_ns: int
    """When the reading began."""


def read_digest(place: Location) -> ReadDigest:
    """The digest of a local file, read now; for `keep_digest`."""
    with storage_errors(place):
        begun_ns, stat = time.time_ns(), Path(place.path).stat()
        return ReadDigest(content_digest(place), stat.st_size, stat.st_mtime_ns, begun_ns)


def keep_digest(place: Location, found: ReadDigest) -> None:
    """Remember the digest of a local file, that of a large one on the disk, unless it has changed since it was read.

    One that was changed a moment ago may change again within the same time, so it is not kept on the disk.
    """
    identity = _identity(place.path)
    if (found.num_bytes, found.mtime_ns) != (identity.num_bytes, identity.mtime_ns):
        return
    _KNOWN[place.path, identity] = found.sha256
    if found.num_bytes < _KEPT_FROM_BYTES or found.begun_ns - max(identity.mtime_ns, identity.ctime_ns) <= _SETTLED_NS:
        return
    try:
        _place_kept(place.path, identity).write_text(found.sha256)
    except StorageError as error:
        log.debug("the digest of %s is not kept: %s", place, error)


def takes_reading(place: Location) -> bool:
    """Whether a local file would be read for its digest; a small one does not count."""
    if not place.is_local:
        return False
    identity = _identity(place.path)
    return identity.num_bytes >= _KEPT_FROM_BYTES and _known_digest(place.path, identity) is None


class _Identity(NamedTuple):
    """What changes when a local file is written again or replaced by another."""

    device: int
    inode: int
    num_bytes: int
    mtime_ns: int
    ctime_ns: int


_KNOWN: dict[tuple[str, _Identity], str] = {}
"""The digests that this process has read."""


def _identity(path: str) -> _Identity:
    stat = Path(path).stat()
    return _Identity(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


def _local_digest(path: str) -> str:
    """SHA-256 of a local file, computed again only where the file behind the path, its size or its times differ.

    Those of large files are kept on the disk, so that a 70B is not read at every start.
    """
    identity = _identity(path)
    if known := _known_digest(path, identity):
        return known
    found = read_digest(Location.of(path))
    keep_digest(Location.of(path), found)
    return found.sha256


def _known_digest(path: str, identity: _Identity) -> str | None:
    if (path, identity) not in _KNOWN and (kept := _kept_digest(path, identity)):
        _KNOWN[path, identity] = kept
    return _KNOWN.get((path, identity))


def _kept_digest(path: str, identity: _Identity) -> str | None:
    if identity.num_bytes < _KEPT_FROM_BYTES:
        return None
    try:
        text = _place_kept(path, identity).read_bytes()
    except (FileNotFoundError, StorageError) as error:
        log.debug("%s is read for its digest: %s", path, error)
        return None
    return text.decode() if _DIGEST.fullmatch(text) else None


def _place_kept(path: str, identity: _Identity) -> Location:
    return Location.of(user_cache() / "digests" / digest([os.path.abspath(path), *identity]))


def user_cache() -> Path:
    """The folder of this user for what any run may use again."""
    return Path(os.environ.get("DAVIR_RAY_CACHE") or os.path.expanduser("~/.cache/davir_ray"))


def write_file(place: Location, content: bytes, rows: int = 0) -> FileEntry:
    """Write a whole file, atomically; returns its entry."""
    place.write_bytes(content)
    return _entry(place.name, content, rows)


def _entry(name: str, content: bytes, rows: int) -> FileEntry:
    return FileEntry(name=name, rows=rows, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def put_folder(place: Location, local: Path, last: Collection[str] = ()) -> list[FileEntry]:
    """Replace a folder by the files of a local folder; returns the entries of what was written.

    A local target is filled under a temporary name and renamed. In object storage the files named in `last` are
    uploaded after the others, so that a reader who waits for one of them never sees an incomplete folder.
    """
    files = sorted(path for path in local.rglob("*") if path.is_file())
    entries = [
        FileEntry(
            name=file.relative_to(local).as_posix(),
            rows=0,
            bytes=file.stat().st_size,
            sha256=content_digest(Location.of(file)),
        )
        for file in files
    ]
    with storage_errors(place):
        if place.is_local:
            target = Path(place.path)
            partial = target.with_name(f"{TEMPORARY}{uuid.uuid4().hex}")
            shutil.copytree(local, partial)
            place.remove()
            partial.replace(target)
            return entries
        place.remove()
        for entry in sorted(entries, key=lambda entry: entry.name in last):
            place.fs.put_file(str(local / entry.name), (place / entry.name).path)
        return entries


def write_parquet(place: Location, table: pa.Table, extra: Mapping[bytes, bytes] | None = None) -> FileEntry:
    """Write a table as one Parquet file, atomically, with `extra` added to its schema metadata."""
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), **(extra or {})})
    sink = pa.BufferOutputStream()
    # Pages end between batches of rows: a page of a thousand rows of long texts would be held a few times.
    batch_rows = _BATCH_BYTES // max(1, table.nbytes // max(1, table.num_rows))
    batch_size = min(max(1, batch_rows), _BATCH_ROWS)
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True, write_batch_size=batch_size)
    return write_file(place, sink.getvalue().to_pybytes(), table.num_rows)


def read_parquet(place: Location, columns: list[str] | None = None) -> pa.Table:
    """Read the named columns of a Parquet file, or all. Raises IntegrityError if it is missing or damaged."""
    try:
        with storage_errors(place, may_be_absent=True), place.fs.open(place.path, "rb") as file, _damage_refused(place):
            table = pq.ParquetFile(file, page_checksum_verification=True).read(columns=columns)
            if columns is not None and set(table.column_names) != set(columns):
                raise pa.ArrowInvalid(f"its columns are {table.column_names}")
            return table
    except FileNotFoundError as error:
        raise IntegrityError(f"{place} is missing; restore it, or delete its stage's manifest to redo it") from error


def parquet_rows(place: Location) -> int:
    """Number of rows of a Parquet file, from its footer. Raises IntegrityError if the footer is damaged."""
    with storage_errors(place, may_be_absent=True), place.fs.open(place.path, "rb") as file, _damage_refused(place):
        return int(pq.ParquetFile(file).metadata.num_rows)


def committed_parquet(place: Location) -> tuple[FileEntry, pa.Table]:
    """Entry and table of a file that an earlier attempt wrote. Raises IntegrityError if its data are damaged.

    Page checksums do not cover the footer's statistics and metadata: a stage that keeps something there adds a checksum
    of its own.
    """
    content = place.read_bytes()
    with _damage_refused(place):
        table = pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True).read()
    return _entry(place.name, content, table.num_rows), table


@contextmanager
def _damage_refused(place: Location) -> Iterator[None]:
    """Turn errors that mean damaged content into IntegrityError, and let those of failing storage pass.

    The errno tells them apart: Arrow's errors have none, a file system's have one.
    """
    try:
        yield
    except MemoryError:  # Arrow's is an ArrowException, too
        raise
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
            raise
        redo = "delete it and its stage's manifest to redo it"
        raise IntegrityError(f"{place} is damaged ({one_line(error, 200)}); {redo}") from error


def in_folder(folder: str, entries: Iterable[FileEntry]) -> list[FileEntry]:
    """Entries as a manifest lists them, named by the path relative to the run's folder."""
    return [replace(entry, name=f"{folder}/{entry.name}") for entry in entries]


def total_rows(entries: Iterable[FileEntry]) -> int:
    """Sum of the rows of all files."""
    return sum(entry.rows for entry in entries)
