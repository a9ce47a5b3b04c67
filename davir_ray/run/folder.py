"""The folder of a run, as one object that stages are given: its files, its complete stages, and its only driver.

A stage that is complete under the same fingerprint is skipped. Under a different one it is redone if it takes seconds;
if it takes hours it is redone only with --overwrite, and refused without.
"""

import json
import logging
import os
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from davir_ray.errors import ConfigError, DavirError, OutputError, StorageError
from davir_ray.run.lease import Lease
from davir_ray.run.location import Location, remove_leftovers
from davir_ray.run.manifest import CONFIG_FILE, CONFIG_HEAD, Manifest, differences, manifest_file
from davir_ray.run.progress import Progress
from davir_ray.run.stages import STAGES, from_stage
from davir_ray.run.storage_errors import user_errors
from davir_ray.text import one_line

log = logging.getLogger(__name__)

SUBMITTED_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Environment variable that Ray sets in the entry point of a submitted job."""

_MAX_DIFFERENCES = 5
"""Maximum number of differences that one message lists."""

_ATTEMPT = "attempt.json"
"""File with the fingerprint of an unfinished stage, in a folder of the stage."""


@dataclass(frozen=True)
class Run:
    """The folder of a run."""

    folder: Location
    overwrite: bool = False
    """Whether a stage that took hours may be redone under another fingerprint (--overwrite)."""

    @classmethod
    def at(cls, output: str | Path, *, overwrite: bool = False) -> Self:
        """The run in a local path or a URI; raises ConfigError for a path in the folder of a submitted job."""
        output = str(output)
        if os.environ.get(SUBMITTED_JOB) and "://" not in output and not Path(output).expanduser().is_absolute():
            raise ConfigError(
                f"output {output!r} is relative, and would be deleted with the submitted job's folder; "
                "give s3://… or an absolute path"
            )
        with user_errors(output, OutputError):
            folder = Location.of(output if "://" in output else Path(output).expanduser().resolve())
        return cls(folder, overwrite)

    def within(self, name: str) -> Self:
        """The run in a subfolder: a comparison has one for each fine-tune."""
        return type(self)(self.folder / name, self.overwrite)

    def __truediv__(self, name: str) -> Location:
        return self.folder / name

    def __str__(self) -> str:
        return str(self.folder)

    # Stages

    def manifest(self, stage: str) -> Manifest | None:
        """The manifest of a stage; None if the stage is not complete."""
        return Manifest.read(self.folder, stage)

    def require(self, stage: str) -> Manifest:
        """The manifest of an earlier stage; raises OutputError, saying what to run first, if it is not complete."""
        manifest = self.manifest(stage)
        if manifest is None:
            raise OutputError(f"{self} has no complete {stage} stage; run jobs/score.py with this --output first")
        return manifest

    def manifests(self, stages: Iterable[str] = STAGES) -> dict[str, Manifest]:
        """The manifests of those stages that are complete, by name."""
        return Manifest.read_all(self.folder, stages)

    def completed(self, stage: str, fingerprint: dict[str, Any]) -> Manifest | None:
        """The manifest of a stage that is complete under this fingerprint, with unchanged files; None if it must run.

        A stage that took hours and differs is cleared here together with the stages that follow it, if --overwrite is
        set; otherwise OutputError lists what differs. A stage that takes seconds clears its folders itself when it
        begins to write.
        """
        manifest = self.manifest(stage)
        takes_hours = STAGES[stage].takes_hours
        if manifest is None:
            if not takes_hours:
                return None
            complete = (self / "manifests").entries()
            names = [name for name in from_stage(stage)[1:] if manifest_file(self.folder, name).name in complete]
            later = [name for name in names if STAGES[name].takes_hours and self.manifest(name)]
            if not later:
                return None
            problem, changed = "holds another run", [f"its manifest, which is missing although {later[0]} is complete"]
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
        redone = [name for name in from_stage(stage) if name == stage or self.manifest(name) is not None]
        log.info("%s differs (%s); redoing %s", stage, _listed(changed), ", ".join(redone))
        self.clear(stage)
        return None

    def commit(self, manifest: Manifest) -> Manifest:
        """Complete a stage by writing its manifest; raises IntegrityError if a file is missing or has another size."""
        return manifest.commit(self.folder)

    def uncommit(self, stage: str) -> None:
        """Remove the manifest of a stage, if there is one, so that the stage no longer counts as complete."""
        manifest_file(self.folder, stage).remove()

    def clear(self, stage: str, there: Collection[str] | None = None) -> None:
        """Remove a stage and all that follow it, manifests first, so that no half-removed stage looks complete.

        `there` are the names of what is in the folder, which is listed if they are not given.
        """
        there = self.folder.entries() if there is None else there
        manifests = (self / "manifests").entries() if "manifests" in there else {}
        for name in reversed(from_stage(stage)):
            if manifest_file(self.folder, name).name in manifests:
                self.uncommit(name)
        for folder in dict.fromkeys(folder for name in from_stage(stage) for folder in STAGES[name].writes):
            above, _, within = folder.partition("/")
            if above in there:
                (self / folder).remove()
                if within and self.folder.is_local and not (self / above).entries():
                    (self / above).remove()  # on a disk it would stay, empty

    # Unfinished stages

    def note_attempt(self, folder: str, fingerprint: dict[str, Any], *, binding: bool = True) -> None:
        """Record the fingerprint of an attempt at a stage, in one of its folders.

        An attempt that is not `binding`, such as one that failed because of the user's mistake, may be followed by one
        with another fingerprint without --overwrite.
        """
        (self / folder / _ATTEMPT).write_text(json.dumps({"fingerprint": fingerprint, "binding": binding}))

    def continues_attempt(self, stage: str, folder: str, fingerprint: dict[str, Any]) -> bool:
        """Whether the last attempt at a stage had the same fingerprint, so that its files may be used.

        If it had another one, OutputError lists what differs, unless the attempt was not binding or may be overwritten.
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
        """The error for an unfinished stage with another fingerprint."""
        return OutputError(
            f"{self} holds an unfinished {stage} with other settings or inputs ({_listed(changed)}). "
            "Add --overwrite to start it over, or choose another --output"
        )

    # The driver

    @contextmanager
    def writing(self, config: str) -> Iterator[set[str]]:
        """Hold the run as its only driver during the block; `config` is the resolved configuration of the command.

        The value is the names of what is in the folder, which nobody but this driver changes from then on. Unfinished
        files of drivers that died are removed first, in a new run last; at the end progress.json says how the block
        ended. Raises OutputError if the folder holds something other than a run, or another driver holds it.
        """
        with Lease(self.folder) as there, self._outcome():
            is_new = not self.check_claim(there)
            if is_new:
                with user_errors(self, OutputError):
                    self.remember(config)
            else:
                remove_leftovers(self.folder)
            yield {*there, CONFIG_FILE}
            if is_new:  # no listing shows parts of uploads, which may be left where somebody deleted the files of a run
                try:
                    remove_leftovers(self.folder)
                except StorageError as error:  # the run is complete without
                    log.warning("unfinished uploads in %s may be left: %s", self, one_line(error))

    def check_claim(self, there: Collection[str]) -> bool:
        """Whether the folder, which has entries of these names, is a run already.

        Raises OutputError if it has other files, which a stage might delete.
        """
        config = self / CONFIG_FILE
        with user_errors(self, OutputError):
            if CONFIG_FILE in there:
                if not config.read_text().startswith(CONFIG_HEAD):
                    raise OutputError(f"{config} was not written by davir_ray; choose an empty or a new --output")
                return True
        names = [name for stage in STAGES.values() for name in stage.writes]
        taken = [name for name in (*names, "manifests") if name.partition("/")[0] in there]
        if taken:
            raise OutputError(f"{self} holds {taken[0]} but no run of davir_ray; choose an empty or a new --output")
        return False

    def remember(self, config: str) -> None:
        """Write the resolved configuration of a command, to be called when no stage can refuse it any more."""
        (self / CONFIG_FILE).write_text(CONFIG_HEAD + config)

    def write_progress(self, progress: Progress) -> None:
        """Replace progress.json."""
        progress.write(self.folder)

    @contextmanager
    def _outcome(self) -> Iterator[None]:
        """Write to progress.json how the run ended, except after an interrupt, a refusal or the loss of the lease."""
        try:
            yield
        except OutputError:  # a refusal: the run that the folder holds did not fail
            raise
        except Exception as error:
            # The text of Ray's errors is a whole traceback, whose last line says what happened.
            last_line = ": ".join([type(error).__name__, *str(error).strip().splitlines()[-1:]])
            Progress.end(self.folder, "failed", one_line(error) if isinstance(error, DavirError) else last_line)
            raise
        Progress.end(self.folder, "complete")


def _listed(changed: list[str]) -> str:
    more = f"; and {len(changed) - _MAX_DIFFERENCES} more" if changed[_MAX_DIFFERENCES:] else ""
    return "; ".join(changed[:_MAX_DIFFERENCES]) + more
