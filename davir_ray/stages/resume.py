"""Which stages are complete: equal fingerprints are skipped, different ones are refused or redone.

Settings of prepare, finetune and score are the user's hours: a difference is refused unless --overwrite says otherwise.
Ranking and selecting take seconds, so they redo without a flag: trying 3 % after 6 % needs none.
"""

import json
import logging
from typing import Any

from davir_ray.errors import OutputError
from davir_ray.storage import Location, Manifest, differences

log = logging.getLogger(__name__)

FOLDERS = {
    "prepare": ("examples", "rejects"),
    "finetune": ("checkpoints", "reference", "reference_epochs"),
    "score": ("scores",),
    "rank": ("ranked",),
    "select": ("selected",),
    "report": ("report.html", "report.json"),
}
"""What each stage owns in a run, in the order of the stages."""

CONFIG_FILE = "config.yaml"
CONFIG_HEAD = (
    "# The last command's configuration of this run of davir_ray; manifests/ say what each stage was made with.\n"
)

_REDONE_FREELY = ("rank", "select", "report")


def completed(run: Location, stage: str, fingerprint: dict[str, Any], *, overwrite: bool = False) -> Manifest | None:
    """The manifest of a stage that is complete under the same fingerprint; None if it must run.

    A stage complete under another fingerprint is cleared, with all that follow it, where that is allowed; otherwise
    OutputError names what differs and the two ways out.
    """
    manifest = Manifest.read(run, stage)
    if manifest is None:
        return None
    changed = differences(manifest.fingerprint, json.loads(json.dumps(fingerprint)))
    if not changed:
        log.info("%s: complete, skipped", stage)
        return manifest
    if not overwrite and stage not in _REDONE_FREELY:
        raise OutputError(
            f"{run} holds another run: {stage} differs in {'; '.join(changed)}. "
            "Add --overwrite to redo it and what follows, or choose another --output"
        )
    following = [name for name in from_stage(stage) if name == stage or Manifest.read(run, name) is not None]
    log.info("%s differs (%s); redoing %s", stage, "; ".join(changed), ", ".join(following))
    clear(run, stage)
    return None


def claim(run: Location, config: str) -> None:
    """Make the output ours, or OutputError: a stage clears its own folders, so they must not be somebody else's."""
    mark = run / CONFIG_FILE
    if mark.exists():
        if not mark.read_bytes().startswith(CONFIG_HEAD.encode()):
            raise OutputError(f"{mark} was not written by davir_ray; choose an empty or a new --output")
        return
    taken = [name for names in FOLDERS.values() for name in (*names, "manifests") if (run / name).exists()]
    if taken:
        raise OutputError(f"{run} holds {taken[0]} but no run of davir_ray; choose an empty or a new --output")
    remember(run, config)


def remember(run: Location, config: str) -> None:
    """Write the resolved configuration of the last command into the run."""
    (run / CONFIG_FILE).write_text(CONFIG_HEAD + config)


def from_stage(stage: str) -> list[str]:
    """The stage and all that follow it."""
    stages = list(FOLDERS)
    return stages[stages.index(stage) :]


def clear(run: Location, stage: str) -> None:
    """Remove a stage and all that follow it: every manifest first, so that no stage looks complete half-way."""
    for name in reversed(from_stage(stage)):
        (run / "manifests" / f"{name}.json").remove()
    for name in from_stage(stage):
        for folder in FOLDERS[name]:
            (run / folder).remove()


def require(run: Location, stage: str) -> Manifest:
    """The manifest of an earlier stage, or an OutputError that says what to run first."""
    manifest = Manifest.read(run, stage)
    if manifest is None:
        raise OutputError(f"{run} has no complete {stage} stage; run jobs/score.py with this --output first")
    return manifest
