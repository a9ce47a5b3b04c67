"""A selection compared with the planted truth: the shares of the classes in it and in a random selection."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from davir_ray.demo.world import CLASSES, InstructionRow
from davir_ray.run.files import read_parquet
from davir_ray.run.folder import Run

MEASURES = ("rho_sum", "rho_mean", "davir")


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


def format_truth(
    shares: Sequence[ClassShare], correlations: Mapping[str, Mapping[str, float]], run: Run, seconds: float
) -> str:
    """The text for the terminal: shares by class, correlations with length, paths of the results."""
    lines = ["", f"{'class':<18}{'rows':>6}{'of all':>10}{'selected':>10}{'random':>10}{'mean davir':>12}"]
    for share in shares:
        parts = (share.share_of_all, share.share_of_selected, share.share_of_random)
        mean = "-" if share.mean_davir is None else f"{share.mean_davir:+.3f}"
        lines.append(f"{share.name:<18}{share.rows:>6}{''.join(f'{part:>10.1%}' for part in parts)}{mean:>12}")
    lines += ["", f"{'Spearman correlation with response length':<44}{''.join(f'{name:>10}' for name in MEASURES)}"]
    for name, values in correlations.items():
        lines.append(f"  {name:<42}{''.join(f'{values[measure]:>+10.2f}' for measure in MEASURES)}")
    lines += ["", f"selected: {run / 'selected'}", f"report:   {run / 'report.html'}", f"{seconds:.0f} seconds in all"]
    return "\n".join(lines)


def shares_of_run(run: Run, rows: Sequence[InstructionRow], seed: int) -> list[ClassShare]:
    """The shares of the classes in a finished run; `rows` are in the order of the source file."""
    davir: list[float | None] = [None] * len(rows)
    for row in _scored_rows(run):
        davir[row["source_row"]] = row["davir"]
    selected = {row["source_row"] for row in _rows(run, "selected", ["source_row"])}
    return class_shares([row.planted_class for row in rows], davir, [i in selected for i in range(len(rows))], seed)


def length_correlations(run: Run, rows: Sequence[InstructionRow]) -> dict[str, dict[str, float]]:
    """Spearman correlation of each measure with response tokens, over all rows and over the learnable ones.

    Over all rows, the classes that the fine-tune makes worse hide the correlation in the class that improves.
    """
    scored = _scored_rows(run)
    learnable = [row for row in scored if rows[row["source_row"]].planted_class == "learnable"]
    return {"all rows": _correlations(scored), "learnable rows": _correlations(learnable)}


def _correlations(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    lengths = [row["num_response_tokens"] for row in rows]
    return {name: float(spearmanr(lengths, [row[name] for row in rows]).statistic) for name in MEASURES}


def _scored_rows(run: Run) -> list[dict[str, Any]]:
    """Rows of scores/ that have a score, with their row in the source file; examples/ has the same row order."""
    scores = _rows(run, "scores", ["num_response_tokens", *MEASURES])
    places = _rows(run, "examples", ["source_row"])
    return [score | place for score, place in zip(scores, places, strict=True) if score["davir"] is not None]


def _rows(run: Run, folder: str, columns: list[str]) -> list[dict[str, Any]]:
    place = run / folder
    return [row for name in place.names(".parquet") for row in read_parquet(place / name, columns).to_pylist()]
