"""The sets of rows of a comparison: which of them a model is trained on, how long, and how they overlap.

The rows of a ranked arm (selection, lowest, rho, order:ORDER) come from each run in turn, those of a drawn arm (random,
random_matched) are drawn from the first run's pool; the full set is the first run's own examples.
"""

import logging
from collections import Counter, defaultdict
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from davir_ray.compare.arms import FinishedRun, RowSet, write_set
from davir_ray.config.compare import DRAWN, MAX_PASSES, CompareConfig, folder_name
from davir_ray.config.training import FinetuneConfig
from davir_ray.errors import ConfigError
from davir_ray.models.training.loop import num_steps, steps_for
from davir_ray.run.folder import Run
from davir_ray.schema import Status

log = logging.getLogger(__name__)


class RowSets:
    """The sets of a comparison, each of which is found and written once."""

    def __init__(self, config: CompareConfig, runs: list[FinishedRun], output: Run) -> None:
        self._config = config
        self._runs = runs
        self._output = output
        self._own = runs[0].selection(None)
        self._selections: dict[int, list[pa.Table]] = {}
        self._written: dict[str, RowSet] = {}

    @property
    def sizes(self) -> list[int]:
        """Sizes of the selection, in rows as `sizes` counts them."""
        return self._config.sizes or [self._runs[0].size_of(self._own)]

    def selections(self, size: int) -> list[pa.Table]:
        """What the rule of each run selects at a size. ConfigError if there are too few rows."""
        if size not in self._selections:
            self._selections[size] = [self._selected(run, size) for run in self._runs]
        return self._selections[size]

    def _selected(self, run: FinishedRun, size: int) -> pa.Table:
        own = self._own if run is self._runs[0] else run.selection(None)
        selection = own if run.size_of(own) == size else run.selection(size)
        if (possible := run.size_of(selection)) != size:
            named = f"sizes has {size}" if self._config.sizes else f"{self._runs[0].run} selects {size} rows"
            raise ConfigError(f"{named}, but the rule of {run.run} can take only {possible} rows; leave it out")
        return selection

    def of(self, arm: str, size: int, model: int) -> RowSet:
        """The set that a model of an arm is trained on at a size of the selection."""
        number = self._config.row_set(arm, model)
        suffix = f"-seed{number}" if arm in DRAWN else f"-run{number}" if number else ""
        name = f"{folder_name(arm)}-{size}{suffix}"
        if name not in self._written:
            self._written[name] = self._write(name, arm, size, number)
        return self._written[name]

    def _write(self, name: str, arm: str, size: int, number: int) -> RowSet:
        """Find the rows of a set and write them."""
        selections, is_drawn = self.selections(size), arm in DRAWN
        finished = self._runs[0 if is_drawn else number]
        # The lengths of random_matched are those of each run's selection in turn.
        selection = selections[number % len(selections) if arm != "random" else 0]
        without = None
        if is_drawn and self._config.outside_selection:
            without = np.unique(np.concatenate([_ids(table) for table in selections]))
        ids = finished.rows_of(arm, selection, number, without=without, match_prompts=self._config.match_prompts)
        examples = self._output.within(f"sets/{name}")
        write_set(examples, finished, ids)
        num_shared = int(np.isin(ids, _ids(selections[0])).sum())
        return _row_set(number, examples, finished, num_shared)

    @cached_property
    def full(self) -> RowSet:
        """Every prepared example; of a mixture, all rows of its sources with their repeats.

        It is compared with the selections of all sizes; the rows that it shares are counted at the first.
        """
        first, examples = self._runs[0], self._runs[0].run
        if first.repeats:
            examples = self._output.within("sets/full")
            write_set(examples, first, None)
        return _row_set(0, examples, first, self.selections(self.sizes[0])[0].num_rows)

    def max_steps(self, reading: str, size: int, rows: RowSet, recipe: FinetuneConfig) -> int | None:
        """Number of steps of a schedule on a set; None: those of the recipe's epochs.

        `tokens`: the expected response tokens of as many rows drawn as those of `random`, in the recipe's epochs, so
        that an arm of short responses takes more steps.
        """
        if reading == "epochs":
            return None
        full = self.full
        if reading == "steps":
            return num_steps(full.num_trainable, recipe.batch_size, recipe.epochs)
        budget = rows.num_rows * recipe.epochs * self._mean_tokens(size)
        per_row = max(1, rows.num_response_tokens) / max(1, rows.num_trainable)
        return steps_for(budget / per_row, max(1, rows.num_trainable), recipe.batch_size)

    @cached_property
    def _mean_by_group(self) -> dict[str, float]:
        full = self.full.num_response_tokens / max(1, self.full.num_trainable)
        return defaultdict(lambda: full, self._runs[0].mean_tokens() or {})

    def _mean_tokens(self, size: int) -> float:
        """The expected response tokens of a row, with a mixture's repeats; the full set's if not all are ranked."""
        repeats = self._runs[0].repeats
        rows = {
            group: number * repeats.get(group, 1)
            for group, number in Counter(self.selections(size)[0]["group"].to_pylist()).items()
        }
        return sum(number * self._mean_by_group[group] for group, number in rows.items()) / sum(rows.values())

    def readings(self, size: int, recipe: FinetuneConfig) -> list[str]:
        """The schedules at a size: without `steps` where it takes more than MAX_PASSES passes over a set."""
        if "steps" not in self._config.readings:
            return list(self._config.readings)
        repeats = self._runs[0].repeats
        num_rows = sum(repeats.get(group, 1) for group in self.selections(size)[0]["group"].to_pylist())
        full_steps = num_steps(self.full.num_trainable, recipe.batch_size, recipe.epochs)
        passes = full_steps / num_steps(num_rows, recipe.batch_size, 1)
        if passes <= MAX_PASSES:
            return list(self._config.readings)
        log.warning(
            "compare: the schedule steps is left out for arms of %d rows: it takes %.0f passes over them, and more "
            "than %d would show how a model memorises", size, passes, MAX_PASSES,
        )  # fmt: skip
        return [reading for reading in self._config.readings if reading != "steps"]


def _row_set(number: int, examples: Run, finished: FinishedRun, num_shared: int) -> RowSet:
    counts = examples.require("prepare").counts
    num_trainable = counts.get("trainable")  # counted in a set that `write_set` wrote
    if num_trainable is None:
        num_trainable = counts["prepared"] - finished.run.require("score").counts.get(Status.NO_PREDICTOR, 0)
    return RowSet(
        number=number,
        examples=examples,
        num_rows=counts["prepared"],
        num_trainable=num_trainable,
        num_response_tokens=counts["num_response_tokens"],
        num_shared=num_shared,
    )


def _ids(selection: pa.Table) -> npt.NDArray[np.int64]:
    return np.asarray(selection["example_id"]).astype(np.int64)
