"""Measurements of a comparison, made in memory."""

from dataclasses import replace
from typing import Any

import numpy as np

from davir_ray.config.compare import TrialName
from davir_ray.report.measured import LOSS, ComparisonInputs, Measured, TrialFacts

TRIAL = TrialFacts(
    row_set=0, num_examples=100, num_shared=7, num_response_tokens=3000, num_trained_tokens=9000, num_steps=12,
    final_loss=1.25, seconds=4.0,
)  # fmt: skip
PAIRS = [("selection", "random"), ("selection", "lowest"), ("selection", "full"), ("lowest", "random")]
ARMS = {"selection": 1.0, "random": 1.5, "lowest": 2.0}


def distinct(num: int) -> np.ndarray:
    """Hashes of so many prompts."""
    return np.random.default_rng(num).integers(0, 2**63 - 1, num)


def trial_names(sizes: tuple[int, ...] = (100,), readings: tuple[str, ...] = ("epochs", "steps")) -> list[TrialName]:
    names = [
        TrialName(arm, rows, reading, seed)
        for arm in ARMS for rows in sizes for reading in readings for seed in range(3)
    ]  # fmt: skip
    return names + [TrialName("full", 1000, "epochs", seed) for seed in range(3)]


def comparison_inputs(names: list[TrialName] | None = None, **fields: Any) -> ComparisonInputs:
    """Two sources, 60 held-out examples, the selection better than the rest."""
    draw = np.random.default_rng(0)
    names = names or trial_names()
    tokens = draw.integers(1, 50, 60).astype(float)
    difficulty = draw.normal(0, 0.2, 60)
    values = {
        name: tokens * (ARMS.get(name.arm, 1.4) + difficulty + draw.normal(0, 0.02) + draw.normal(0, 0.1, 60))
        for name in names
    }
    sources = np.array(["alpaca"] * 40 + ["gsm8k"] * 20)
    drawn = {name: replace(TRIAL, row_set=name.seed if name.arm == "random" else 0) for name in names}
    inputs = ComparisonInputs(
        settings={"seeds": 3, "arms": list(ARMS)},
        run="run1",
        base="tiny-base",
        recipe={"epochs": 3},
        heldout={"read": 66, "left_out": 2, "rejected": 1, "prepared": 63},
        in_training_pool=2,
        in_pool_by_reason={"word_for_word": 1, "same_prompt": 0, "near_copy": 1},
        num_pool_rows_not_read=7,
        trials=drawn,
        pairs=PAIRS,
        margins={"loss": 0.02, "exact_match": 0.02},
        measures=[
            Measured(
                measure=LOSS,
                sources=sources,
                prompts=distinct(60),
                lengths=tokens.astype(np.int64),
                weights=tokens,
                values=values,
                base=tokens * 3,
                without_value=1,
            )
        ],
    )
    return replace(inputs, **fields)
