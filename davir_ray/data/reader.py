"""Records → rows of examples/: rendered, encoded and given their ids, or rejected with a reason."""

import base64
import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from datetime import date, time
from functools import partial
from itertools import islice
from typing import Any

import numpy as np

from davir_ray.config.prepare import PrepareConfig
from davir_ray.config.sources import Source
from davir_ray.data.chat import ChatTemplate
from davir_ray.data.conversation import is_filled
from davir_ray.data.evaluation import EvaluationWords
from davir_ray.data.files import Slice
from davir_ray.data.formats import columns, render, render_prompt
from davir_ray.data.own_text import texts_of
from davir_ray.data.records import LeftOut, Record, Reject, read_records
from davir_ray.data.rendered import LeftOutError, Rendered, RowError
from davir_ray.data.roles import tokens_by_role
from davir_ray.data.task_report import SHOWN_EXAMPLES, TaskReport
from davir_ray.data.tokens import Encoded, Encoder, decoded_segments
from davir_ray.schema import RejectReason, Role
from davir_ray.text import shorten_middle

ExampleRow = dict[str, Any]
"""One row of examples/, by column name."""

ExampleRows = tuple[ExampleRow, ...]
"""The rows that one record becomes: one, or the chosen and then the rejected one of a preference pair."""

BATCH_ROWS = 512

_SAMPLED_EXAMPLES = 100
"""Number of examples of a task whose tokens are counted by role: each is encoded once more for it."""

_MAX_COLUMNS = 200
"""Number of columns that are counted; keys that are data themselves would be as many as the rows."""

_PIECE_CHARACTERS = 1000
"""Maximum length of a piece of an example that is shown: a manifest holds a few examples."""

NOT_FINITE, BYTES = "not_finite_to_null", "bytes_to_base64"
"""Names under which values are counted that `record` cannot keep: JSON has no NaN, no infinity and no bytes."""


def stable_id(*parts: str | int) -> int:
    """First 63 bits of SHA-256 of the parts as a JSON array."""
    content = json.dumps(parts, ensure_ascii=False).encode()
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big") >> 1


class ExampleReader:
    """Turns records of every format into rows of examples/, or rejects with a reason."""

    def __init__(
        self,
        encoder: Encoder,
        chat: ChatTemplate | None,
        *,
        keep_record: bool,
        prompts_only: bool = False,
        options: PrepareConfig | None = None,
        evaluation: EvaluationWords | None = None,
    ) -> None:
        """With `prompts_only` the records have no response, and the examples have none either.

        A record that shares words in a row with the evaluation sets is a reject.
        """
        self._encoder = encoder
        self._render = render_prompt if prompts_only else render
        self._chat = chat
        self._keep_record = keep_record
        self._options = options or PrepareConfig()
        self._evaluation = evaluation
        self.report = TaskReport()
        """What is counted on the way; a task sets its own."""

    def read(
        self, source: Source, slices: Iterable[Slice], limit: int | None
    ) -> Iterator[ExampleRows | Reject | LeftOut]:
        """Every record of the slices, at most `limit`, exactly once and in order."""
        yield from self.convert(source, (item for part in slices for item in read_records(part, self._count)), limit)

    def _count(self, num_bytes: int) -> None:
        self.report.num_bytes += num_bytes

    def convert(
        self, source: Source, items: Iterable[Record | Reject], limit: int | None = None
    ) -> Iterator[ExampleRows | Reject | LeftOut]:
        """Every record, at most `limit`, exactly once and in order."""
        records = islice(items, limit)
        while batch := list(islice(records, BATCH_ROWS)):  # a tokenizer encodes many texts faster than one at a time
            rendered = [item if isinstance(item, Reject) else self._rendered(item, source) for item in batch]
            if self._evaluation is not None:
                rendered = self._decontaminated(self._evaluation, source, batch, rendered)
            texts = [text for found in rendered if not isinstance(found, Reject | LeftOut) for text in found]
            encoded = iter(self._encoder.encode(texts))
            for record, found in zip(batch, rendered, strict=True):
                if isinstance(record, Reject):
                    yield record
                elif isinstance(found, Reject | LeftOut):
                    yield found
                else:
                    rows = self._rows(source, record, found, [next(encoded) for _ in found])
                    if not isinstance(rows, Reject) and self.report.num_sampled < _SAMPLED_EXAMPLES:
                        self._sample(found, rows)
                    yield rows

    def _rendered(self, record: Record, source: Source) -> tuple[Rendered, ...] | Reject | LeftOut:
        self._count_columns(record.fields)
        try:
            return self._render(record.fields, source, self._chat, self._options)
        except RowError as error:
            return _reject(record, error.reason, error.detail)
        except LeftOutError:
            return LeftOut(record.source_file, record.source_row)

    def _decontaminated(
        self,
        evaluation: EvaluationWords,
        source: Source,
        batch: Sequence[Record | Reject],
        rendered: Sequence[tuple[Rendered, ...] | Reject | LeftOut],
    ) -> list[tuple[Rendered, ...] | Reject | LeftOut]:
        """The rendered records, with a reject for each that shares words in a row with an evaluation set."""
        read = columns(source).keys() - set(source.ignore_columns)
        texts: list[list[str]] = [
            [text for name, value in record.fields.items() if name in read for text in texts_of(value)]
            if isinstance(record, Record) and isinstance(found, tuple)
            else []
            for record, found in zip(batch, rendered, strict=True)
        ]
        result = list(rendered)
        for index, match in evaluation.find(texts).items():
            place = batch[index]
            self.report.in_evaluation_sets.update(match.sets)
            result[index] = Reject(
                source_file=place.source_file,
                source_row=place.source_row,
                reason=RejectReason.IN_EVALUATION_SET,
                detail=match.detail,
            )
        return result

    def _rows(
        self, source: Source, record: Record, rendered: Sequence[Rendered], results: Sequence[Encoded | RowError]
    ) -> ExampleRows | Reject:
        """The rows of a record. An id depends on where the record is, so it survives re-sharding and a new template."""
        for result in results:
            if isinstance(result, RowError):
                return _reject(record, result.reason, result.detail)
        encoded = [result for result in results if isinstance(result, Encoded)]
        place = (source.name, record.source_file, record.source_row)
        if len(encoded) == 2 and np.array_equal(encoded[0].input_ids, encoded[1].input_ids):
            detail = f"both responses are the same within the limit of {len(encoded[0].input_ids)} tokens"
            return _reject(record, RejectReason.EQUAL_RESPONSES, detail)
        self.report.num_turns_left_out += sum(one.num_turns_left_out for one in rendered)
        text = record_text(record, self.report.replaced) if self._keep_record else None
        rows: list[ExampleRow] = [
            {
                "example_id": stable_id(*place),
                "content_hash": stable_id(one.prompt, one.response),
                "source": source.name,
                "source_file": record.source_file,
                "source_row": record.source_row,
                "prompt": one.prompt,
                "response": one.response,
                "record": text,
                "input_ids": tokens.input_ids,
                "response_spans": tokens.response_spans,
                "num_prompt_tokens": tokens.num_prompt_tokens,
                "num_response_tokens": tokens.num_response_tokens,
                "truncated": tokens.truncated,
            }
            for one, tokens in zip(rendered, encoded, strict=True)
        ]
        if (column := self._options.fold_by) is not None:
            key = _fold_key(column, record.fields.get(column))
            rows = [{**row, "fold_key": key} for row in rows]
        if len(rows) == 2:
            for row, role in zip(rows, Role, strict=True):
                row |= {
                    "example_id": stable_id(*place, role.value),
                    "record": text if role is Role.CHOSEN else None,  # one copy is enough for both rows
                    "pair_id": stable_id(*place),
                    "prompt_hash": stable_id(row["prompt"]),
                    "role": role.value,
                }
        return tuple(rows)

    def _count_columns(self, fields: dict[str, Any]) -> None:
        columns = self.report.columns
        for name, value in fields.items():
            if is_filled(value) and (name in columns or len(columns) < _MAX_COLUMNS):
                columns[name] += 1

    def _sample(self, rendered: Sequence[Rendered], rows: ExampleRows) -> None:
        """Count the tokens of a record's examples by role, and keep some examples to be shown."""
        report, tokenizer = self.report, self._encoder.tokenizer
        for one, row in zip(rendered, rows, strict=True):
            report.num_sampled += 1
            report.role_tokens += tokens_by_role(tokenizer, one, len(row["input_ids"]))
            if len(report.shown) < SHOWN_EXAMPLES:
                segments = decoded_segments(tokenizer, row["input_ids"], row["response_spans"])
                pieces = [[shorten_middle(text, _PIECE_CHARACTERS), scored] for text, scored in segments]
                place = {name: row[name] for name in ("source_file", "source_row", "truncated")}
                report.shown.append({**place, "pieces": pieces})


def record_text(record: Record, replaced: Counter[str]) -> str:
    """The source row as strictly valid JSON.

    A number that is not finite becomes null and bytes become base64 text, both counted in `replaced`; dates and times
    become ISO 8601, and any other value that JSON cannot express becomes its string.
    """
    found: Counter[str] = Counter()

    def as_json(value: Any) -> str:
        if isinstance(value, bytes):
            found[BYTES] += 1
            return base64.b64encode(value).decode()
        return value.isoformat() if isinstance(value, date | time) else str(value)

    def null(constant: str) -> None:
        found[NOT_FINITE] += 1

    write = partial(json.dumps, ensure_ascii=False, default=as_json)
    try:
        text = write(record.fields, allow_nan=False)
    except ValueError:  # a number that is not finite; reading back Python's own text finds it at any depth
        found.clear()
        text = write(json.loads(write(record.fields), parse_constant=null))
    replaced.update(found)
    return text


def _reject(record: Record, reason: RejectReason, detail: str) -> Reject:
    return Reject(source_file=record.source_file, source_row=record.source_row, reason=reason, detail=detail)


def _fold_key(column: str, value: Any) -> int | None:
    """The hash of a value of prepare.fold_by, whatever the file's layout makes of it; None if there is no value.

    7, 7.0 and "7" are one value: a column of integers is one of floats where a file lacks some, and of text in CSV.
    """
    if isinstance(value, float):
        value = None if math.isnan(value) else int(value) if value.is_integer() else value
    if not is_filled(value):
        return None
    return stable_id(column, value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str))
