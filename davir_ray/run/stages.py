"""Which stages are complete: equal fingerprints are skipped, different ones are refused or redone.

Settings of prepare, finetune and score are the user's hours: a difference is refused unless --overwrite says otherwise.
Ranking and selecting take seconds, so they redo without a flag: trying 3 % after 6 % needs none.
"""

import json
import logging
from typing import Any

from davir_ray.errors import OutputError
from davir_ray.run.access import translated
from davir_ray.run.location import Location
from davir_ray.run.manifest import CONFIG_FILE, CONFIG_HEAD, Manifest, differences

log = logging.getLogger(__name__)

FOLDERS = {
    "prepare": ("examples", "rejects", "prepare_tasks"),
    "freeze": ("frozen", "frozen_cache"),
    "align": ("checkpoints", "policy", "policy_epochs"),
    "finetune": ("checkpoints", "reference", "reference_epochs"),
    "score": ("scores",),
    "margins": ("margins",),
    "rank": ("ranked",),
    "select": ("selected", "duplicates", "mixture", "jsonl"),
    "report": ("report.html", "report.json"),
    "generate": ("generations",),
    "match": ("matches",),
    "outputs": ("outputs.json",),
}
"""What each stage owns in a run, in an order in which each comes after what it is made of."""

_MADE_OF = {
    "freeze": ("prepare",),
    "align": ("freeze",),
    "finetune": ("prepare",),
    "score": ("prepare", "align", "finetune"),
    "margins": ("score",),
    "rank": ("score",),
    "select": ("rank",),
    "report": ("margins", "select"),
    "generate": ("prepare",),
    "match": ("generate",),
    "outputs": ("generate",),
}
"""The stages whose files a stage is made of; a run has those that its job needs."""

_MOST_TOLD = 5
"""Differences named in one message."""

_REDONE_FREELY = ("margins", "rank", "select", "report", "match", "outputs")

_ATTEMPT = "attempt.json"
"""What an unfinished stage works with."""


def completed(run: Location, stage: str, fingerprint: dict[str, Any], *, overwrite: bool = False) -> Manifest | None:
    """The manifest of a stage that is complete under the same fingerprint, files included; None if it must run.

    OutputError names what differs, and the two ways out, where a difference may not be redone without --overwrite;
    with it, the stage is cleared here with all that follow. A stage that redoes freely clears when it begins to write.
    """
    manifest = Manifest.read(run, stage)
    if manifest is None:
        later = [name for name in from_stage(stage)[1:] if name not in _REDONE_FREELY and Manifest.read(run, name)]
        if stage in _REDONE_FREELY or not later:
            return None
        told_as, changed = "holds another run", [f"its manifest is gone, but {later[0]} is complete"]
    elif changed := differences(manifest.fingerprint, json.loads(json.dumps(fingerprint))):
        told_as = "holds another run"
    elif changed := manifest.damage(run):
        told_as = "has damaged files"
    else:
        log.info("%s: complete, skipped", stage)
        return manifest
    if stage in _REDONE_FREELY:
        log.info("%s differs (%s); redone", stage, _told(changed))
    else:
        _redo(run, stage, told_as, changed, overwrite)
    return None


def _redo(run: Location, stage: str, told_as: str, changed: list[str], overwrite: bool) -> None:
    """Clear a stage and what follows it, if that is allowed."""
    if not overwrite:
        raise OutputError(
            f"{run} {told_as}: {stage} differs in {_told(changed)}. "
            "Add --overwrite to redo it and what follows, or choose another --output"
        )
    following = [name for name in from_stage(stage) if name == stage or Manifest.read(run, name) is not None]
    log.info("%s differs (%s); redoing %s", stage, _told(changed), ", ".join(following))
    clear(run, stage)


def _told(changed: list[str]) -> str:
    more = f"; and {len(changed) - _MOST_TOLD} more" if changed[_MOST_TOLD:] else ""
    return "; ".join(changed[:_MOST_TOLD]) + more


def other_attempt(run: Location, stage: str, changed: list[str]) -> OutputError:
    """The refusal to go on with an unfinished stage that worked with something else."""
    return OutputError(
        f"{run} holds an unfinished {stage} with other settings or inputs ({_told(changed)}). "
        "Add --overwrite to begin it anew, or choose another --output"
    )


def same_attempt(run: Location, stage: str, folder: str, fingerprint: dict[str, Any], *, overwrite: bool) -> bool:
    """Whether an attempt that died worked with the same, so that this one may go on with what it left.

    OutputError names what differs, unless it may be overwritten.
    """
    try:
        noted = json.loads((run / folder / _ATTEMPT).read_bytes())
        before, binding = noted["fingerprint"], noted["binding"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False
    changed = differences(before, json.loads(json.dumps(fingerprint)))
    if changed and binding and not overwrite:
        raise other_attempt(run, stage, changed)
    return not changed


def note_attempt(run: Location, folder: str, fingerprint: dict[str, Any], *, binding: bool = True) -> None:
    """Write down what an attempt works with. One that failed by the user's mistake does not bind the next."""
    (run / folder / _ATTEMPT).write_text(json.dumps({"fingerprint": fingerprint, "binding": binding}))


def check_claim(run: Location) -> bool:
    """Whether the output is a run of ours; OutputError if it holds something else, which a stage might clear."""
    mark = run / CONFIG_FILE
    with translated(run, OutputError):
        if mark.exists():
            if not mark.read_text().startswith(CONFIG_HEAD):
                raise OutputError(f"{mark} was not written by davir_ray; choose an empty or a new --output")
            return True
        taken = [name for names in FOLDERS.values() for name in (*names, "manifests") if (run / name).exists()]
    if taken:
        raise OutputError(f"{run} holds {taken[0]} but no run of davir_ray; choose an empty or a new --output")
    return False


def claim(run: Location, config: str) -> None:
    """Make the output ours."""
    if not check_claim(run):
        with translated(run, OutputError):
            remember(run, config)


def remember(run: Location, config: str) -> None:
    """Write the resolved configuration of the last command into the run, once no stage can refuse it any more."""
    (run / CONFIG_FILE).write_text(CONFIG_HEAD + config)


def from_stage(stage: str) -> list[str]:
    """The stage and all that are made of it, directly or not."""
    found = [stage]
    for name in FOLDERS:
        if not set(_MADE_OF.get(name, ())).isdisjoint(found):
            found.append(name)
    return found


def leading_to(stage: str) -> list[str]:
    """All that a stage is made of, directly or not."""
    return [name for name in FOLDERS if name != stage and stage in from_stage(name)]


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
