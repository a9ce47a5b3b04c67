"""The shards of examples and rejects that a task writes, and the report of the task."""

import json
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

import pyarrow as pa

from davir_ray.data.reader import ExampleRow, ExampleRows
from davir_ray.data.records import LeftOut, Reject
from davir_ray.errors import DataError
from davir_ray.run.files import FileEntry, write_parquet
from davir_ray.run.location import Location
from davir_ray.schema import EXAMPLES, REJECTS

_SHARD_TOKENS = 4 * 2**20

_SHARD_CHARACTERS = 256 * 2**20

_REJECT_ROWS = 20_000

_MIN_BYTES = 16 * 2**20
"""Fewer bytes say little about the rest of the data: buffers are ahead of the rows by up to a megabyte."""

COUNTED = ("num_prompt_tokens", "num_response_tokens", "truncated")
"""Columns whose sums a report contains."""


@dataclass(kw_only=True)
class TaskReport:
    """What one task read and wrote; reports of several tasks can be added."""

    num_read: int = 0
    num_left_out: int = 0
    """Number of rows that the data's own marks leave out."""
    num_turns_left_out: int = 0
    """Number of the assistant's turns in the examples that are not scored because of marks or prepare.score_turns."""
    num_bytes: int = 0
    """Number of bytes read from the sources so far, as stored."""
    files: list[FileEntry] = field(default_factory=list)
    """Files written; each name begins with its folder, examples/ or rejects/."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Number of rejected rows by reason."""
    sums: Counter[str] = field(default_factory=Counter)
    """Sums of the COUNTED columns."""
    replaced: Counter[str] = field(default_factory=Counter)
    """Number of values that were replaced in the JSON of the records: NOT_FINITE and BYTES."""
    first_reject: str | None = None

    def __iadd__(self, other: "TaskReport") -> Self:
        self.num_read += other.num_read
        self.num_left_out += other.num_left_out
        self.num_turns_left_out += other.num_turns_left_out
        self.num_bytes += other.num_bytes
        self.files += other.files
        self.reasons.update(other.reasons)
        self.sums.update(other.sums)
        self.replaced.update(other.replaced)
        self.first_reject = self.first_reject or other.first_reject
        return self

    def to_json(self) -> str:
        """The report as text, which passes through Ray as one value."""
        return json.dumps(vars(self) | {"files": [asdict(entry) for entry in self.files]})

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The report that `to_json` wrote."""
        values = json.loads(text)
        files = [FileEntry(**entry) for entry in values["files"]]
        counters = {name: Counter(values[name]) for name in ("reasons", "sums", "replaced")}
        return cls(**{**values, **counters, "files": files})

    def check_rejects(self, max_bad_fraction: float, total_bytes: int | None = None) -> None:
        """Raise DataError with a count of the reasons if too many rows are bad.

        While reading is in progress, `total_bytes` is the size of all sources. The error is then raised only if the bad
        rows exceed the allowed share of twice the total number of rows estimated from the bytes read so far.
        """
        allowed = max_bad_fraction * self.num_read
        if total_bytes is not None:
            if self.num_bytes < _MIN_BYTES:
                return
            allowed *= 2 * total_bytes / self.num_bytes
        if self.reasons.total() <= allowed:
            return
        so_far = "" if total_bytes is None else f"the first {self.num_bytes / total_bytes:.0%} of the data, "
        raise DataError(
            f"{self.reasons.total()} of {self.num_read} rows are bad ({so_far}{self.reason_counts}), more than "
            f"--max_bad_fraction {max_bad_fraction:g}; the first: {self.first_reject}. "
            "Correct the data (rejects/ has every bad row) or raise the fraction"
        )

    @property
    def reason_counts(self) -> str:
        """The reasons of rejects with their counts, as text."""
        return ", ".join(f"{reason} {count}" for reason, count in sorted(self.reasons.items()))


class ShardWriter:
    """Writes the rows of one task as shards named by task and index, so no shard depends on the number of workers."""

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

    def write(self, item: ExampleRows | Reject | LeftOut) -> None:
        """Add the result of one row of the input; write a shard when it is full."""
        self.report.num_read += 1
        if isinstance(item, Reject):
            self._reject(item)
            return
        if isinstance(item, LeftOut):
            self.report.num_left_out += 1
            return
        for row in item:
            self._rows.append(row)
            self._tokens += len(row["input_ids"])
            self._characters += len(row["prompt"]) + len(row["response"]) + len(row["record"] or "")
        full = len(self._rows) >= self._shard_rows or self._tokens >= _SHARD_TOKENS
        if full or self._characters >= _SHARD_CHARACTERS:
            self._write_shard()

    def finish(self) -> TaskReport:
        """Write the last shards; returns the report."""
        if self._rows:
            self._write_shard()
        if self._rejects:
            self._write_rejects()
        return self.report

    def _reject(self, reject: Reject) -> None:
        row = {"source": self._source, **vars(reject), "reason": str(reject.reason)}
        self._rejects.append(row)
        if len(self._rejects) >= _REJECT_ROWS:
            self._write_rejects()
        self.report.reasons[row["reason"]] += 1
        if self.report.first_reject is None:
            first = f"{reject.source_file} row {reject.source_row}: {reject.reason} ({reject.detail[:200]})"
            self.report.first_reject = " ".join(first.split())  # one line, whatever the data contain

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
        self.report.files.append(replace(write_parquet(self._run / name, table), name=name))
