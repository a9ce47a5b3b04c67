"""Training on pairs: log-probabilities by a plain forward, losses by hand, whatever the packs; who is left out."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from pairs import RECORDS, frozen_table, pair_table
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from davir_ray.config.align import AlignConfig
from davir_ray.config.training import FinetuneConfig
from davir_ray.errors import ConfigError, DataError, IntegrityError
from davir_ray.models.adapter import add_adapter
from davir_ray.models.checkpoint import Checkpoint
from davir_ray.models.device import resolve_dtype, weights_precision
from davir_ray.models.kernel.likelihood import Likelihood
from davir_ray.models.scorer import INPUT_COLUMNS, Scorer, ScorerSettings
from davir_ray.models.training.loop import Trainer
from davir_ray.models.training.pairs import PairSet, is_held_out
from davir_ray.schema import Status

CPU = torch.device("cpu")
RECIPE = FinetuneConfig(
    epochs=8, batch_size=3, learning_rate=3e-3, warmup_ratio=0.0, tokens_per_pack=96, gradient_checkpointing=False
)


@pytest.fixture(scope="module")
def examples(tokenizer: PreTrainedTokenizerFast) -> pa.Table:
    return pair_table(tokenizer)


@pytest.fixture(scope="module")
def frozen(base_folder: Path, examples: pa.Table) -> pa.Table:
    return frozen_table(base_folder, examples)


def pair_set(examples: pa.Table, frozen: pa.Table, **align: Any) -> PairSet:
    return PairSet.of([(examples, frozen)], AlignConfig(**align))


def packed(folder: Path) -> Likelihood:
    return Likelihood(Checkpoint.find(str(folder)).model(torch.float32, torch.device("cpu")))


def plain_logprobs(model: Any, examples: pa.Table) -> torch.Tensor:
    """Summed over the response, one example at a time, by transformers' own forward in double precision."""
    found = []
    for row in examples.to_pylist():
        ids, start = torch.tensor([row["input_ids"]]), row["response_spans"][0]
        logprobs_TV = model(input_ids=ids).logits[0].log_softmax(-1)
        found.append(sum(logprobs_TV[at - 1, ids[0, at]] for at in range(start, ids.shape[1])))
    return torch.stack(found)


def by_hand(loss: str, policy: torch.Tensor, frozen: torch.Tensor, lengths: torch.Tensor, beta: float) -> torch.Tensor:
    """The mean loss over pairs, written from the equations, chosen and rejected alternating."""
    ratio = policy - frozen
    if loss in ("ipo", "dpo_norm"):
        ratio = ratio / lengths
    if loss == "davir_dpo":
        ratio = ratio / frozen.abs()
    margin = ratio[::2] - ratio[1::2]
    if loss == "ipo":
        return ((margin - 1 / (2 * beta)) ** 2).mean()
    return -logsigmoid(beta * margin).mean()


@pytest.mark.parametrize(("loss", "beta"), [("davir_dpo", 20.0), ("dpo", 0.1), ("ipo", 0.1), ("dpo_norm", 5.0)])
@pytest.mark.parametrize("budget", [1, 96, 10_000])
def test_the_gradient_is_that_of_the_equation(
    base_folder: Path, reference_folder: Path, examples: pa.Table, frozen: pa.Table, loss: str, beta: float, budget: int
) -> None:
    """Of a policy away from the frozen one, over all pairs, however they are packed."""
    model = AutoModelForCausalLM.from_pretrained(reference_folder, dtype=torch.float64)
    before = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float64)
    lengths = torch.tensor(examples["num_response_tokens"].to_pylist())
    with torch.no_grad():
        frozen_logprobs = plain_logprobs(before, examples)
    expected = by_hand(loss, plain_logprobs(model, examples), frozen_logprobs, lengths, beta)
    expected.backward()
    likelihood = packed(reference_folder)
    objective = pair_set(examples, frozen, loss=loss, beta=beta)
    config = replace(RECIPE, batch_size=len(objective), tokens_per_pack=budget)
    trainer = Trainer(likelihood, objective, config)
    rows = np.random.default_rng(0).permutation(len(objective))
    measured = trainer.backward(rows)
    assert measured[0] == pytest.approx(expected.item(), rel=1e-5)
    for (name, found), (_, wanted) in zip(likelihood.model.named_parameters(), model.named_parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad.float(), rtol=1e-3, atol=1e-5, msg=name)


def test_measures_are_means_over_the_pairs_of_a_batch(
    reference_folder: Path, examples: pa.Table, frozen: pa.Table
) -> None:
    objective = pair_set(examples, frozen, loss="dpo", beta=0.3)
    trainer = Trainer(packed(reference_folder), objective, replace(RECIPE, batch_size=100, epochs=1))
    reports = list(trainer.steps())
    model = AutoModelForCausalLM.from_pretrained(reference_folder, dtype=torch.float64)
    with torch.no_grad():
        policy = plain_logprobs(model, examples).numpy()
    rewards = 0.3 * (policy + frozen["base_nll"].to_numpy())
    margin = rewards[::2] - rewards[1::2]
    assert reports[0].measures == pytest.approx(
        {
            "loss": np.log1p(np.exp(-margin)).mean(),
            "accuracy": (margin > 0).mean(),
            "margin": margin.mean(),
            "chosen_reward": rewards[::2].mean(),
            "rejected_reward": rewards[1::2].mean(),
            "chosen_logprob": policy[::2].mean(),
            "rejected_logprob": policy[1::2].mean(),
        },
        rel=1e-4,
    )


@pytest.mark.parametrize("loss", ["davir_dpo", "dpo", "ipo", "dpo_norm"])
def test_training_moves_the_margin(base_folder: Path, examples: pa.Table, frozen: pa.Table, loss: str) -> None:
    reports = list(Trainer(packed(base_folder), pair_set(examples, frozen, loss=loss), RECIPE).steps())
    first, last = reports[0].measures, reports[-1].measures
    assert abs(first["margin"]) < 1e-4
    if loss != "ipo":
        assert first["loss"] == pytest.approx(math.log(2), rel=1e-4)
    assert last["margin"] > 0.01
    assert last["accuracy"] == 1
    assert last["loss"] < first["loss"]


@pytest.mark.parametrize("rank", [None, 4])
def test_in_bfloat16_the_policy_begins_where_the_frozen_one_is(
    base_folder: Path, examples: pa.Table, frozen: pa.Table, rank: int | None
) -> None:
    """The frozen losses are computed in the arithmetic of the training: in float32 they would be of another policy."""
    recipe = replace(RECIPE, precision="bfloat16", lora_rank=rank, batch_size=100, epochs=1)
    precision = weights_precision(recipe)
    settings = ScorerSettings(precision=precision, autocast=recipe.precision)
    found = Scorer(Checkpoint.find(str(base_folder)), None, settings)(examples.select(INPUT_COLUMNS))
    begun = []
    for losses in (found, frozen):
        model = Checkpoint.find(str(base_folder)).model(resolve_dtype(precision, CPU), CPU)
        if rank is not None:
            add_adapter(model, recipe, rank)
        trainer = Trainer(Likelihood(model), pair_set(examples, losses, loss="dpo", beta=5.0), recipe)
        begun.append(trainer.backward(np.arange(len(RECORDS)))[0])
    assert begun[0] == pytest.approx(math.log(2), abs=1e-5)
    assert abs(begun[1] - math.log(2)) > 1e-3


def test_the_same_pairs_in_other_packs_train_the_same_policy(
    base_folder: Path, examples: pa.Table, frozen: pa.Table
) -> None:
    losses = []
    for budget in (1, 10_000):
        trainer = Trainer(packed(base_folder), pair_set(examples, frozen), replace(RECIPE, tokens_per_pack=budget))
        losses.append([report.loss for report in trainer.steps()])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


def test_the_default_beta_matches_dpos_gradient_at_the_median(examples: pa.Table, frozen: pa.Table) -> None:
    assert pair_set(examples, frozen).beta == pytest.approx(0.1 * float(np.median(frozen["base_nll"].to_numpy())))
    assert pair_set(examples, frozen, loss="dpo").beta == 0.1
    assert pair_set(examples, frozen, beta=3.0).beta == 3.0


def test_held_out_pairs_are_left_out_whole_and_always_the_same(examples: pa.Table, frozen: pa.Table) -> None:
    held_out = is_held_out(np.asarray(examples["prompt_hash"])[::2], 0.5)
    assert 0 < held_out.sum() < len(RECORDS)
    objective = pair_set(examples, frozen, heldout_fraction=0.5)
    assert len(objective) == (~held_out).sum()
    assert set(objective.ids) == set(np.asarray(examples["pair_id"])[::2][~held_out])


def test_pairs_of_one_prompt_are_held_out_together(tokenizer: PreTrainedTokenizerFast) -> None:
    records = [{**record, "chosen": record["chosen"] + text} for record in RECORDS for text in ("", " again", " still")]
    examples = pair_table(tokenizer, records)
    held_out = is_held_out(np.asarray(examples["prompt_hash"])[::2], 0.5).reshape(len(RECORDS), 3)
    assert 0 < held_out.sum() < held_out.size
    assert (held_out == held_out[:, :1]).all()
    assert len(set(examples["pair_id"].to_pylist())) == len(records)


def test_a_pair_without_a_log_probability_is_left_out_whole(examples: pa.Table, frozen: pa.Table) -> None:
    status = frozen["status"].to_pylist()
    status[3], status[4] = Status.OUT_OF_MEMORY, Status.ZERO_BASE_NLL
    at = frozen.schema.get_field_index("status")
    objective = pair_set(examples, frozen.set_column(at, "status", pa.array(status)))
    assert len(objective) == len(RECORDS) - 1
    assert examples["pair_id"][3].as_py() not in objective.ids
    every = frozen.set_column(at, "status", pa.repeat(Status.NON_FINITE_NLL.value, frozen.num_rows))
    with pytest.raises(DataError, match="no pair can be trained on"):
        pair_set(examples, every)


def test_losses_of_other_rows_are_refused(examples: pa.Table, frozen: pa.Table) -> None:
    with pytest.raises(IntegrityError, match="same rows"):
        pair_set(examples, frozen.take(pc.sort_indices(frozen["base_nll"])))


@pytest.mark.parametrize("given", [{"beta": 0.0}, {"heldout_fraction": 1.0}, {"heldout_fraction": -0.1}])
def test_settings_are_checked(given: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(given))):
        AlignConfig(**given)  # type: ignore[arg-type]


def test_a_frozen_policy_has_losses_and_no_scores(frozen: pa.Table, make_checkpoint: Callable[..., Path]) -> None:
    assert frozen["base_nll"].null_count == 0
    assert set(frozen["status"].to_pylist()) == {Status.OK}
    for name in ("reference_nll", "davir", "rho_sum", "rho_mean"):
        assert frozen[name].null_count == frozen.num_rows
