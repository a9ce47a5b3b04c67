"""The table of stages: what each writes in the folder of a run, what it is made of, and which counts a person wants.

A run has the stages that its job needs. They stand here in an order in which each comes after all that it is made of.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One arrow of the flow: files of earlier stages in, files in its own folders out, its manifest last."""

    name: str
    writes: tuple[str, ...] = ()
    """Folders and files of the run that belong to the stage, and are removed when it is redone."""
    made_of: tuple[str, ...] = ()
    """The stages whose files it reads."""
    shown_counts: tuple[str, ...] = ()
    """Counts of its manifest that jobs/status.py shows."""
    takes_hours: bool = False
    """Its result is not replaced without --overwrite. The others take seconds: 3 % after 6 % needs no flag."""


STAGES = {
    stage.name: stage
    for stage in (
        Stage(
            name="prepare",
            writes=("examples", "rejects", "prepare_tasks"),
            shown_counts=("prepared", "rejected"),
            takes_hours=True,
        ),
        Stage(
            name="freeze",
            writes=("frozen", "frozen_cache"),
            made_of=("prepare",),
            shown_counts=("scored",),
            takes_hours=True,
        ),
        Stage(
            name="align",
            writes=("checkpoints", "policy", "policy_epochs"),
            made_of=("freeze",),
            shown_counts=("pairs", "steps"),
            takes_hours=True,
        ),
        Stage(
            name="finetune",
            writes=("checkpoints", "reference", "reference_epochs"),
            made_of=("prepare",),
            shown_counts=("steps",),
            takes_hours=True,
        ),
        Stage(
            name="score",
            writes=("scores",),
            made_of=("prepare", "align", "finetune"),
            shown_counts=("scored",),
            takes_hours=True,
        ),
        Stage(name="margins", writes=("margins",), made_of=("score",), shown_counts=("measured",)),
        Stage(name="rank", writes=("ranked",), made_of=("score",), shown_counts=("ranked",)),
        Stage(
            name="select",
            writes=("selected", "duplicates", "mixture", "jsonl"),
            made_of=("rank",),
            shown_counts=("selected",),
        ),
        Stage(name="report", writes=("report.html", "report.json"), made_of=("margins", "select")),
        # The rest are stages of a comparison, or of one of its fine-tunes.
        Stage(name="generate", writes=("generations",), made_of=("prepare",), takes_hours=True),
        Stage(name="match", writes=("matches",), made_of=("generate",)),
        Stage(name="outputs", writes=("outputs.json",), made_of=("generate",)),
        Stage(name="trial"),
        Stage(name="compare", shown_counts=("arms",)),
    )
}


def from_stage(name: str) -> list[str]:
    """The stage and all that are made of it, directly or not."""
    found = [name]
    for stage in STAGES.values():
        if not set(stage.made_of).isdisjoint(found):
            found.append(stage.name)
    return found


def leading_to(name: str) -> list[str]:
    """All stages that a stage is made of, directly or not."""
    return [stage for stage in STAGES if stage != name and name in from_stage(stage)]
