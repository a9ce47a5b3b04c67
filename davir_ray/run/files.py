"""Files of a run and their entries in manifests; Parquet with page checksums, read back whole or refused."""

import hashlib
import shutil
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from davir_ray.errors import IntegrityError
from davir_ray.run.digests import file_digest
from davir_ray.run.location import TEMPORARY, Location
from davir_ray.run.storage_errors import storage_errors

FINGERPRINT_KEY = b"davir_ray.fingerprint"
"""Parquet metadata key of the fingerprint under which a file was written: how a resumed stage knows its own files."""


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """One committed file of a stage. In a manifest its name begins with the stage's folder."""

    name: str
    rows: int
    bytes: int
    sha256: str
    mark: str | None = field(default=None, compare=False)
    """The file's mark (see Stored) when its stage was committed; says nothing of the content, and is not compared."""


def write_file(place: Location, content: bytes, rows: int = 0) -> FileEntry:
    """Write a whole file, atomically; returns its entry."""
    place.write_bytes(content)
    return FileEntry(name=place.name, rows=rows, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def put_folder(place: Location, local: Path, last: Collection[str] = ()) -> list[FileEntry]:
    """Replace the folder by the files of a local folder; returns what was written.

    A local target is filled beside its place and renamed. In object storage the files named in `last` follow the
    others, so that a reader who needs one of them never takes half a folder for a whole one.
    """
    files = sorted(path for path in local.rglob("*") if path.is_file())
    entries = [
        FileEntry(
            name=file.relative_to(local).as_posix(),
            rows=0,
            bytes=file.stat().st_size,
            sha256=file_digest(Location.of(file)),
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
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return write_file(place, sink.getvalue().to_pybytes(), table.num_rows)


def read_parquet(place: Location, columns: list[str] | None = None) -> pa.Table:
    """Read one Parquet file, only the named columns of it. IntegrityError if it is missing, or what is read damaged."""
    try:
        with storage_errors(place, may_be_absent=True), place.fs.open(place.path, "rb") as file, _sound(place):
            table = pq.ParquetFile(file, page_checksum_verification=True).read(columns=columns)
            if columns is not None and set(table.column_names) != set(columns):
                raise pa.ArrowInvalid(f"its columns are {table.column_names}")
            return table
    except FileNotFoundError as error:
        raise IntegrityError(f"{place} is missing; restore it, or delete its stage's manifest to redo it") from error


def parquet_rows(place: Location) -> int:
    """Rows of a Parquet file, from its footer. IntegrityError if it was damaged."""
    with storage_errors(place, may_be_absent=True), place.fs.open(place.path, "rb") as file, _sound(place):
        return int(pq.ParquetFile(file).metadata.num_rows)


def committed_parquet(place: Location) -> tuple[FileEntry, pa.Table]:
    """A file that an earlier attempt committed: its entry and all of it. IntegrityError if its data were damaged.

    Page checksums leave out the footer's statistics and metadata: who keeps something there seals it.
    """
    content = place.read_bytes()
    with _sound(place):
        table = pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True).read()
    return FileEntry(
        name=place.name, rows=table.num_rows, bytes=len(content), sha256=hashlib.sha256(content).hexdigest()
    ), table


@contextmanager
def _sound(place: Location) -> Iterator[None]:
    """Tell damaged content from storage that fails: Arrow's errors have no number, a file system's have one."""
    try:
        yield
    except MemoryError:  # Arrow's is one of its own errors, too
        raise
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
            raise
        reason = " ".join(str(error).split())[:200]
        raise IntegrityError(f"{place} is damaged ({reason}); delete it and its stage's manifest to redo it") from error


def in_folder(folder: str, entries: Iterable[FileEntry]) -> list[FileEntry]:
    """Entries as a manifest lists them: named from the run's folder."""
    return [replace(entry, name=f"{folder}/{entry.name}") for entry in entries]


def total_rows(entries: Iterable[FileEntry]) -> int:
    """Rows of all files."""
    return sum(entry.rows for entry in entries)
