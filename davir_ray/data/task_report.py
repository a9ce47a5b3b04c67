"""The report of a task of prepare: what it read, what became of it, and how the data look."""

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from davir_ray.errors import DataError
from davir_ray.run.files import FileEntry
from davir_ray.schema import RejectReason

_MIN_BYTES = 16 * 2**20
"""Fewer bytes say little about the rest of the data: buffers are ahead of the rows by up to a megabyte."""

SHOWN_EXAMPLES = 3

COUNTED = ("num_prompt_tokens", "num_response_tokens", "truncated")
"""Columns whose sums a report contains."""

TEXT_BYTES = "text_bytes_per_row"
"""Key in the details of prepare's manifest: the field of the report."""

_COUNTERS = ("reasons", "in_evaluation_sets", "sums", "replaced", "columns", "role_tokens")


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
    text_bytes_per_row: int = 0
    """Bytes of the text of a row in memory: the largest mean of a shard that is not small."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Number of rejected rows by reason."""
    in_evaluation_sets: Counter[str] = field(default_factory=Counter)
    """Number of rows that share words in a row with an evaluation set, by its name; a row may count in several."""
    sums: Counter[str] = field(default_factory=Counter)
    """Sums of the COUNTED columns, and `text_bytes`, of the text in memory."""
    replaced: Counter[str] = field(default_factory=Counter)
    """Number of values that were replaced in the JSON of the records: NOT_FINITE and BYTES."""
    first_reject: str | None = None
    """Of the bad rows."""
    columns: Counter[str] = field(default_factory=Counter)
    """Number of records in which a column of the data says something, by its name."""
    num_sampled: int = 0
    """Number of examples whose tokens are counted by role."""
    role_tokens: Counter[str] = field(default_factory=Counter)
    """Number of tokens of these examples by role; see davir_ray.data.roles."""
    shown: list[dict[str, Any]] = field(default_factory=list)
    """The first examples as the models read them, at most SHOWN_EXAMPLES: `source_file`, `source_row`, `truncated`, and
    `pieces`, each a text and whether it is scored."""

    def __iadd__(self, other: "TaskReport") -> Self:
        self.num_read += other.num_read
        self.num_left_out += other.num_left_out
        self.num_turns_left_out += other.num_turns_left_out
        self.num_bytes += other.num_bytes
        self.files += other.files
        self.text_bytes_per_row = max(self.text_bytes_per_row, other.text_bytes_per_row)
        self.reasons.update(other.reasons)
        self.in_evaluation_sets.update(other.in_evaluation_sets)
        self.sums.update(other.sums)
        self.replaced.update(other.replaced)
        self.first_reject = self.first_reject or other.first_reject
        self.columns.update(other.columns)
        self.num_sampled += other.num_sampled
        self.role_tokens.update(other.role_tokens)
        self.shown = [*self.shown, *other.shown][:SHOWN_EXAMPLES]
        return self

    def to_json(self) -> str:
        """The report as text, which passes through Ray as one value."""
        return json.dumps(vars(self) | {"files": [asdict(entry) for entry in self.files]})

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The report that `to_json` wrote."""
        values = json.loads(text)
        files = [FileEntry(**entry) for entry in values["files"]]
        counters = {name: Counter(values.get(name)) for name in _COUNTERS}  # an earlier version had fewer
        return cls(**{**values, **counters, "files": files})

    def check_rejects(self, max_bad_fraction: float, total_bytes: int | None = None) -> None:
        """Raise DataError with a count of the reasons if too many rows are bad; those of evaluation sets are not.

        While reading is in progress, `total_bytes` is the size of all sources. The error is then raised only if the bad
        rows exceed the allowed share of twice the total number of rows estimated from the bytes read so far.
        """
        allowed = max_bad_fraction * self.num_read
        if total_bytes is not None:
            if self.num_bytes < _MIN_BYTES:
                return
            allowed *= 2 * total_bytes / self.num_bytes
        num_bad = self.reasons.total() - self.reasons[RejectReason.IN_EVALUATION_SET]
        if num_bad <= allowed:
            return
        so_far = "" if total_bytes is None else f"the first {self.num_bytes / total_bytes:.0%} of the data, "
        raise DataError(
            f"{num_bad} of {self.num_read} rows are bad ({so_far}{self.reason_counts}), more than "
            f"--max_bad_fraction {max_bad_fraction:g}; the first: {self.first_reject}. "
            "Correct the data (rejects/ has every bad row) or raise the fraction"
        )

    @property
    def reason_counts(self) -> str:
        """The reasons of rejects with their counts, as text."""
        return ", ".join(f"{reason} {count}" for reason, count in sorted(self.reasons.items()))
