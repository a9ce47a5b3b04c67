"""Trainings that differ in loss, seed or another setting, side by side: means over seeds with their 95 % intervals.

Pure functions: no files, no models.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from davir_ray.formulas.statistics import over_seeds
from davir_ray.report.alignment import NAMES, PAPER
from davir_ray.run.files import digest
from davir_ray.run.manifest import differences

_NOT_SETTINGS = ("frozen",)
"""Of a fingerprint: the frozen policy's losses, whose last bits may differ between machines."""

_LIMITS = {
    "accuracy": (0.0, 1.0),
    "margin": (-math.inf, math.inf),
    "pearson": (-1.0, 1.0),
    "spearman": (-1.0, 1.0),
    "plain": (-1.0, 1.0),
}
"""Figures of a row of the table, and the range that each cannot leave."""


@dataclass(frozen=True)
class Trained:
    """A finished preference training."""

    place: str
    fingerprint: Mapping[str, Any]
    """Of its align stage."""
    details: Mapping[str, Any]
    """Of the same: loss and beta."""
    parts: Mapping[str, Mapping[str, Any]]
    """Its margins in figures: see `parts_of` in report/alignment.py."""

    @property
    def settings(self) -> dict[str, Any]:
        """What the policy depends on, its seed among them: equal for one training done twice.

        A default beta is the number that it stands for; DavIR-DPO's is a median of the frozen losses.
        """
        kept = {name: value for name, value in self.fingerprint.items() if name not in _NOT_SETTINGS}
        if self.details["loss"] == "davir_dpo":
            return kept
        return {**kept, "objective": {**kept["objective"], "beta": self.details["beta"]}}

    @property
    def without_seed(self) -> dict[str, Any]:
        """Equal for trainings that are one setting with several seeds."""
        recipe = {name: value for name, value in self.settings["recipe"].items() if name != "seed"}
        return {**self.settings, "recipe": recipe}


def sweep_table(trained: Sequence[Trained]) -> list[dict[str, Any]]:
    """A row for each setting, in the order in which they come: its figures over the trainings that have it.

    A training that is there twice counts once. A figure is {"mean", "interval"}: Student's t over the seeds; no
    interval for one seed, neither where a seed has no such figure.
    """
    once: dict[str, Trained] = {}
    for one in trained:
        once.setdefault(digest(one.settings), one)
    groups: dict[str, list[Trained]] = {}
    for one in once.values():
        groups.setdefault(digest(one.without_seed), []).append(one)
    return [_row(group, trained[0]) for group in groups.values()]


def _row(group: list[Trained], first: Trained) -> dict[str, Any]:
    loss = group[0].details["loss"]
    lines = differences(first.without_seed, group[0].without_seed)
    parts = [part for part in ("trained", "held_out") if all(part in one.parts for one in group)]
    return {
        "loss": loss,
        "loss_name": NAMES[loss],
        "beta": group[0].details["beta"],
        "paper": PAPER.get(loss),
        "differs": [line for line in lines if not line.startswith(("objective.loss: ", "objective.beta: "))],
        "seeds": [one.settings["recipe"]["seed"] for one in group],
        "places": [one.place for one in group],
        "parts": {part: _figures([one.parts[part] for one in group]) for part in parts},
    }


def _figures(parts: list[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    values = [
        {
            "accuracy": part["accuracy"],
            "margin": part["margin"],
            "pearson": part["length"]["pearson"],
            "spearman": part["length"]["spearman"],
            "plain": part["length_of_gains"]["pearson"],
        }
        for part in parts
    ]
    return {name: _figure([of_one[name] for of_one in values], *limits) for name, limits in _LIMITS.items()}


def _figure(values: list[float | None], least: float, most: float) -> dict[str, Any]:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return {"mean": None, "interval": None}
    interval = over_seeds(known)
    return {"mean": float(np.mean(known)), "interval": interval and list(interval.clipped(least, most))}
