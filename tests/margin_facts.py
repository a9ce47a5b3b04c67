"""Margins and manifests of preference training, made in memory, and the facts of their report."""

from typing import Any

import numpy as np
import pyarrow as pa
from run_facts import manifest

from davir_ray.report.alignment import alignment_facts
from davir_ray.schema import MARGINS, Status

CURVE = [[step, 0.7 - step / 1000] for step in range(1, 101)]


def margin_table(count: int = 200, unknown: int = 3, *, seed: int = 0, shift: float = 0.0) -> pa.Table:
    """Pairs of which every fifth prompt is held out; the margin grows with the chosen response's length.

    Two pairs have the same prompt. Tables of other seeds have the same pairs with other margins, from `shift` on.
    """
    draw = np.random.default_rng(0)
    lengths = draw.integers(1, 300, (count, 2))
    draw = np.random.default_rng([1, seed])
    margin = shift + 0.01 * (lengths[:, 0] - lengths[:, 1]) + draw.normal(0, 1, count)
    known = np.arange(count) >= unknown
    values = {name: draw.normal(-100, 10, count) for name in MARGINS.names if name.startswith(("frozen_", "policy_"))}
    values |= {"margin": margin, "chosen_reward": margin, "rejected_reward": 0 * margin, "loss": np.exp(-margin)}
    columns = {
        "pair_id": pa.array(range(count), pa.int64()),
        "prompt_hash": pa.array([1_000_003 * (number // 2) for number in range(count)], pa.int64()),
        "source": pa.repeat("hh", count),
        "held_out": pa.array([number // 2 % 5 == 0 for number in range(count)]),
        "num_chosen_tokens": pa.array(lengths[:, 0], pa.int32()),
        "num_rejected_tokens": pa.array(lengths[:, 1], pa.int32()),
        "status": pa.array([Status.OK if ok else Status.OUT_OF_MEMORY for ok in known], pa.string()),
        **{name: pa.array(value, pa.float64(), mask=~known) for name, value in values.items()},
    }
    return pa.table({name: columns[name] for name in MARGINS.names}, schema=MARGINS)


def manifests(loss: str = "dpo") -> dict[str, dict[str, Any]]:
    measures = dict.fromkeys(("accuracy", "margin", "chosen_logprob", "rejected_logprob"), CURVE)
    return {
        "prepare": manifest({"read": 210, "prepared": 400, "rejected": 10}),
        "margins": manifest({"pairs": 200, "measured": 197}),
        "align": manifest(
            {"pairs": 160, "steps": 100}, loss=loss, beta=0.1, loss_by_step=CURVE, measures_by_step=measures
        ),
    }


def facts_of(table: pa.Table, loss: str = "dpo", **settings: Any) -> dict[str, Any]:
    return alignment_facts(table, table.num_rows, manifests(loss), {"base": "tiny", **settings})
