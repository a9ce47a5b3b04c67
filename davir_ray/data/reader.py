"""Records → examples: read, rendered and encoded, then cut into shards and written; rejects beside them."""

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from datetime import date, time
from functools import partial
from itertools import islice
from typing import Any, TypeVar

from davir_ray.config.sources import Source
from davir_ray.data.chat import ChatTemplate
from davir_ray.data.files import Slice
from davir_ray.data.formats import render, render_prompt
from davir_ray.data.records import Record, Reject, read_records
from davir_ray.data.rendered import Rendered, RowError
from davir_ray.data.tokens import Encoded, Encoder

T = TypeVar("T")

ExampleRow = dict[str, Any]
"""One row of examples/, by column name."""

Pair = tuple[ExampleRow, ExampleRow]
"""Of a preference record: the chosen response, then the rejected one."""

BATCH_ROWS = 512

NOT_FINITE, BYTES = "not_finite_to_null", "bytes_to_base64"
"""Counts of values that `record` holds otherwise than the source: JSON has no NaN, no infinity and no bytes."""


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
