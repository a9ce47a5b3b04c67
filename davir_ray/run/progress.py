"""How far a run is: progress.json in its output, which any machine can read, and the same as a line of text.

The file is for information: if it cannot be written or read, that is logged and the run goes on.
"""

import json
import logging
from collections import deque
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from itertools import accumulate, takewhile
from typing import Literal, NamedTuple, Self

from davir_ray.errors import StorageError
from davir_ray.run.location import Location
from davir_ray.run.storage_errors import explain

log = logging.getLogger(__name__)

PROGRESS_FILE = "progress.json"

WINDOW_S = 60.0
"""Seconds that a rate is averaged over: the pace of an hour ago says little about the end of a run."""

MIN_CHANGES = 5
"""Minimum number of changes that a rate is computed from, even if older: a shard may take longer than WINDOW_S."""

State = Literal["running", "complete", "failed"]

_not_writable: set[str] = set()
"""Runs for which it has been logged that progress.json cannot be written."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """The content of progress.json."""

    stage: str
    state: State = "running"
    """State of the whole run, not of the stage: when one stage is complete, the next is named."""
    unit: str = ""
    """Unit of `done` and `total`: bytes (prepare; at first, parts of files whose lines are counted), steps (finetune),
    rows (score); empty for short stages."""
    done: int = 0
    total: int | None = None
    """Amount to do in all; None while it is not known."""
    rows: int = 0
    """Rows of the sources read so far (prepare), or scored so far (score)."""
    tokens: int = 0
    """Tokens that this driver has sent through the model so far."""
    tokens_per_second: float | None = None
    """Average of the last minute; None before anything is done."""
    seconds: float = 0.0
    """Seconds since this driver began the stage."""
    seconds_left: float | None = None
    """Seconds until the stage ends, at the pace of the last minute."""
    rejects: int = 0
    """Rows of the input that were rejected."""
    left_out: int = 0
    """Rows of the input that the data's own marks leave out."""
    unscored: int = 0
    """Examples without a score, whatever their status."""
    retries: int = 0
    """Shards, tasks or steps repeated after a worker was lost."""
    error: str | None = None
    """Why the run failed."""
    updated: str = ""
    """Time in UTC, by the driver's clock."""

    def write(self, run: Location) -> None:
        """Replace progress.json. If it cannot be written, that is logged once for each run, and the run goes on."""
        now, file = datetime.now(UTC).isoformat(timespec="seconds"), run / PROGRESS_FILE
        try:
            file.write_text(json.dumps(asdict(replace(self, updated=now)), indent=1) + "\n")
        except Exception as error:  # noqa: BLE001  # any store's library may raise its own
            if str(run) not in _not_writable:
                _not_writable.add(str(run))
                log.warning("%s cannot be written (%s); the run goes on without it", file, explain(error, file))

    @classmethod
    def read(cls, run: Location) -> Self | None:
        """What the last driver wrote; None if no driver did. Fields that another version added are ignored."""
        try:
            values = json.loads((run / PROGRESS_FILE).read_bytes())
            return cls(**{name: value for name, value in values.items() if name in cls.__dataclass_fields__})
        except (FileNotFoundError, ValueError, TypeError, AttributeError):  # the last three: not written by us
            return None
        except StorageError as error:
            log.warning("%s cannot be read: %s", run / PROGRESS_FILE, explain(error, run))
            return None

    @classmethod
    def end(cls, run: Location, state: State, error: str | None = None) -> None:
        """Write to progress.json how the driver ended."""
        last = cls.read(run) or cls(stage="prepare")
        replace(last, state=state, error=error, seconds_left=None).write(run)

    def __str__(self) -> str:
        if not self.unit:
            return self.stage
        parts = [self._done_of_total()]
        if self.unit == "bytes":
            parts.append(f"{self.rows:,} rows")
        if self.tokens_per_second is not None:
            parts.append(f"{self.tokens_per_second:,.0f} tokens/s")
        if self.seconds_left is not None:
            parts.append(f"{duration(self.seconds_left)} left")
        parts.append(f"{self.rejects:,} {'reject' if self.rejects == 1 else 'rejects'}")
        if self.left_out:
            parts.append(f"{self.left_out:,} left out")
        if self.unscored:
            parts.append(f"{self.unscored:,} without a score")
        parts.append(f"{self.retries:,} {'retry' if self.retries == 1 else 'retries'}")
        return f"{self.stage}: {', '.join(parts)}"

    def brief(self, width: int) -> str:
        """The same in at most `width` characters: the most important first, zero counts left out."""
        troubles = {"rejects": self.rejects, "without a score": self.unscored, "retries": self.retries}
        parts = [self._done_of_total()] if self.unit else []
        if self.seconds_left:
            parts.append(f"{duration(self.seconds_left)} left")
        parts += [f"{count:,} {name}" for name, count in troubles.items() if count]
        if self.tokens_per_second is not None:
            parts.append(f"{self.tokens_per_second:,.0f} tokens/s")
        fitting = takewhile(lambda line: len(line) <= width, accumulate(parts, "{}, {}".format))
        return max(fitting, key=len, default="".join(parts[:1])[:width])

    def _done_of_total(self) -> str:
        if self.unit == "bytes":
            return f"{self.done / 1e6:,.1f}{'' if self.total is None else f' of {self.total / 1e6:,.1f}'} MB"
        if self.total is None:
            return f"{self.done:,} {self.unit}"
        return f"{self.done:,} of {self.total:,} {self.unit} ({self.done / max(1, self.total):.0%})"


class _Sample(NamedTuple):
    at: float
    done: int
    tokens: int


class Pace:
    """Rates of a stage, measured between two changes of what is done: over WINDOW_S, or longer if changes are rare."""

    def __init__(self) -> None:
        self._changes = deque[_Sample]()
        self._now = 0.0

    def add(self, at: float, done: int, tokens: int) -> None:
        """Record what is done at the time `at`, in seconds of a monotonic clock."""
        self._now = at
        last = self._changes[-1] if self._changes else None
        if last is not None and (done < last.done or tokens < last.tokens):  # a lost worker's work is repeated
            self._changes.clear()
        if last is None or (done, tokens) != (last.done, last.tokens):
            self._changes.append(_Sample(at, done, tokens))
        if len(self._changes) == 3 and self._changes[0].done == 0:  # before the first change, models were being loaded
            self._changes.popleft()
        while len(self._changes) > MIN_CHANGES and self._changes[1].at <= at - WINDOW_S:
            self._changes.popleft()

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens per second; None before anything is done."""
        return self._per_second(self._changes[-1].tokens - self._changes[0].tokens) if self._changes else None

    def seconds_left(self, num_left: int | None) -> float | None:
        """Seconds until `num_left` more are done; None if there is no rate yet."""
        if num_left is None or not self._changes:
            return None
        rate = self._per_second(self._changes[-1].done - self._changes[0].done)
        # `num_left` can be negative: some bytes of Parquet files are read twice.
        return max(0, num_left) / rate if rate else None

    def _per_second(self, count: int) -> float | None:
        first, last = self._changes[0], self._changes[-1]
        if len(self._changes) < 2 or count <= 0:
            return None
        usual = (last.at - first.at) / (len(self._changes) - 1)
        late = max(0.0, self._now - last.at - usual)  # the next change takes longer than those before it
        return count / (last.at - first.at + late)


def duration(seconds: float) -> str:
    """A duration in seconds, minutes or hours, to about two digits."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
