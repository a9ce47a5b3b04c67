"""Files → records: JSON lines, JSON arrays, CSV, TSV, Parquet, Arrow; each row a dictionary or a reject."""

import codecs
import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from davir_ray.data.files import (
    BUFFER_BYTES,
    CORRUPT,
    RANGE_BLOCK_BYTES,
    UTF16_MARKS,
    CountBytes,
    Slice,
    SourceFile,
    begins_array,
    compression,
    count_nothing,
    first_line,
    logger,
    open_source,
)
from davir_ray.errors import DataError, IntegrityError
from davir_ray.run.files import parquet_rows
from davir_ray.run.location import LFS_POINTER, LFS_POINTER_BYTES, Location
from davir_ray.schema import RejectReason

_SAMPLED_FILES = 8
"""Number of files that are sampled for an estimate, evenly spaced in the sorted list."""
_SAMPLED_BYTES = 4 * 2**20
"""Number of stored bytes of a text file that are read for an estimate."""

_BATCH_ROWS = 256
"""Number of rows of a columnar file that are Python objects at a time; a row may take megabytes."""


_COUNTED_BYTES = 8 * 2**20
"""Number of bytes in which line ends are counted at a time."""

_ARROW_FILE = b"ARROW1"
"""The first bytes of Arrow's file format."""

_MAX_FIELD_CHARACTERS = 2**31 - 1
"""Python's csv refuses fields above 131,072 characters unless told otherwise."""

_SPACE = re.compile(r"[ \t\r\n]*")

_SURROGATE = re.compile("\\\\u[dD][89a-fA-F]|[\ud800-\udfff]")

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")

_JSON = str(pa.json_())


class Record(NamedTuple):
    """A row of the input as plain Python values."""

    source_file: str
    """Relative path of the file."""
    source_row: int
    fields: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Reject:
    """A row of the input that is not a record, or a whole file (empty_file), or the place where its reading stopped."""

    source_file: str
    source_row: int
    reason: RejectReason
    detail: str


class LeftOut(NamedTuple):
    """A row of the input that the data's own marks leave out."""

    source_file: str
    source_row: int


class _Bad(NamedTuple):
    """A Reject whose place is not known yet."""

    reason: RejectReason
    detail: str

    def at(self, file: str, row: int) -> Reject:
        """The reject of a row of a file."""
        return Reject(source_file=file, source_row=row, reason=self.reason, detail=self.detail)


_Row = dict[str, Any] | _Bad | None
"""None: a blank line, which counts in the row index only."""


def read_records(piece: Slice, count: CountBytes = count_nothing) -> Iterator[Record | Reject]:
    """The rows of a slice in order; each row that is not blank is yielded once, as a Record or a Reject.

    The file is streamed, except that a JSON array is kept in memory as text. `count` receives the number of bytes of
    each read from storage, still compressed. If the content is damaged, the rows before the damage are kept,
    and one reject (unreadable_file) names the row at which reading stopped. Raises DataError for a file that no longer
    exists, cannot be opened or was changed after its lines were counted, StorageError if the storage fails.
    """
    file, part = piece.file, piece.byte_range
    block_bytes = None
    if part is not None:
        count, block_bytes = _counted_within(len(part), count), RANGE_BLOCK_BYTES
    row = 0
    try:
        with open_source(file, count, block_bytes) as stream:
            row, values = _rows(stream, piece)
            for value in values:
                if isinstance(value, _Bad):
                    yield value.at(file.relative_path, row)
                elif value is not None:
                    yield Record(file.relative_path, row, value)
                row += 1
        if piece.rows is not None and row != piece.rows.stop:
            raise DataError(
                f"{file.uri} was changed while the run read it: {len(piece.rows)} lines began in its bytes {part}, now "
                f"{row - piece.rows.start} do; start again with files that do not change"
            )
    except CORRUPT as error:
        detail = first_line(error)
        logger.warning("%s: reading stopped at row %d, the rest of the file is lost: %s", file.uri, row, detail)
        yield _Bad(RejectReason.UNREADABLE_FILE, detail).at(file.relative_path, row)


def table_records(table: Any) -> Iterator[Record | Reject]:
    """The rows of an Arrow table in order, each once; `source_file` is empty."""
    for row, value in enumerate(_plain_rows(table.to_batches(_BATCH_ROWS))):
        if isinstance(value, _Bad):
            yield value.at("", row)
        elif value is not None:
            yield Record("", row, value)


def _rows(stream: io.BufferedReader, piece: Slice) -> tuple[int, Iterator[_Row]]:
    """Index of the slice's first row in the file, and its rows."""
    layout, uri = piece.file.layout, piece.file.uri
    if piece.byte_range is not None:
        assert piece.rows is not None, "the lines of a part of a file are counted before they are read"
        return piece.rows.start, _line_rows(_lines_within(stream, piece.byte_range), piece.rows.start)
    if not stream.peek(1):
        return 0, iter([_Bad(RejectReason.EMPTY_FILE, "the file has no bytes")])
    if LFS_POINTER.match(stream.peek(LFS_POINTER_BYTES)):
        raise DataError(f"{uri} is a Git LFS pointer, not data; run git lfs pull where it was cloned")
    if layout == "parquet":
        return _parquet_rows(stream, piece.row_groups)
    if layout == "arrow":
        is_file = stream.peek(len(_ARROW_FILE)).startswith(_ARROW_FILE)
        batches = _batches(pa.ipc.open_file(stream)) if is_file else iter(pa.ipc.open_stream(stream))
        starts = ((batch, range(0, batch.num_rows, _BATCH_ROWS)) for batch in batches)
        return 0, _plain_rows(batch.slice(start, _BATCH_ROWS) for batch, rows in starts for start in rows)
    text = _decompressed(stream, compression(piece.file))
    if not text.peek(1):
        return 0, iter([_Bad(RejectReason.EMPTY_FILE, "the file has no bytes when decompressed")])
    if text.peek(2).startswith(UTF16_MARKS):
        raise DataError(f"{uri} is UTF-16; save it as UTF-8")
    if layout == "json" and begins_array(text.peek(1)):
        return 0, _array_rows(text)
    if layout in ("csv", "tsv"):
        return 0, _csv_rows(text, uri, "," if layout == "csv" else "\t")
    return 0, _line_rows(text)


def _batches(file: Any) -> Iterator[Any]:
    """The batches of Arrow's file format; `datasets` writes its stream format."""
    return (file.get_batch(index) for index in range(file.num_record_batches))


def _csv_rows(stream: io.BufferedReader, uri: str, delimiter: str) -> Iterator[_Row]:
    """The rows after the header, by its names; every value is a string. A blank line counts in the row index only."""
    csv.field_size_limit(_MAX_FIELD_CHARACTERS)
    # Bytes that are not UTF-8 become lone surrogates, so that only their row is rejected.
    text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
    rows = csv.reader(text, delimiter=delimiter, strict=True)
    try:
        header = next(rows, [])
        delimiter.join(header).encode()
    except (csv.Error, UnicodeEncodeError) as error:
        raise DataError(f"the first line of {uri} has no names of columns ({first_line(error)}); correct it") from error
    if twice := [name for name, count in Counter(header).items() if count > 1]:
        raise DataError(f"{uri} has several columns named {twice[0]!r} in its first line; rename all but one")
    while True:
        try:
            values = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield _Bad(RejectReason.BROKEN_ROW, f"{error} (line {rows.line_num})")
            continue
        if not values:
            yield None
        elif len(values) != len(header):
            detail = f"{len(values)} fields (line {rows.line_num}), but the header has {len(header)}"
            yield _Bad(RejectReason.BROKEN_ROW, detail)
        elif _LONE_SURROGATE.search(delimiter.join(values)):
            yield _Bad(RejectReason.INVALID_TEXT, f"line {rows.line_num} is not UTF-8")
        else:
            yield dict(zip(header, values, strict=True))


def _decompressed(stream: io.BufferedReader, kind: str | None) -> io.BufferedReader:
    if kind is None:
        return stream
    # Arrow's decompressor, because zstandard's accepts a truncated file as complete.
    return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(stream, "r"), kind), BUFFER_BYTES)


def _counted_within(num_bytes: int, count: CountBytes) -> CountBytes:
    """Counts this many bytes at most: those that are read beyond a part of a file are counted with the next part."""
    left = num_bytes

    def count_rest(num_read: int) -> None:
        nonlocal left
        num_read = min(num_read, left)
        left -= num_read
        count(num_read)

    return count_rest


def _lines_within(stream: io.BufferedReader, part: range) -> Iterator[bytes]:
    """The lines that begin in a range of bytes; the last of them may end after it."""
    at = part.start
    if at > 0:
        stream.seek(at - 1)
        at += len(stream.readline(len(part) + 1)) - 1
    while at < part.stop and (line := stream.readline()):
        yield line
        at += len(line)


def count_lines(piece: Slice) -> int:
    """Number of lines that begin in the byte range of a slice: one after each line end, one at the file's beginning."""
    part = piece.byte_range
    assert part is not None
    at, stop = max(part.start - 1, 0), part.stop - 1
    num_lines = int(part.start == 0)
    with open_source(piece.file, block_bytes=RANGE_BLOCK_BYTES) as stream:
        stream.seek(at)
        while content := stream.read(min(_COUNTED_BYTES, stop - at)):
            num_lines += content.count(b"\n")
            at += len(content)
    return num_lines


def _line_rows(lines: Iterable[bytes], first_row: int = 0) -> Iterator[_Row]:
    for row, line in enumerate(lines, first_row):
        yield _parse_line(line.removeprefix(codecs.BOM_UTF8) if row == 0 else line)


def _parse_line(line: bytes) -> _Row:
    if not line.strip():
        return None
    try:
        text = line.decode()
        return _checked(json.loads(text), text)
    except UnicodeDecodeError as error:
        return _Bad(RejectReason.INVALID_TEXT, str(error)[:300])
    except (ValueError, RecursionError) as error:  # ValueError: also a number of more digits than Python converts
        return _Bad(RejectReason.BROKEN_JSON, str(error)[:300])


def _array_rows(stream: io.BufferedReader) -> Iterator[_Row]:
    """The elements of a JSON array, up to the first broken one: nothing after it can be trusted."""
    # Bytes that are not UTF-8 become lone surrogates, so that only their element is rejected.
    text = stream.read().removeprefix(codecs.BOM_UTF8).decode(errors="surrogateescape")
    decoder = json.JSONDecoder()
    at = _skip_space(text, _skip_space(text, 0) + 1)
    follower = ","
    if text.startswith("]", at):
        follower, at = "]", _skip_space(text, at + 1)
    while follower == ",":
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            yield _Bad(RejectReason.BROKEN_JSON, f"{str(error)[:300]}; the rest of the array is lost")
            return
        yield _checked(value, text[at:end])
        at = _skip_space(text, end)
        follower, at = text[at : at + 1], _skip_space(text, at + 1)
    if follower != "]" or at < len(text):
        need = "nothing after" if follower == "]" else "',' or ']' before"
        yield _Bad(RejectReason.BROKEN_JSON, f"expected {need} character {at}; the rest of the file is lost")


def _skip_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at


def _check_text(value: Any, text: str) -> None:
    """Raise UnicodeEncodeError if a value has a lone surrogate; `text` is the JSON that it was parsed from."""
    if _SURROGATE.search(text):
        json.dumps(value, ensure_ascii=False).encode()


def _checked(value: Any, text: str) -> dict[str, Any] | _Bad:
    """The parsed value, if it is an object and its text is valid."""
    try:
        _check_text(value, text)
    except UnicodeEncodeError as error:
        return _Bad(RejectReason.INVALID_TEXT, str(error)[:300])
    if not isinstance(value, dict):
        return _Bad(RejectReason.NOT_AN_OBJECT, f"a {type(value).__name__}; expected an object with named fields")
    return value


def _parquet_rows(stream: io.BufferedReader, row_groups: range | None) -> tuple[int, Iterator[_Row]]:
    parquet = pq.ParquetFile(stream)
    footer = parquet.metadata
    groups = range(footer.num_row_groups) if row_groups is None else row_groups
    first = sum(footer.row_group(index).num_rows for index in range(groups.start))
    # One row group at a time: a batch over two of them would be lost whole if the second is damaged.
    return first, _plain_rows(
        batch for index in groups for batch in parquet.iter_batches(_BATCH_ROWS, row_groups=[index])
    )


def _plain_rows(batches: Iterable[Any]) -> Iterator[_Row]:
    """The rows of Arrow batches as Python values; a value that Python cannot express affects only its row."""
    for batch in batches:
        json_fields = [field for field in batch.schema if _JSON in str(field.type)]
        try:
            rows: list[_Row] = batch.to_pylist()
            if json_fields:
                rows = [_with_json(row, json_fields) for row in rows]
        except (ValueError, OverflowError, RecursionError):
            rows = [_plain_row(batch.slice(index, 1), json_fields) for index in range(batch.num_rows)]
        yield from rows


def _plain_row(batch: Any, json_fields: list[pa.Field]) -> _Row:
    reason = RejectReason.WRONG_TYPE  # a date that Python cannot express
    try:
        (row,) = batch.to_pylist()
        reason = RejectReason.BROKEN_JSON
        return _with_json(row, json_fields)
    except UnicodeError as error:
        return _Bad(RejectReason.INVALID_TEXT, str(error)[:300])
    except (ValueError, OverflowError, RecursionError) as error:
        return _Bad(reason, str(error)[:300])


def _with_json(row: Any, fields: Iterable[pa.Field]) -> dict[str, Any]:
    """A row, or a struct in it, with the values of these fields decoded where their Arrow type is JSON."""
    return {**row, **{field.name: _decoded(row[field.name], field.type) for field in fields}}


def _decoded(value: Any, kind: pa.DataType) -> Any:
    """A value of an Arrow type, its JSON decoded: `datasets` (5) stores values of mixed types as JSON."""
    if value is not None and isinstance(kind, pa.JsonType):
        found = json.loads(value)
        _check_text(found, value)
        return found
    if value is None or isinstance(kind, pa.BaseExtensionType):
        return value
    if isinstance(kind, pa.StructType):
        return _with_json(value, kind)
    if isinstance(kind, pa.MapType):
        return [(_decoded(key, kind.key_type), _decoded(item, kind.item_type)) for key, item in value]
    return [_decoded(item, kind.value_type) for item in value] if isinstance(value, list) else value


def estimate_rows(files: Sequence[SourceFile]) -> int:
    """Estimated number of rows in the files: exact for a few small or Parquet files, else in proportion to bytes."""
    count = min(_SAMPLED_FILES, len(files))
    sample = [_rows_and_bytes(files[number * len(files) // count]) for number in range(count)]
    rows, num_bytes = sum(rows for rows, _ in sample), sum(read for _, read in sample)
    return round(rows * sum(file.num_bytes for file in files) / num_bytes) if num_bytes else 0


def _rows_and_bytes(file: SourceFile) -> tuple[int, int]:
    """Numbers of rows and bytes in the first part of a file; for Parquet, in the whole file, by its footer."""
    if file.layout == "parquet":
        try:
            return parquet_rows(Location.of(file.uri)), file.num_bytes
        except IntegrityError:  # a run counts the file as one reject
            return 1, file.num_bytes
    rows, read = 0, 0

    def count(num_bytes: int) -> None:
        nonlocal read
        read += num_bytes

    for _ in read_records(Slice(file), count):
        rows += 1
        if read >= _SAMPLED_BYTES and file.layout != "json":  # a JSON array is read whole before its first element
            break
    return rows, min(read, file.num_bytes)
