"""margins: pairs + the losses of both policies → margins/, a row for each pair: log-probabilities, rewards, loss.

The stage takes seconds, so it is redone without --overwrite. Every number in the report is a mean or a correlation over
these rows.
"""

import math
import time
from dataclasses import asdict
from functools import partial

import numpy as np
import pyarrow as pa
import torch

from davir_ray.config.align import AlignConfig
from davir_ray.engine.shards import Shards
from davir_ray.engine.shuffle import Written, write_shards
from davir_ray.errors import IntegrityError
from davir_ray.formulas.losses import PairLogprobs, pair_loss
from davir_ray.models.training.pairs import is_held_out
from davir_ray.run.files import in_folder, read_parquet, total_rows, write_parquet
from davir_ray.run.folder import Run
from davir_ray.run.location import Location
from davir_ray.run.manifest import Manifest
from davir_ray.schema import MARGINS, Role, Status

_EXAMPLES = ["example_id", "pair_id", "prompt_hash", "role", "source", "num_response_tokens"]
_SCORES = ["example_id", "base_nll", "reference_nll", "status"]


def margins(run: Run, objective: AlignConfig) -> Manifest:
    """Compute the reward of each response and the margin of each pair, with the loss and beta of the training."""
    started = time.monotonic()
    aligned, scored = run.require("align"), run.require("score")
    details = {name: aligned.details[name] for name in ("loss", "beta")}
    fingerprint = {"scores": scored.content, "policy": aligned.content, **asdict(objective), **details}
    fingerprint["columns"] = MARGINS.names  # a table with other columns is made again
    if done := run.completed("margins", fingerprint):
        return done
    run.clear("margins")
    shards = Shards(scored.files_in("scores"), partial(_read, run))
    measure = partial(_measure, held_out=objective.heldout_fraction, **details)
    written = write_shards(shards, partial(_write, run / "margins", measure))
    entries = [one.entry for one in written]
    counts = {"pairs": total_rows(entries)}
    counts |= {name: sum(one.facts[name] for one in written) for name in ("measured", "held_out")}
    return run.commit(
        Manifest(
            stage="margins",
            fingerprint=fingerprint,
            counts=counts,
            files=in_folder("margins", entries),
            details=details | {"heldout_loss": _heldout_loss(written)},
            seconds=time.monotonic() - started,
        )
    )


def _read(run: Run, name: str) -> pa.Table:
    """The examples of a shard with their losses under both policies."""
    examples, scores = read_parquet(run / "examples" / name, _EXAMPLES), read_parquet(run / "scores" / name, _SCORES)
    if not examples["example_id"].equals(scores["example_id"]):
        raise IntegrityError(f"examples/{name} and scores/{name} do not hold the same rows")
    for column in _SCORES[1:]:
        examples = examples.append_column(column, scores[column])
    return examples


def _write(folder: Location, measure: partial[pa.Table], name: str, table: pa.Table) -> Written:
    pairs = measure(name, table)
    facts = {"measured": pairs["status"].to_pylist().count(Status.OK), "held_out": sum(pairs["held_out"].to_pylist())}
    losses = pairs.filter(pairs["held_out"])["loss"].drop_null().to_pylist()
    facts |= {"heldout_losses": len(losses), "heldout_sum": math.fsum(losses)}
    return Written(write_parquet(folder / name, pairs), facts)


def _heldout_loss(written: list[Written]) -> float | None:
    """Mean loss of the held-out pairs; None if no pair is held out or none has a loss."""
    num_losses = sum(one.facts["heldout_losses"] for one in written)
    return math.fsum(one.facts["heldout_sum"] for one in written) / num_losses if num_losses else None


def _measure(name: str, table: pa.Table, *, loss: str, beta: float, held_out: float) -> pa.Table:
    """The MARGINS table of a shard of pairs, in which the two rows of a pair are adjacent."""
    chosen, rejected = table.take(np.arange(0, table.num_rows, 2)), table.take(np.arange(1, table.num_rows, 2))
    roles = set(chosen["role"].to_pylist()), set(rejected["role"].to_pylist())
    if roles != ({Role.CHOSEN}, {Role.REJECTED}) or not chosen["pair_id"].equals(rejected["pair_id"]):
        raise IntegrityError(f"the rows of {name} are not pairs of a chosen and a rejected response")
    logprobs = PairLogprobs(
        *(_logprobs(side, column) for column in ("reference_nll", "base_nll") for side in (chosen, rejected))
    )
    num_tokens = [np.array(side["num_response_tokens"]) for side in (chosen, rejected)]
    found = pair_loss(loss, logprobs, torch.tensor(num_tokens[0]), torch.tensor(num_tokens[1]), beta)
    status = [
        _pair_status(*both) for both in zip(chosen["status"].to_pylist(), rejected["status"].to_pylist(), strict=True)
    ]
    unknown = np.array([one != Status.OK for one in status])
    values = {
        "frozen_chosen": logprobs.frozen_chosen_N,
        "frozen_rejected": logprobs.frozen_rejected_N,
        "policy_chosen": logprobs.policy_chosen_N,
        "policy_rejected": logprobs.policy_rejected_N,
        "chosen_reward": found.chosen_reward_N,
        "rejected_reward": found.rejected_reward_N,
        "margin": found.chosen_reward_N - found.rejected_reward_N,
        "loss": found.loss_N,
    }
    columns = {
        "pair_id": chosen["pair_id"],
        "prompt_hash": chosen["prompt_hash"],
        "source": chosen["source"],
        "held_out": is_held_out(np.asarray(chosen["prompt_hash"]), held_out),
        "num_chosen_tokens": num_tokens[0],
        "num_rejected_tokens": num_tokens[1],
        **{name: pa.array(value.numpy(), pa.float64(), mask=unknown) for name, value in values.items()},
        "status": pa.array(status, pa.string()),
    }
    return pa.table(columns, schema=MARGINS)


def _logprobs(table: pa.Table, column: str) -> torch.Tensor:
    return torch.from_numpy(-np.array(table[column].to_numpy(zero_copy_only=False), dtype=np.float64))


def _pair_status(chosen: str, rejected: str) -> str:
    """The status of a pair: ok, or why it has no margin. A response with zero_base_nll has a reward, which is 0."""
    faults = [one for one in (chosen, rejected) if one not in (Status.OK, Status.ZERO_BASE_NLL)]
    return faults[0] if faults else Status.OK
