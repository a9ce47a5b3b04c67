"""How far a run is, read from its output alone: on any machine, without Ray and without a model."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from davir_ray.errors import OutputError
from davir_ray.run.access import check_readable
from davir_ray.run.lease import BEAT_S, LEASE_FILE, MISSED_BEATS, Holder
from davir_ray.run.location import Location
from davir_ray.run.manifest import Manifest
from davir_ray.run.progress import Progress, duration
from davir_ray.run.stages import STAGES
from davir_ray.run.storage_errors import storage_errors, user_errors


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """How far the run in an output is."""

    run: str
    state: str
    """running, complete, failed, stopped (no driver holds it) or silent (its driver may have died)."""
    stages: Mapping[str, Mapping[str, Any]]
    """Counts and duration of each complete stage."""
    progress: Progress | None
    driver: str | None
    """The process that holds the run."""
    silent_s: float | None
    """Seconds since the driver's last heartbeat, by this machine's clock."""

    def lines(self) -> list[str]:
        """The lines that jobs/status.py prints."""
        lines = [self.run]
        for stage, row in STAGES.items():
            if stage in self.stages:
                counts = self.stages[stage]
                shown = ", ".join(
                    f"{counts[name]:,} {name.replace('_', ' ')}" for name in row.shown_counts if name in counts
                )
                lines.append(f"  {stage:<9} complete  {duration(counts['seconds']):>7}  {shown}".rstrip())
            elif self.progress is not None and self.progress.stage == stage and self.state != "complete":
                lines.append(f"  {stage:<9} {self.state:<8}  {str(self.progress).partition(': ')[2]}".rstrip())
        return [*lines, self._conclusion()]

    def to_json(self) -> str:
        """All fields as JSON."""
        return json.dumps(asdict(self), indent=1)

    def _conclusion(self) -> str:
        if self.state == "failed" and self.progress is not None:
            return f"failed: {self.progress.error}"
        if self.state == "stopped":
            return "stopped: no driver holds the run; the same command continues where it stopped"
        if self.state == "complete":
            return "complete"
        heartbeat = "" if self.silent_s is None else f", last heartbeat {duration(self.silent_s)} ago"
        return f"running: {self.driver}{heartbeat}{': it may have died' if self.state == 'silent' else ''}"


def status(output: str) -> RunStatus:
    """The status of a run; raises OutputError if the output holds no run or cannot be read."""
    with user_errors(output, OutputError):
        run = Location.of(output)
    check_readable([(output, OutputError)])
    manifests = Manifest.read_all(run, STAGES)
    progress, holder = Progress.read(run), Holder.read(run / LEASE_FILE)
    if not manifests and progress is None and holder is None:
        raise OutputError(f"{run} holds no run of davir_ray; give the --output of one")
    stages = {stage: {**found.counts, "seconds": found.seconds} for stage, found in manifests.items()}
    silent_s = None if holder is None else _seconds_since(run / LEASE_FILE)
    return RunStatus(
        run=str(run),
        state=_state(progress, holder, silent_s),
        stages=stages,
        progress=progress,
        driver=None if holder is None else str(holder),
        silent_s=silent_s,
    )


def _state(progress: Progress | None, holder: Holder | None, silent_s: float | None) -> str:
    if holder is not None and not holder.is_dead():
        return "silent" if silent_s is not None and silent_s > BEAT_S * MISSED_BEATS else "running"
    if progress is not None and progress.state != "running":
        return progress.state
    return "stopped"


def _seconds_since(file: Location) -> float | None:
    """Seconds since a file was written; None if its file system keeps no times."""
    try:
        with storage_errors(file, may_be_absent=True):
            written: datetime = file.fs.modified(file.path)
    except (NotImplementedError, FileNotFoundError):
        return None
    return max(0.0, (datetime.now(UTC) - written).total_seconds())
