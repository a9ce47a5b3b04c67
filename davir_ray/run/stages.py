"""The table of stages: what each reads, what it writes in the folder of a run, and which counts status shows.

A run has the stages that its job needs. Each is listed after all those that it reads.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One arrow of the flow: reads files of earlier stages, writes files in its own folders, its manifest last."""

    name: str
    writes: tuple[str, ...] = ()
    """Folders and files of the run that belong to the stage and are removed when it is redone."""
    reads: tuple[str, ...] = ()
    """The stages whose files it reads."""
    shown_counts: tuple[str, ...] = ()
    """Counts of its manifest that jobs/status.py shows."""
    takes_hours: bool = False
    """Whether its result is replaced only with --overwrite. The others take seconds: selecting 3 % after 6 % needs no
    flag."""


_STAGES = (
    Stage(
        name="prepare", writes=("examples", "rejects", "prepare_tasks"),
        shown_counts=("prepared", "left_out", "near_duplicates", "rejected"), takes_hours=True,
    ),
    Stage(
        name="freeze", writes=("frozen", "frozen_commits", "frozen_cache"), reads=("prepare",),
        shown_counts=("scored",), takes_hours=True,
    ),
    Stage(
        name="align", writes=("checkpoints", "policy", "policy_epochs"), reads=("freeze",),
        shown_counts=("pairs", "steps"), takes_hours=True,
    ),
    Stage(
        name="finetune", reads=("prepare",),
        writes=("checkpoints", "reference", "reference_epochs", "reference_folds", "reference_folds_epochs"),
        shown_counts=("references", "steps"), takes_hours=True,
    ),
    Stage(
        name="score", writes=("scores", "scores_commits"), reads=("prepare", "align", "finetune"),
        shown_counts=("scored",), takes_hours=True,
    ),
    Stage(
        name="seen", writes=("extra/seen", "extra/seen_commits"), reads=("prepare", "finetune"),
        shown_counts=("scored",), takes_hours=True,
    ),
    Stage(
        name="ifd", writes=("extra/ifd", "extra/ifd_commits"), reads=("prepare", "score"), shown_counts=("scored",),
        takes_hours=True,
    ),
    Stage(
        name="anchor", writes=("extra/anchor", "extra/anchor_commits"), reads=("prepare", "score"),
        shown_counts=("scored",), takes_hours=True,
    ),
    Stage(name="davir_aligned", writes=("extra/davir_aligned",), reads=("prepare", "score", "anchor")),
    Stage(
        name="repeats", writes=("extra/repeats", "extra/repeats_places"), reads=("prepare", "score", "davir_aligned"),
        shown_counts=("runs",),
    ),
    Stage(name="margins", writes=("margins",), reads=("score",), shown_counts=("measured",)),
    Stage(
        name="rank", writes=("ranked",), reads=("score", "ifd", "davir_aligned", "repeats"), shown_counts=("ranked",),
    ),
    Stage(
        name="select", writes=("selected", "duplicates", "mixture", "jsonl"), reads=("rank",),
        shown_counts=("selected",),
    ),
    Stage(name="stability", reads=("repeats", "select"), shown_counts=("near_cut",)),
    Stage(name="report", writes=("report.html", "report.json"), reads=("margins", "select", "seen", "stability")),
    # The following are stages of a comparison, or of one of its fine-tunes.
    Stage(name="generate", writes=("generations", "generations_commits"), reads=("prepare",), takes_hours=True),
    Stage(name="match", writes=("matches",), reads=("generate",)),
    Stage(name="outputs", writes=("outputs.json",), reads=("generate",)),
    Stage(name="trial"),
    Stage(name="compare", shown_counts=("arms",)),
)  # fmt: skip

STAGES = {stage.name: stage for stage in _STAGES}


def from_stage(name: str) -> list[str]:
    """The stage and all that read it, directly or not."""
    found = [name]
    for stage in STAGES.values():
        if not set(stage.reads).isdisjoint(found):
            found.append(stage.name)
    return found


def leading_to(name: str) -> list[str]:
    """All stages that a stage reads, directly or not."""
    return [stage for stage in STAGES if stage != name and name in from_stage(stage)]
