"""The tables of the study, and what its rules make of them. The rules were written down before it ran:

1. Folds are advised from 3 epochs on if, at 3 epochs, the reference that has not seen a row is better by at least 0.05
   AUROC (clean above exchanged copies) than the one that has, with an interval above 0 on the small base, and has the
   same sign with a base that is given. They are not advised if the interval's upper bound is below 0.03.
2. Folds are never the default if they lower the AUROC of the rare class (above all exchanged rows) by more than 0.05.
"""

from collections.abc import Sequence

import pyarrow as pa

from davir_ray.study.detection import MeanInterval, auroc, shares
from davir_ray.study.runs import FOUR, ONE, TWO, Plan

ADVISED, NOT_ADVISED, RARE_LOSS = 0.05, 0.03, 0.05
RULE_EPOCHS = 3

CLEAN = ("clean",)
NOISE = ("exchanged", "exchanged_copies", "exchanged_near")
COMPARED = {
    "clean above exchanged copies": (CLEAN, ("exchanged_copies",)),
    "clean above exchanged near copies": (CLEAN, ("exchanged_near",)),
    "clean above exchanged": (CLEAN, ("exchanged",)),
    "clean copies above clean": (("clean_copies",), CLEAN),
    "rare above all exchanged": (("rare",), NOISE),
}
PRIMARY, RARE = "clean above exchanged copies", "rare above all exchanged"


def detection_tables(replicates: Sequence[pa.Table], plan: Plan) -> str:
    """AUROCs and shares of the selection, means over replicates with 95 % intervals, and the verdicts."""
    lines = []
    for title, (first, second) in COMPARED.items():
        lines += ["", f"AUROC, {title}", *(f"  {name:<28}{over(replicates, score, first, second)}"
                                           for name, score in _scores(plan).items())]  # fmt: skip
    lines += ["", "share of each class in the best 6 %"]
    for way, epochs in plan.runs:
        by_replicate = [shares(rows, f"selected_{way.name}_{epochs}") for rows in replicates]
        mean = {name: sum(each[name] for each in by_replicate) / len(by_replicate) for name in by_replicate[0]}
        lines.append(f"  {f'{way.name}, {epochs} epochs':<28}" + ", ".join(f"{k} {v:.1%}" for k, v in mean.items()))
    return "\n".join([*lines, "", *verdicts(replicates, plan)])


def verdicts(replicates: Sequence[pa.Table], plan: Plan) -> list[str]:
    """What the rules say, with the figures that they rest on; nothing where the study has no runs of 3 epochs."""
    if RULE_EPOCHS not in plan.epochs:
        return []
    unseen, seen, one = (f"{name}_{RULE_EPOCHS}" for name in ("davir_two", "seen_two", "davir_one"))
    gain = difference(replicates, unseen, seen, *COMPARED[PRIMARY])
    against_one = difference(replicates, unseen, one, *COMPARED[PRIMARY])
    rare = difference(replicates, unseen, one, *COMPARED[RARE])
    if gain.mean >= ADVISED and gain.low > 0:
        advice = "two folds are advised from 3 epochs on, if a larger base (--base) shows the same sign"
    elif gain.high < NOT_ADVISED:
        advice = "two folds are not advised"
    else:
        advice = "the study does not decide"
    default = "never the default" if rare.mean < -RARE_LOSS else "the rare class does not speak against them"
    return [
        f"primary, unseen - seen at {RULE_EPOCHS} epochs, {PRIMARY}: {gain}: {advice}",
        f"unseen - one reference: {against_one}",
        f"unseen - one reference, {RARE}: {rare}: {default}",
    ]


def over(replicates: Sequence[pa.Table], score: str, first: Sequence[str], second: Sequence[str]) -> MeanInterval:
    """The AUROC of a score over the replicates."""
    return MeanInterval.of([auroc(rows, score, first, second) for rows in replicates])


def difference(
    replicates: Sequence[pa.Table], score: str, other: str, first: Sequence[str], second: Sequence[str]
) -> MeanInterval:
    """The AUROC of one score minus that of another, paired by replicate."""
    return MeanInterval.of(
        [auroc(rows, score, first, second) - auroc(rows, other, first, second) for rows in replicates]
    )


def _scores(plan: Plan) -> dict[str, str]:
    """The column of each score that is compared, by its name in the tables."""
    columns = {}
    for epochs in plan.epochs:
        columns[f"one, {epochs} epochs"] = f"davir_{ONE.name}_{epochs}"
        columns[f"two, unseen, {epochs} epochs"] = f"davir_{TWO.name}_{epochs}"
        columns[f"two, aligned, {epochs} epochs"] = f"aligned_{TWO.name}_{epochs}"
        columns[f"two, seen, {epochs} epochs"] = f"seen_{TWO.name}_{epochs}"
    for epochs in plan.four_folds:
        columns[f"four, unseen, {epochs} epochs"] = f"davir_{FOUR.name}_{epochs}"
        columns[f"four, aligned, {epochs} epochs"] = f"aligned_{FOUR.name}_{epochs}"
    return columns | {"base's mean loss": "base_mean_nll", "IFD": "ifd"}
