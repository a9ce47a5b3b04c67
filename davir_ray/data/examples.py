"""Examples and rejects as rows, cut into shards and written."""

import hashlib
import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import pyarrow as pa

from davir_ray.data.render import Rendered
from davir_ray.data.sources import Record, Reject
from davir_ray.data.tokens import Encoded
from davir_ray.schema import EXAMPLES, REJECTS
from davir_ray.storage import FileEntry, Location, write_parquet

_SHARD_TOKENS = 4 * 2**20
_SHARD_TEXT_BYTES = 256 * 2**20

COUNTED = ("num_prompt_tokens", "num_response_tokens", "truncated")
"""Columns whose sums a report carries."""


def stable_id(*parts: str | int) -> int:
    """First 63 bits of SHA-256 of the parts as a JSON array."""
    content = json.dumps(parts, ensure_ascii=False).encode()
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big") >> 1


def example_row(source: str, record: Record, rendered: Rendered, encoded: Encoded, keep_record: bool) -> dict[str, Any]:
    """One row of examples/. Its id says where it stands, so it survives re-sharding and a change of template."""
    return {
        "example_id": stable_id(source, record.source_file, record.source_row),
        "content_hash": stable_id(rendered.prompt, rendered.response),
        "source": source,
        "source_file": record.source_file,
        "source_row": record.source_row,
        "prompt": rendered.prompt,
        "response": rendered.response,
        "record": json.dumps(record.fields, ensure_ascii=False, default=str) if keep_record else None,
        "input_ids": encoded.input_ids,
        "response_spans": encoded.response_spans,
        "num_prompt_tokens": encoded.num_prompt_tokens,
        "num_response_tokens": encoded.num_response_tokens,
        "truncated": encoded.truncated,
    }


@dataclass
class TaskReport:
    """What one task read and wrote; adds up over tasks."""

    num_read: int = 0
    files: list[FileEntry] = field(default_factory=list)
    """Names begin with their folder: examples/ or rejects/."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Rejected rows by reason."""
    sums: Counter[str] = field(default_factory=Counter)
    """Sums of the COUNTED columns."""
    first_reject: str | None = None

    def __iadd__(self, other: "TaskReport") -> Self:
        self.num_read += other.num_read
        self.files += other.files
        self.reasons.update(other.reasons)
        self.sums.update(other.sums)
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
        return cls(
            values["num_read"], files, Counter(values["reasons"]), Counter(values["sums"]), values["first_reject"]
        )


class ShardWriter:
    """Writes the rows of one task as shards named by task and index, so that no shard depends on the worker count."""

    def __init__(self, run: Location, task: int, source: str, shard_rows: int) -> None:
        self.report = TaskReport()
        self._run = run
        self._task = f"part-{task:05d}"
        self._source = source
        self._shard_rows = shard_rows
        self._rows: list[dict[str, Any]] = []
        self._rejects: list[dict[str, Any]] = []
        self._num_shards = self._tokens = self._text_bytes = 0

    def add(self, row: dict[str, Any]) -> None:
        """Add an example; writes a shard when it is full."""
        self._rows.append(row)
        self._tokens += len(row["input_ids"])
        self._text_bytes += len(row["prompt"]) + len(row["response"]) + len(row["record"] or "")
        full = len(self._rows) >= self._shard_rows or self._tokens >= _SHARD_TOKENS
        if full or self._text_bytes >= _SHARD_TEXT_BYTES:
            self._write_shard()

    def reject(self, reject: Reject) -> None:
        """Add a rejected row."""
        row = {"source": self._source, **reject._asdict(), "reason": str(reject.reason)}
        self._rejects.append(row)
        self.report.reasons[row["reason"]] += 1
        where = f"{reject.source_file} row {reject.source_row}"
        self.report.first_reject = self.report.first_reject or f"{where}: {reject.reason} ({reject.detail[:200]})"

    def finish(self) -> TaskReport:
        """Write what is left."""
        if self._rows:
            self._write_shard()
        if self._rejects:
            self._write(f"rejects/{self._task}.parquet", pa.Table.from_pylist(self._rejects, REJECTS))
        return self.report

    def _write_shard(self) -> None:
        table = pa.Table.from_pylist(self._rows, EXAMPLES)
        self._write(f"examples/{self._task}-{self._num_shards:05d}.parquet", table)
        for column in COUNTED:
            self.report.sums[column] += sum(row[column] for row in self._rows)
        self._num_shards += 1
        self._rows, self._tokens, self._text_bytes = [], 0, 0

    def _write(self, name: str, table: pa.Table) -> None:
        entry = write_parquet(self._run / name, table)
        self.report.files.append(FileEntry(name, entry.rows, entry.bytes, entry.sha256))
