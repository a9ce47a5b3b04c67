"""Records → examples: read, rendered and encoded, then cut into shards and written; rejects beside them."""

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import date, time
from functools import partial
from itertools import islice
from typing import Any, Self, TypeVar

import pyarrow as pa

from davir_ray.config.sources import Source
from davir_ray.data.files import Record, Reject, Slice, read_records
from davir_ray.data.formats import ChatTemplate, Rendered, RowError, render, render_prompt
from davir_ray.data.tokens import Encoded, Encoder
from davir_ray.errors import DataError
from davir_ray.run.location import FileEntry, Location, write_parquet
from davir_ray.schema import EXAMPLES, REJECTS

T = TypeVar("T")

ExampleRow = dict[str, Any]
"""One row of examples/, by column name."""

Pair = tuple[ExampleRow, ExampleRow]
"""Of a preference record: the chosen response, then the rejected one."""

BATCH_ROWS = 512
_SHARD_TOKENS = 4 * 2**20
_SHARD_CHARACTERS = 256 * 2**20

_REJECT_ROWS = 20_000
_TELLING_BYTES = 16 * 2**20
"""Less says little about the rest: buffers run ahead of the rows by up to a megabyte."""

NOT_FINITE, BYTES = "not_finite_to_null", "bytes_to_base64"
"""Counts of values that `record` holds otherwise than the source: JSON has no NaN, no infinity and no bytes."""

COUNTED = ("num_prompt_tokens", "num_response_tokens", "truncated")
"""Columns whose sums a report carries."""


def stable_id(*parts: str | int) -> int:
    """First 63 bits of SHA-256 of the parts as a JSON array."""
    content = json.dumps(parts, ensure_ascii=False).encode()
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big") >> 1


class ExampleReader:
    """Turns records into rows of examples/, or rejects that say why not."""

    def __init__(
        self, encoder: Encoder, chat: ChatTemplate | None, *, keep_record: bool, prompts_only: bool = False
    ) -> None:
        """`prompts_only`: the records have no response, and the examples none either."""
        self._encoder = encoder
        self._rendered = render_prompt if prompts_only else render
        self._chat = chat
        self._keep_record = keep_record
        self.bytes_read = 0
        """Of the sources, as they are stored."""
        self.replaced: Counter[str] = Counter()
        """Values of the records that were replaced in their JSON: NOT_FINITE and BYTES."""

    def read(self, source: Source, slices: Iterable[Slice], limit: int | None) -> Iterator[ExampleRow | Reject]:
        """Every row of the slices, at most `limit`, exactly once: an example or a reject."""
        yield from self.convert(source, (item for part in slices for item in read_records(part, self._count)), limit)

    def convert(
        self, source: Source, items: Iterable[Record | Reject], limit: int | None = None
    ) -> Iterator[ExampleRow | Reject]:
        """Every record, at most `limit`, exactly once and in order: an example or a reject."""
        for batch in rendered_in_batches(islice(items, limit), partial(self._render, source=source)):
            yield from self._encode(source, batch)

    def _count(self, num_bytes: int) -> None:
        self.bytes_read += num_bytes

    def _render(self, record: Record, source: Source) -> Rendered:
        return self._rendered(record.fields, source, self._chat)

    def _encode(
        self, source: Source, batch: list[tuple[Record | Reject, Rendered | Reject]]
    ) -> Iterator[ExampleRow | Reject]:
        rendered = [text for _, text in batch if isinstance(text, Rendered)]
        encoded = iter(self._encoder.encode(rendered, templated=source.format == "messages"))
        for record, text in batch:
            if isinstance(record, Reject):
                yield record
                continue
            if isinstance(text, Reject):
                yield text
                continue
            result = next(encoded)
            if isinstance(result, RowError):
                yield as_reject(record, result)
            else:
                kept = record_text(record, self.replaced) if self._keep_record else None
                yield row_of(source, record, text, result, kept)


def rendered_in_batches(
    items: Iterable[Record | Reject], render_record: Callable[[Record], T]
) -> Iterator[list[tuple[Record | Reject, T | Reject]]]:
    """Records with what is rendered of them, or the reject that says why not, so many at a time as encode well."""
    records = iter(items)
    while batch := list(islice(records, BATCH_ROWS)):
        yield [(item, _rendered(item, render_record)) for item in batch]


def _rendered(item: Record | Reject, render_record: Callable[[Record], T]) -> T | Reject:
    if isinstance(item, Reject):
        return item
    try:
        return render_record(item)
    except RowError as error:
        return as_reject(item, error)


def rows_of_item(item: ExampleRow | Pair) -> tuple[ExampleRow, ...]:
    """The rows of examples/ that a record became: one, or the two of a pair."""
    return item if isinstance(item, tuple) else (item,)


def row_of(source: Source, record: Record, rendered: Rendered, encoded: Encoded, text: str | None) -> ExampleRow:
    """A row of examples/; `text` is the record as JSON. The id says where the row stands, so it survives re-sharding
    and a change of template.
    """
    return {
        "example_id": stable_id(source.name, record.source_file, record.source_row),
        "content_hash": stable_id(rendered.prompt, rendered.response),
        "source": source.name,
        "source_file": record.source_file,
        "source_row": record.source_row,
        "prompt": rendered.prompt,
        "response": rendered.response,
        "record": text,
        "input_ids": encoded.input_ids,
        "response_spans": encoded.response_spans,
        "num_prompt_tokens": encoded.num_prompt_tokens,
        "num_response_tokens": encoded.num_response_tokens,
        "truncated": encoded.truncated,
    }


def record_text(record: Record, replaced: Counter[str]) -> str:
    """The source row as JSON, for readers that are strict.

    A number that is not finite becomes null and bytes become base64 text, both counted in `replaced`; dates and times
    become ISO 8601, and anything else that JSON lacks becomes its text.
    """
    found: Counter[str] = Counter()

    def plain(value: Any) -> str:
        if isinstance(value, bytes):
            found[BYTES] += 1
            return base64.b64encode(value).decode()
        return value.isoformat() if isinstance(value, date | time) else str(value)

    def null(constant: str) -> None:
        found[NOT_FINITE] += 1

    write = partial(json.dumps, ensure_ascii=False, default=plain)
    try:
        text = write(record.fields, allow_nan=False)
    except ValueError:  # of a number that is not finite; the text that is not JSON is where it is easily found
        found.clear()
        text = write(json.loads(write(record.fields), parse_constant=null))
    replaced.update(found)
    return text


def as_reject(record: Record, error: RowError) -> Reject:
    """The record as a reject, for the reason of the error."""
    return Reject(record.source_file, record.source_row, error.reason, error.detail)


@dataclass(kw_only=True)
class TaskReport:
    """What one task read and wrote; adds up over tasks."""

    num_read: int = 0
    num_bytes: int = 0
    """Of the sources, read so far, as they are stored."""
    files: list[FileEntry] = field(default_factory=list)
    """Names begin with their folder: examples/ or rejects/."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Rejected rows by reason."""
    sums: Counter[str] = field(default_factory=Counter)
    """Sums of the COUNTED columns."""
    replaced: Counter[str] = field(default_factory=Counter)
    """Values of the records that were replaced in their JSON: NOT_FINITE and BYTES."""
    first_reject: str | None = None

    def __iadd__(self, other: "TaskReport") -> Self:
        self.num_read += other.num_read
        self.num_bytes += other.num_bytes
        self.files += other.files
        self.reasons.update(other.reasons)
        self.sums.update(other.sums)
        self.replaced.update(other.replaced)
        self.first_reject = self.first_reject or other.first_reject
        return self

    def to_json(self) -> str:
        """Text that travels through Ray as one value."""
        return json.dumps(vars(self) | {"files": [asdict(entry) for entry in self.files]})

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The report that `to_json` wrote."""
        values = json.loads(text)
        files = [FileEntry(**entry) for entry in values["files"]]
        counters = {name: Counter(values[name]) for name in ("reasons", "sums", "replaced")}
        return cls(**{**values, **counters, "files": files})

    def check_rejects(self, max_bad_fraction: float, total_bytes: int | None = None) -> None:
        """Raise DataError with the reasons counted if too many rows are bad.

        With the bytes of all sources given, reading is not over: then only if they would be too many even with twice as
        many rows as the bytes read so far promise.
        """
        most = max_bad_fraction * self.num_read
        if total_bytes is not None:
            if self.num_bytes < _TELLING_BYTES:
                return
            most *= 2 * total_bytes / self.num_bytes
        if self.reasons.total() <= most:
            return
        so_far = "" if total_bytes is None else f"the first {self.num_bytes / total_bytes:.0%} of the data, "
        raise DataError(
            f"{self.reasons.total()} of {self.num_read} rows are bad ({so_far}{self.told_reasons}), more than "
            f"--max_bad_fraction {max_bad_fraction:g}; the first: {self.first_reject}. "
            "Mend the data (rejects/ names every row) or raise the fraction"
        )

    @property
    def told_reasons(self) -> str:
        """Reasons of rejects with their counts, for a message."""
        return ", ".join(f"{reason} {count}" for reason, count in sorted(self.reasons.items()))


class ShardWriter:
    """Writes the rows of one task as shards named by task and index, so that no shard depends on the worker count."""

    def __init__(self, run: Location, task: int, source: str, shard_rows: int, schema: pa.Schema = EXAMPLES) -> None:
        self.report = TaskReport()
        self._schema = schema
        self._run = run
        self._task = f"part-{task:05d}"
        self._source = source
        self._shard_rows = shard_rows
        self._rows: list[ExampleRow] = []
        self._rejects: list[dict[str, Any]] = []
        self._num_shards = self._num_reject_files = self._tokens = self._characters = 0

    def write(self, item: ExampleRow | Pair | Reject) -> None:
        """Add what one row of the input has become; writes a shard when it is full."""
        self.report.num_read += 1
        if isinstance(item, Reject):
            self._reject(item)
            return
        rows = rows_of_item(item)
        for row in rows:
            self._add(row)
        self._write_full_shard()

    def finish(self) -> TaskReport:
        """Write what is left."""
        if self._rows:
            self._write_shard()
        if self._rejects:
            self._write_rejects()
        return self.report

    def _add(self, row: ExampleRow) -> None:
        self._rows.append(row)
        self._tokens += len(row["input_ids"])
        self._characters += len(row["prompt"]) + len(row["response"]) + len(row["record"] or "")

    def _write_full_shard(self) -> None:
        full = len(self._rows) >= self._shard_rows or self._tokens >= _SHARD_TOKENS
        if full or self._characters >= _SHARD_CHARACTERS:
            self._write_shard()

    def _reject(self, reject: Reject) -> None:
        row = {"source": self._source, **reject._asdict(), "reason": str(reject.reason)}
        self._rejects.append(row)
        if len(self._rejects) >= _REJECT_ROWS:
            self._write_rejects()
        self.report.reasons[row["reason"]] += 1
        if self.report.first_reject is None:
            told = f"{reject.source_file} row {reject.source_row}: {reject.reason} ({reject.detail[:200]})"
            self.report.first_reject = " ".join(told.split())  # one line, whatever the data hold

    def _write_shard(self) -> None:
        table = pa.Table.from_pylist(self._rows, self._schema)
        self._write(f"examples/{self._task}-{self._num_shards:05d}.parquet", table)
        for column in COUNTED:
            self.report.sums[column] += sum(row[column] for row in self._rows)
        self._num_shards += 1
        self._rows, self._tokens, self._characters = [], 0, 0

    def _write_rejects(self) -> None:
        name = f"rejects/{self._task}-{self._num_reject_files:05d}.parquet"
        self._write(name, pa.Table.from_pylist(self._rejects, REJECTS))
        self._num_reject_files += 1
        self._rejects = []

    def _write(self, name: str, table: pa.Table) -> None:
        entry = write_parquet(self._run / name, table)
        self.report.files.append(FileEntry(name, entry.rows, entry.bytes, entry.sha256))
