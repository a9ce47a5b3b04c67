"""How many rows the sources hold, about, without reading them: for an estimate before a run."""

from collections.abc import Sequence
from typing import TypeVar

from davir_ray.data.files import Slice, SourceFile
from davir_ray.data.records import read_records
from davir_ray.errors import IntegrityError
from davir_ray.run.files import parquet_rows
from davir_ray.run.location import Location

_FILES = 8
"""Looked into, evenly spaced over the sorted list."""

_BYTES = 4 * 2**20
"""Read of a text file, as it is stored."""

_T = TypeVar("_T")


def estimate_rows(files: Sequence[SourceFile]) -> int:
    """Rows of the files: exact for a few that are small or Parquet, else in proportion to bytes."""
    looked = [(_rows_and_bytes(file)) for file in _spread(files)]
    rows, num_bytes = sum(rows for rows, _ in looked), sum(read for _, read in looked)
    return round(rows * sum(file.num_bytes for file in files) / num_bytes) if num_bytes else 0


def _spread(files: Sequence[_T]) -> list[_T]:
    count = min(_FILES, len(files))
    return [files[number * len(files) // count] for number in range(count)]


def _rows_and_bytes(file: SourceFile) -> tuple[int, int]:
    """Rows of a file's beginning and the bytes that hold them; all of a Parquet file, by its footer."""
    if file.layout == "parquet":
        try:
            return parquet_rows(Location.of(file.uri)), file.num_bytes
        except IntegrityError:  # a run makes a reject of it
            return 1, file.num_bytes
    rows, read = 0, 0

    def count(num_bytes: int) -> None:
        nonlocal read
        read += num_bytes

    for _ in read_records(Slice(file), count):
        rows += 1
        if read >= _BYTES and file.layout != "json":  # an array is read to its end before its first element
            break
    return rows, min(read, file.num_bytes)
