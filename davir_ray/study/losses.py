"""Does a cleaner set train a better model here? Small fine-tunes on draws from the pools, and their held-out loss.

First a gate: draws of clean rows alone against draws of all rows. If even these do not differ, no score can show its
worth in the held-out loss of this base, and that is the result. Where they differ, the selections are compared. All
draws have the same number of response tokens, as nearly as whole rows allow.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from scipy import stats

from davir_ray.benchmarks.workload import prepared_rows
from davir_ray.config.training import FinetuneConfig
from davir_ray.formulas.length_matching import matched_draw
from davir_ray.models.checkpoint import Checkpoint
from davir_ray.models.kernel.likelihood import TOKENS_PER_PACK
from davir_ray.models.training.examples import TrainingSet
from davir_ray.models.training.loop import Trainer
from davir_ray.models.training.model import trainable
from davir_ray.schema import EXAMPLES
from davir_ray.study.detection import MeanInterval
from davir_ray.study.runs import MAX_TOKENS, TOP_FRACTION

NUM_DRAWS = 12
"""Draws of each arm of the gate, dealt to the pools in turn."""

GATE_P = 0.05

GATE_ARMS = ("clean", "all")
_EPOCHS = 3
_LEARNING_RATE_SHARE = 0.3
"""Of the references' learning rate: a draw has a sixteenth of their rows."""

LENGTH_EDGES = [8, 16, 32, 64, 128]
"""Edges of the ranges of response tokens in which random rows match a selection."""

Ints = npt.NDArray[np.int64]


def loss_tables(
    base: Path, pools: Sequence[tuple[Path, pa.Table]], held_out: Path, recipe: FinetuneConfig, folder: Path
) -> str:
    """The gate's losses and, where it opens, those of the selections; what is in the folder is not trained again.

    `pools` are a pool's file and the table of its rows (rows_of).
    """
    folder.mkdir(exist_ok=True)
    trials = _Trials(Checkpoint.find(str(base)), held_out, recipe, folder)
    prepared = [trials.prepare(pool) for pool, _ in pools]
    draws = range(NUM_DRAWS)
    gate = {
        arm: [trials.loss(arm, draw, prepared[draw % len(pools)], _drawn(arm, draw, pools[draw % len(pools)][1]))
              for draw in draws]
        for arm in GATE_ARMS
    }  # fmt: skip
    lines = ["held-out loss, nats a response token, after training on 6 % of a pool", *_lines(gate)]
    difference = stats.ttest_ind(gate["clean"], gate["all"], equal_var=False)
    low, high = difference.confidence_interval()
    lines.append(
        f"gate, clean - all: {np.mean(gate['clean']) - np.mean(gate['all']):+.4f} [{low:.4f}, {high:.4f}], "
        f"p = {difference.pvalue:.3f}, resolves {(high - low) / 2:.4f}"
    )
    if not difference.pvalue < GATE_P:
        return "\n".join([*lines, "even clean rows alone do not differ: no selection can be judged by its loss here"])
    selections = {
        name: [trials.loss(name, number, examples, _selected(name, number, examples, rows))
               for number, (examples, (_, rows)) in enumerate(zip(prepared, pools, strict=True))]
        for name in ("one", "two", "random")
    }  # fmt: skip
    return "\n".join([*lines, *_lines(selections), *_against_random(selections)])


class _Trials:
    """Fine-tunes of one base, measured on the same held-out rows."""

    def __init__(self, base: Checkpoint, held_out: Path, recipe: FinetuneConfig, folder: Path) -> None:
        self._base = base
        self._recipe = replace(recipe, epochs=_EPOCHS, learning_rate=_LEARNING_RATE_SHARE * recipe.learning_rate)
        self._folder = folder
        self._held_out = TrainingSet.of([self.prepare(held_out)])

    def prepare(self, file: Path) -> pa.Table:
        """The rows of a file, in its order, as examples."""
        found = prepared_rows(str(file), "prompt_response", MAX_TOKENS, self._base.tokenizer())
        return pa.Table.from_pylist([row for rows in found for row in rows], EXAMPLES)

    def loss(self, arm: str, number: int, examples: pa.Table, order: Ints) -> float:
        """The held-out loss after training on the first rows of an order: as many tokens as 6 % of all rows have."""
        kept = self._folder / f"{arm}-{number}.json"
        if not kept.exists():
            tokens, chosen = _lengths(examples), _first(order, examples)
            loss = self._trained(examples.take(pa.array(chosen)), number)
            kept.write_text(json.dumps({"loss": loss, "tokens": int(tokens[chosen].sum()), "rows": chosen.tolist()}))
        return float(json.loads(kept.read_text())["loss"])

    def _trained(self, examples: pa.Table, seed: int) -> float:
        recipe = replace(self._recipe, seed=seed)
        likelihood = trainable(self._base, recipe, torch.float32, torch.device("cpu"), dropout=False)
        for _ in Trainer(likelihood, TrainingSet.of([examples]), recipe).steps():
            pass
        likelihood.eval()
        every = np.argsort(self._held_out.lengths, kind="stable")
        packs = np.array_split(every, 1 + int(self._held_out.lengths.sum()) // TOKENS_PER_PACK["cpu"])
        with torch.inference_mode():
            total = sum(float(likelihood(self._held_out.pack(rows)).double().sum()) for rows in packs)
        return total / self._held_out.weight(every)


def _lengths(examples: pa.Table) -> Ints:
    return np.asarray(examples["num_response_tokens"]).astype(np.int64)


def _first(order: Ints, examples: pa.Table) -> Ints:
    """The first rows of an order whose number of response tokens is nearest to 6 % of those of all rows."""
    tokens = _lengths(examples)
    return order[: 1 + int(np.abs(np.cumsum(tokens[order]) - TOP_FRACTION * tokens.sum()).argmin())]


def _drawn(arm: str, draw: int, rows: pa.Table) -> Ints:
    """A random order of the pool's rows, or of its clean ones."""
    places = np.arange(rows.num_rows)
    if arm == "clean":
        places = places[np.asarray(rows["planted_class"]) == "clean"]
    return np.random.default_rng([2, draw]).permutation(places)


def _selected(name: str, number: int, examples: pa.Table, rows: pa.Table) -> Ints:
    """The best rows of a run, or random rows with the lengths of the paper's best."""
    score = np.asarray(rows["aligned_two_3" if name == "two" else "davir_one_3"])
    best = np.argsort(-np.nan_to_num(score, nan=-np.inf), kind="stable")
    if name != "random":
        return best
    lengths, keys = _lengths(examples), np.random.default_rng([3, number]).permutation(rows.num_rows)
    return matched_draw(keys.astype(np.uint64), lengths, lengths[_first(best, examples)], LENGTH_EDGES)


def _lines(losses: dict[str, list[float]]) -> list[str]:
    return [f"  {name:<10}{MeanInterval.of(values)}" for name, values in losses.items()]


def _against_random(losses: dict[str, list[float]]) -> list[str]:
    """Each selection minus the random rows of its pool."""
    return [
        f"  {name} - random: {MeanInterval.of(np.subtract(losses[name], losses['random']).tolist())}"
        for name in losses if name != "random"
    ]  # fmt: skip
