"""A selection compared with the planted truth: the shares of the classes in it and in a random selection."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import mannwhitneyu

from davir_ray.demo.world import CLASSES, NUM_COPIES, InstructionRow
from davir_ray.run.files import read_parquet
from davir_ray.run.folder import Run


@dataclass(frozen=True, kw_only=True)
class ClassShare:
    """The share of one class in the whole set, in the selection and in a random selection of the same size."""

    name: str
    rows: int
    share_of_all: float
    share_of_selected: float
    share_of_random: float
    mean_davir: float | None
    """Mean over the rows of the class that have a score; None if none has."""


@dataclass(frozen=True, kw_only=True)
class Way:
    """What one way of scoring selects."""

    title: str
    run: Run
    shares: list[ClassShare]
    auroc: float
    """Probability that a learnable row has a higher davir than a copy of a wrong answer; 0.5 is chance."""


def class_shares(
    planted: Sequence[str], davir: Sequence[float | None], selected: Sequence[bool], seed: int
) -> list[ClassShare]:
    """Compare the classes of the selection with those of the whole and of a random selection of the same size.

    The three sequences have an element for each row. `davir` is None where a row has no score; such rows are excluded
    from the random selection, as they are from the real one. The classes are in the order of CLASSES, then others by
    name. Raises ValueError if nothing is selected.
    """
    classes, chosen = np.asarray(planted), np.asarray(selected, dtype=bool)
    scores = np.array([np.nan if score is None else score for score in davir], dtype=np.float64)
    if not chosen.any():
        raise ValueError("no row is selected; there are no shares to compare")
    is_scored = ~np.isnan(scores)
    control = np.random.default_rng(seed).choice(np.flatnonzero(is_scored), size=int(chosen.sum()), replace=False)
    names = [*CLASSES, *sorted(set(planted) - set(CLASSES))]
    return [
        ClassShare(
            name=name,
            rows=int(member.sum()),
            share_of_all=float(member.mean()),
            share_of_selected=float(member[chosen].mean()),
            share_of_random=float(member[control].mean()),
            mean_davir=float(scores[member & is_scored].mean()) if (member & is_scored).any() else None,
        )
        for name, member in ((name, classes == name) for name in names)
        if member.any()
    ]


def way_of(title: str, run: Run, rows: Sequence[InstructionRow], seed: int) -> Way:
    """What a finished run selects; `rows` are in the order of the source file."""
    davir: list[float | None] = [None] * len(rows)
    for place, score in zip(_column(run, "examples", "source_row"), _column(run, "scores", "davir"), strict=True):
        davir[place] = score  # both folders have the same rows in the same order
    selected, planted = set(_column(run, "selected", "source_row")), [row.planted_class for row in rows]
    of_class = {
        name: [score for score, own in zip(davir, planted, strict=True) if own == name and score is not None]
        for name in CLASSES
    }
    learnable, copies = of_class["learnable"], of_class["noise_duplicates"]
    return Way(
        title=title,
        run=run,
        shares=class_shares(planted, davir, [at in selected for at in range(len(rows))], seed),
        auroc=float(mannwhitneyu(learnable, copies).statistic / (len(learnable) * len(copies))),
    )


def format_truth(ways: Sequence[Way], seconds: float) -> str:
    """The text for the terminal: what each way selects, and where its report is."""
    columns = "".join(f"{way.title:>13}" for way in ways)
    lines = ["", f"{'class':<18}{'rows':>6}{'random':>10}{columns}"]
    for of_ways in zip(*(way.shares for way in ways), strict=True):
        parts = "".join(f"{share.share_of_selected:>13.1%}" for share in of_ways)
        lines.append(f"{of_ways[0].name:<18}{of_ways[0].rows:>6}{of_ways[0].share_of_random:>10.1%}{parts}")
    lines += [
        f"{'AUROC, learnable above copies':<34}{''.join(f'{way.auroc:>13.2f}' for way in ways)}",
        "",
        f"noise_duplicates are wrong answers, each {NUM_COPIES} times: so many, on purpose, that a fine-tune memorises",
        "them. The paper's one reference has seen all that it scores. With two folds (--prepare.folds 2), each row is",
        "scored by a reference that has seen neither it nor a copy of it.",
        "",
        *(f"{way.title + ':':<13}{way.run / 'report.html'}" for way in ways),
        f"{seconds:.0f} seconds in all",
    ]
    return "\n".join(lines)


def _column(run: Run, folder: str, column: str) -> list[Any]:
    tables = [read_parquet(run / folder / name, [column]) for name in (run / folder).names(".parquet")]
    return [value for table in tables for value in table[column].to_pylist()]
