"""The shards of examples and rejects that a task writes."""

from dataclasses import replace
from typing import Any

import pyarrow as pa

from davir_ray.data.reader import ExampleRow, ExampleRows
from davir_ray.data.records import LeftOut, Reject
from davir_ray.data.task_report import COUNTED, TaskReport
from davir_ray.run.files import write_parquet
from davir_ray.run.location import Location
from davir_ray.schema import EXAMPLES, REJECTS, RejectReason

SHARD_ROWS = 4096
"""Maximum number of rows in a shard unless settings say otherwise."""

_SHARDS_OF_A_CORPUS = 64
"""On eight GPUs eight shards each: at the end, seven wait for the last for a sixteenth of the time on average."""

_MIN_SHARD_TOKENS, _MAX_SHARD_TOKENS = 2**16, 2**22

BYTES_PER_TOKEN = 4
"""A guess at the bytes of a token in a source file."""

_SHARD_CHARACTERS = 64 * 2**20
"""A shard with more is full: every task that reads it holds it a few times."""

_MANY_ROWS, _MUCH_TEXT = 1000, 32 * 2**20
"""Rows or bytes of a shard whose mean says something about the corpus."""

_TEXT_COLUMNS = ("prompt", "response", "record")

_REJECT_ROWS = 20_000


def shard_tokens(total_bytes: int) -> int:
    """The number of tokens after which a shard of a corpus is full: a 64th of all, within bounds.

    The tokens are not known before they are counted, so a guess from the bytes on disk, which is low for compressed
    files: their shards are smaller.
    """
    share = total_bytes // BYTES_PER_TOKEN // _SHARDS_OF_A_CORPUS
    return min(max(share, _MIN_SHARD_TOKENS), _MAX_SHARD_TOKENS)


class ShardWriter:
    """Writes the rows of one task as shards named by task and index, so no shard depends on the number of workers."""

    def __init__(
        self,
        run: Location,
        task: int,
        source: str,
        shard_rows: int,
        schema: pa.Schema = EXAMPLES,
        *,
        shard_tokens: int = _MAX_SHARD_TOKENS,
        folder: str = "examples",
        report: TaskReport | None = None,
    ) -> None:
        """Write below the folder of a run, the shards in its `folder`; rows and files are counted in the report."""
        self.report = report or TaskReport()
        self._schema = schema
        self._run = run
        self._folder, self._task = folder, f"part-{task:05d}"
        self._source = source
        self._shard_rows, self._shard_tokens = shard_rows, shard_tokens
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
            self._characters += sum(len(row[column] or "") for column in _TEXT_COLUMNS)
        full = len(self._rows) >= self._shard_rows or self._tokens >= self._shard_tokens
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
        if self.report.first_reject is None and reject.reason != RejectReason.IN_EVALUATION_SET:
            first = f"{reject.source_file} row {reject.source_row}: {reject.reason} ({reject.detail[:200]})"
            self.report.first_reject = " ".join(first.split())  # one line, whatever the data contain

    def _write_shard(self) -> None:
        table = pa.Table.from_pylist(self._rows, self._schema)
        self._write(f"{self._folder}/{self._task}-{self._num_shards:05d}.parquet", table)
        text_bytes = sum(table[column].nbytes for column in _TEXT_COLUMNS)
        self.report.sums["text_bytes"] += text_bytes
        if table.num_rows >= _MANY_ROWS or text_bytes >= _MUCH_TEXT:  # else one long row would be the mean
            self.report.text_bytes_per_row = max(self.report.text_bytes_per_row, text_bytes // table.num_rows)
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
        # By its mark a restarted driver knows that the file is unchanged, and need not read it.
        self.report.files.append(replace(entry, name=name, mark=(self._run / name).info().mark))
