"""The folder of a run, as one object that stages are given: its files, its complete stages, and its one driver.

A stage that is complete under an equal fingerprint is skipped. A different one is refused or redone: what took hours is
redone only with --overwrite, what takes seconds without a flag.
"""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from davir_ray.errors import ConfigError, DavirError, OutputError
from davir_ray.run.access import translated
from davir_ray.run.lease import Lease
from davir_ray.run.location import Location, remove_leftovers
from davir_ray.run.manifest import CONFIG_FILE, CONFIG_HEAD, Manifest, differences
from davir_ray.run.progress import Progress
from davir_ray.run.stages import STAGES, from_stage
from davir_ray.text import one_line

log = logging.getLogger(__name__)

SUBMITTED_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Environment variable that Ray sets for the entry point of a submitted job."""

_MAX_DIFFERENCES = 5
"""Differences named in one message."""

_ATTEMPT = "attempt.json"
"""In a folder of an unfinished stage: the fingerprint that it works with."""


@dataclass(frozen=True)
class Run:
    """The folder of a run."""

    folder: Location
    overwrite: bool = False
    """Whether a stage that took hours may be redone where it differs: --overwrite."""

    @classmethod
    def at(cls, output: str | Path, *, overwrite: bool = False) -> Self:
        """The run in an output, a local path or a URI; ConfigError for one that a submitted job would lose."""
        output = str(output)
        if os.environ.get(SUBMITTED_JOB) and "://" not in output and not Path(output).is_absolute():
            raise ConfigError(
                f"output {output!r} is relative, and would be lost with the submitted job's folder; "
                "give s3://… or an absolute path"
            )
        with translated(output, OutputError):
            folder = Location.of(output if "://" in output else Path(output).expanduser().resolve())
        return cls(folder, overwrite)

    def within(self, name: str) -> Self:
        """The run in a folder of this one: a comparison holds one for each fine-tune."""
        return type(self)(self.folder / name, self.overwrite)

    def __truediv__(self, name: str) -> Location:
        return self.folder / name

    def __str__(self) -> str:
        return str(self.folder)

    # Stages

    def manifest(self, stage: str) -> Manifest | None:
        """The manifest of a stage; None where it is not complete."""
        return Manifest.read(self.folder, stage)

    def require(self, stage: str) -> Manifest:
        """The manifest of an earlier stage; OutputError that says what to run first where it is not complete."""
        manifest = self.manifest(stage)
        if manifest is None:
            raise OutputError(f"{self} has no complete {stage} stage; run jobs/score.py with this --output first")
        return manifest

    def completed(self, stage: str, fingerprint: dict[str, Any]) -> Manifest | None:
        """The manifest of a stage that is complete under this fingerprint, its files unchanged; None if it must run.

        Where a stage that took hours differs, it is cleared here with all that follow it, or OutputError names what
        differs and the two ways out. A stage that takes seconds clears its folders when it begins to write.
        """
        manifest = self.manifest(stage)
        takes_hours = STAGES[stage].takes_hours
        if manifest is None:
            later = [name for name in from_stage(stage)[1:] if STAGES[name].takes_hours and self.manifest(name)]
            if not takes_hours or not later:
                return None
            problem, changed = "holds another run", [f"its manifest is gone, but {later[0]} is complete"]
        elif changed := differences(manifest.fingerprint, json.loads(json.dumps(fingerprint))):
            problem = "holds another run"
        elif changed := manifest.damage(self.folder):
            problem = "has damaged files"
        else:
            log.info("%s: complete, skipped", stage)
            return manifest
        if not takes_hours:
            log.info("%s differs (%s); redone", stage, _listed(changed))
            return None
        if not self.overwrite:
            raise OutputError(
                f"{self} {problem}: {stage} differs in {_listed(changed)}. "
                "Add --overwrite to redo it and what follows, or choose another --output"
            )
        following = [name for name in from_stage(stage) if name == stage or self.manifest(name) is not None]
        log.info("%s differs (%s); redoing %s", stage, _listed(changed), ", ".join(following))
        self.clear(stage)
        return None

    def commit(self, manifest: Manifest) -> Manifest:
        """Complete a stage by its manifest, after a look at every file; IntegrityError if one is not as written."""
        return manifest.commit(self.folder)

    def clear(self, stage: str) -> None:
        """Remove a stage and all that follow it: every manifest first, so that no stage looks complete half-way."""
        for name in reversed(from_stage(stage)):
            (self / "manifests" / f"{name}.json").remove()
        for name in from_stage(stage):
            for folder in STAGES[name].writes:
                (self / folder).remove()

    # Unfinished stages

    def note_attempt(self, folder: str, fingerprint: dict[str, Any], *, binding: bool = True) -> None:
        """Write down what an attempt works with. One that failed by the user's mistake does not bind the next."""
        (self / folder / _ATTEMPT).write_text(json.dumps({"fingerprint": fingerprint, "binding": binding}))

    def continues_attempt(self, stage: str, folder: str, fingerprint: dict[str, Any]) -> bool:
        """Whether an attempt that died worked with the same fingerprint, so that what it left may be used.

        OutputError names what differs, unless it may be overwritten.
        """
        try:
            noted = json.loads((self / folder / _ATTEMPT).read_bytes())
            before, binding = noted["fingerprint"], noted["binding"]
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return False
        changed = differences(before, json.loads(json.dumps(fingerprint)))
        if changed and binding and not self.overwrite:
            raise self.other_attempt(stage, changed)
        return not changed

    def other_attempt(self, stage: str, changed: list[str]) -> OutputError:
        """The refusal to go on with an unfinished stage that worked with something else."""
        return OutputError(
            f"{self} holds an unfinished {stage} with other settings or inputs ({_listed(changed)}). "
            "Add --overwrite to begin it anew, or choose another --output"
        )

    # The driver

    @contextmanager
    def writing(self, config: str) -> Iterator[None]:
        """Hold the run as its one driver for a block; `config` is the resolved configuration of the command.

        What dead attempts left half-written is removed. At the end progress.json says how it went. OutputError if the
        folder holds something else, or another driver has it.
        """
        self.check_claim()
        with Lease(self.folder), self._outcome():
            if not self.check_claim():
                with translated(self, OutputError):
                    self.remember(config)
            remove_leftovers(self.folder)
            yield

    def check_claim(self) -> bool:
        """Whether the folder is a run of ours; OutputError if it holds something else, which a stage might clear."""
        mark = self / CONFIG_FILE
        with translated(self, OutputError):
            if mark.exists():
                if not mark.read_text().startswith(CONFIG_HEAD):
                    raise OutputError(f"{mark} was not written by davir_ray; choose an empty or a new --output")
                return True
            names = [name for stage in STAGES.values() for name in stage.writes]
            taken = [name for name in (*names, "manifests") if (self / name).exists()]
        if taken:
            raise OutputError(f"{self} holds {taken[0]} but no run of davir_ray; choose an empty or a new --output")
        return False

    def remember(self, config: str) -> None:
        """Write the resolved configuration of the last command, once no stage can refuse it any more."""
        (self / CONFIG_FILE).write_text(CONFIG_HEAD + config)

    def write_progress(self, progress: Progress) -> None:
        """Say in progress.json how far the run is."""
        progress.write(self.folder)

    @contextmanager
    def _outcome(self) -> Iterator[None]:
        """Leave in progress.json how the run ended; where it is interrupted, or loses its lease, leave it as it is."""
        try:
            yield
        except OutputError:  # a refusal: the run that is there did not fail
            raise
        except Exception as error:
            # Ray's errors hold a whole traceback; their last line says what happened.
            last_line = ": ".join([type(error).__name__, *str(error).strip().splitlines()[-1:]])
            Progress.end(self.folder, "failed", one_line(error) if isinstance(error, DavirError) else last_line)
            raise
        Progress.end(self.folder, "complete")


def _listed(changed: list[str]) -> str:
    more = f"; and {len(changed) - _MAX_DIFFERENCES} more" if changed[_MAX_DIFFERENCES:] else ""
    return "; ".join(changed[:_MAX_DIFFERENCES]) + more
