"""The data of preference training: pairs with the frozen policy's log-probabilities, and the loss over them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch

from davir_ray.config.align import PAIR_LOSSES, AlignConfig
from davir_ray.errors import DataError, IntegrityError
from davir_ray.formulas.hashing import drawn
from davir_ray.formulas.losses import PairLogprobs, pair_loss
from davir_ray.models.kernel.likelihood import Pack
from davir_ray.models.training.arrays import ArrayFiles
from davir_ray.models.training.examples import TRAINING_COLUMNS, TrainingSet, write_examples
from davir_ray.schema import Status

PAIR_COLUMNS = [*TRAINING_COLUMNS, "pair_id", "prompt_hash", "num_response_tokens"]
"""Columns of examples that preference training reads."""

FROZEN_COLUMNS = ["example_id", "base_nll", "status"]
"""Columns of frozen/ that preference training reads; the frozen policy is the base."""

DAVIR_DPO_BETA = 0.1
"""The beta of DPO that DavIR-DPO matches: its gradient is DPO's at beta / |log-probability| (arXiv 2310.13008)."""


_KINDS: dict[str, type[np.generic]] = {
    "pair_ids": np.int64,
    "frozen_logprobs": np.float64,
    "num_response_tokens": np.int64,
}


def write_pairs(folder: Path, shards: Iterable[tuple[pa.Table, pa.Table]], heldout_fraction: float) -> None:
    """Write tables with PAIR_COLUMNS, each with a table of FROZEN_COLUMNS of the same rows, as the files of a PairSet.

    Held-out pairs, and pairs of which a response has no frozen log-probability, are left out. DataError if none is
    left.
    """
    files = ArrayFiles(folder, _KINDS)

    def written() -> Iterator[pa.Table]:
        for examples, frozen in shards:
            table = _usable(examples, frozen, heldout_fraction)
            files.append("pair_ids", np.asarray(table["pair_id"])[::2])
            files.append("frozen_logprobs", -np.asarray(table["base_nll"]))
            files.append("num_response_tokens", table["num_response_tokens"])
            yield table

    try:
        write_examples(folder, written())
    except DataError as error:
        none = "no pair can be trained on: none has frozen log-probabilities, or all are held out"
        raise DataError(none) from error


@dataclass(frozen=True, kw_only=True)
class PairSet:
    """Pairs mapped from files; both responses of a pair are in one pack, and the loss is the mean over pairs.

    The measures are means over a batch: the loss; the share of pairs whose chosen response has the higher reward; the
    margin and both rewards; the log-probability of both responses under the policy, in nats, summed over tokens.
    """

    examples: TrainingSet
    """Two for each pair: the chosen response, then the rejected one."""
    ids: npt.NDArray[np.int64]
    frozen_logprobs: npt.NDArray[np.float64]
    """Log-probability of each example under the frozen policy, in nats."""
    num_tokens: npt.NDArray[np.int64]
    """Number of scored tokens of each example."""
    loss: str
    beta: float

    measures: ClassVar[tuple[str, ...]] = (
        "loss", "accuracy", "margin", "chosen_reward", "rejected_reward", "chosen_logprob", "rejected_logprob",
    )  # fmt: skip

    @classmethod
    def mapped(cls, folder: Path, config: AlignConfig) -> Self:
        """The pairs that `write_pairs` wrote; the folder may be removed at once."""
        arrays = ArrayFiles(folder, _KINDS).mapped()
        return cls(
            examples=TrainingSet.mapped(folder),
            ids=arrays["pair_ids"],
            frozen_logprobs=arrays["frozen_logprobs"],
            num_tokens=arrays["num_response_tokens"],
            loss=config.loss,
            beta=beta_of(config, arrays["frozen_logprobs"]),
        )

    @classmethod
    def of(cls, shards: Iterable[tuple[pa.Table, pa.Table]], config: AlignConfig) -> Self:
        """The pairs of such tables as `write_pairs` takes, in files that nobody else sees."""
        with TemporaryDirectory(prefix="davir-training-", ignore_cleanup_errors=True) as folder:
            write_pairs(Path(folder), shards, config.heldout_fraction)
            return cls.mapped(Path(folder), config)

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Number of tokens of each pair."""
        return np.asarray(self.examples.lengths.reshape(-1, 2).sum(axis=1))

    @property
    def details(self) -> dict[str, Any]:
        """Details of the objective for the manifest."""
        return {"loss": self.loss, "beta": self.beta}

    @property
    def longest(self) -> int:
        """Number of tokens of the longest sequence."""
        return self.examples.longest

    def weight(self, rows: npt.NDArray[np.int64]) -> int:
        """The number of pairs: the loss is their mean."""
        return len(rows)

    def pack(self, rows: npt.NDArray[np.int64]) -> Pack:
        """Both responses of each pair, sorted by length: attention computes equal lengths together."""
        both = _both(rows)
        return self.examples.pack(both[self._order(both)])

    def sums(self, nll_R: torch.Tensor, rows: npt.NDArray[np.int64]) -> torch.Tensor:
        """The measures summed over the pairs of a pack, [7], in float64."""
        both = _both(rows)
        order = self._order(both)
        parts = torch.split(nll_R.double(), self.num_tokens[both[order]].tolist())
        in_order = _moved(np.argsort(order), nll_R.device)
        policy = -torch.stack([part.sum() for part in parts])[in_order]
        frozen, num_tokens = (_moved(of[both], nll_R.device) for of in (self.frozen_logprobs, self.num_tokens))
        logprobs = PairLogprobs(policy[::2], policy[1::2], frozen[::2], frozen[1::2])
        found = pair_loss(self.loss, logprobs, num_tokens[::2], num_tokens[1::2], self.beta)
        margin_N = found.chosen_reward_N - found.rejected_reward_N
        rewards, policies = (found.chosen_reward_N, found.rejected_reward_N), (policy[::2], policy[1::2])
        measured = (found.loss_N, (margin_N > 0).double(), margin_N, *rewards, *policies)
        return torch.stack([values_N.sum() for values_N in measured])

    def _order(self, both: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return np.argsort(self.examples.lengths[both], kind="stable")


def _moved(values: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """The values on a device; copied to a GPU from pinned memory, or the CPU would wait for the forward pass."""
    values_N = torch.from_numpy(values)
    return values_N if device.type == "cpu" else values_N.pin_memory().to(device, non_blocking=True)


def _both(rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Rows of the two examples of each pair."""
    return np.stack([2 * rows, 2 * rows + 1], axis=1).reshape(-1)


def beta_of(config: AlignConfig, logprobs: npt.NDArray[np.float64]) -> float:
    """The beta of the settings, or its default for these log-probabilities of the frozen policy, in nats."""
    if config.beta is not None:
        return config.beta
    default = PAIR_LOSSES[config.loss].default_beta
    return DAVIR_DPO_BETA * float(np.median(np.abs(logprobs))) if default is None else default


def is_held_out(prompt_hashes: npt.NDArray[np.int64], fraction: float) -> npt.NDArray[np.bool_]:
    """Which pairs are held out: a function of the prompt alone, so that pairs of a prompt are not separated."""
    return np.asarray(drawn(prompt_hashes, fraction, "held out"))


def _usable(examples: pa.Table, frozen: pa.Table, heldout_fraction: float) -> pa.Table:
    """The rows of the pairs to train on, with their frozen NLL."""
    if not examples["example_id"].equals(frozen["example_id"]):
        raise IntegrityError("examples/ and frozen/ do not hold the same rows; freeze again with --overwrite")
    known = np.asarray(pc.is_in(frozen["status"], value_set=pa.array([Status.OK, Status.ZERO_BASE_NLL])))
    held_out = is_held_out(np.asarray(examples["prompt_hash"])[::2], heldout_fraction)
    usable = known.reshape(-1, 2).all(axis=1) & ~held_out
    table = examples.select(PAIR_COLUMNS).append_column("base_nll", frozen["base_nll"])
    return table.filter(pa.array(np.repeat(usable, 2)))
