"""How far a run is: progress.json in its output, for whoever asks from any machine, and a line for who waits."""

import json
from collections import deque
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Literal, NamedTuple, Self

from davir_ray.storage import Location

PROGRESS_FILE = "progress.json"

WINDOW_S = 60.0
"""Rates are of the last minute: what a run did an hour ago says little about its end."""

State = Literal["running", "complete", "failed"]


@dataclass(frozen=True)
class Progress:
    """What progress.json says."""

    stage: str
    state: State = "running"
    """Of the whole run: a stage that is complete makes way for the next."""
    unit: str = ""
    """What `done` and `total` count: bytes (prepare), steps (finetune), rows (score); empty for short stages."""
    done: int = 0
    total: int | None = None
    """None: not known yet."""
    rows: int = 0
    """Of the sources, read so far (prepare); scored so far (score)."""
    tokens: int = 0
    """Through the model so far, by this driver."""
    tokens_per_second: float | None = None
    """Over the last minute; None before anything is done."""
    seconds: float = 0.0
    """Since this driver began the stage."""
    seconds_left: float | None = None
    """Of the stage, at the pace of the last minute."""
    rejects: int = 0
    """Rows of the input that are no examples."""
    unscored: int = 0
    """Examples without a score, whatever their status."""
    retries: int = 0
    """Shards, tasks or steps begun again after a worker was lost."""
    error: str | None = None
    updated: str = ""
    """UTC, by the driver's clock."""

    def write(self, run: Location) -> None:
        """Replace progress.json."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        (run / PROGRESS_FILE).write_text(json.dumps(asdict(replace(self, updated=now)), indent=1) + "\n")

    @classmethod
    def read(cls, run: Location) -> Self | None:
        """What the last driver wrote; None where none did."""
        try:
            return cls(**json.loads((run / PROGRESS_FILE).read_bytes()))
        except FileNotFoundError:
            return None

    @classmethod
    def end(cls, run: Location, state: State, error: str | None = None) -> None:
        """Say in progress.json that the driver has ended, and how."""
        last = cls.read(run) or cls("prepare")
        replace(last, state=state, error=error, seconds_left=None).write(run)

    def __str__(self) -> str:
        parts = [self._told_done()] if self.unit else []
        if self.unit == "bytes":
            parts.append(f"{self.rows:,} rows")
        if self.tokens_per_second is not None:
            parts.append(f"{self.tokens_per_second:,.0f} tokens/s")
        if self.seconds_left is not None:
            parts.append(f"{duration(self.seconds_left)} left")
        if not self.unit:
            return self.stage
        parts.append(f"{self.rejects:,} {'reject' if self.rejects == 1 else 'rejects'}")
        if self.unscored:
            parts.append(f"{self.unscored:,} without a score")
        parts.append(f"{self.retries:,} {'retry' if self.retries == 1 else 'retries'}")
        return f"{self.stage}: {', '.join(parts)}"

    def _told_done(self) -> str:
        if self.unit == "bytes":
            return f"{self.done / 1e6:,.1f}{'' if self.total is None else f' of {self.total / 1e6:,.1f}'} MB"
        if self.total is None:
            return f"{self.done:,} {self.unit}"
        return f"{self.done:,} of {self.total:,} {self.unit} ({self.done / max(1, self.total):.0%})"


class _Reading(NamedTuple):
    at: float
    done: int
    tokens: int


class Pace:
    """Rates over the last minute of readings."""

    def __init__(self) -> None:
        self._readings = deque[_Reading]()

    def add(self, at: float, done: int, tokens: int) -> None:
        """Read at this moment, in seconds of a clock that never goes back. Nothing is learnt while nothing is done."""
        last = self._readings[-1] if self._readings else _Reading(at, 0, 0)
        if done < last.done or tokens < last.tokens:  # a worker that was lost goes on from its last checkpoint
            self._readings.clear()
        self._readings.append(_Reading(at, done, tokens))
        # One reading at or before the window's start stays: a rate needs both ends.
        while len(self._readings) > 2 and self._readings[1].at <= at - WINDOW_S:
            self._readings.popleft()

    @property
    def tokens_per_second(self) -> float | None:
        """None before two readings differ."""
        return self._per_second(self._readings[-1].tokens - self._readings[0].tokens) if self._readings else None

    def seconds_left(self, total: int | None) -> float | None:
        """Until `total` is done; None where nothing tells."""
        if total is None or not self._readings:
            return None
        rate = self._per_second(self._readings[-1].done - self._readings[0].done)
        return (total - self._readings[-1].done) / rate if rate else None

    def _per_second(self, count: int) -> float | None:
        seconds = self._readings[-1].at - self._readings[0].at
        return count / seconds if count > 0 and seconds > 0 else None


def duration(seconds: float) -> str:
    """Seconds in words, to about two digits."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
