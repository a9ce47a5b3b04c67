"""The fine-tuning loop: its plan, its gradient, resuming, and two processes doing what one does."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_two_ranks
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    get_cosine_schedule_with_warmup,
)

from davir_ray.config.training import FinetuneConfig
from davir_ray.errors import DataError, IntegrityError, TrainingError
from davir_ray.models.kernel.attention import PACKED_ATTENTION, register_packed_attention
from davir_ray.models.kernel.likelihood import Likelihood, Pack
from davir_ray.models.kernel.packing import deal
from davir_ray.models.training.examples import TrainingSet
from davir_ray.models.training.loop import (
    StepReport,
    Trainer,
    learning_rate_factor,
    num_steps,
    plan,
    rows_in,
    steps_for,
)
from davir_ray.models.training.model import freeze_what_text_does_not_reach, save_reference, switch_off_dropout
from davir_ray.models.training.parallel import STATE_FILE, add_checksums

VOCABULARY = 60
LLAMA = LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.1,
)
GPT2 = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64)
CONFIG = FinetuneConfig(
    epochs=2,
    batch_size=8,
    learning_rate=3e-3,
    tokens_per_pack=48,
    gradient_checkpointing=False,
    precision="float32",
    weight_decay=0.01,
)
Weights = dict[str, torch.Tensor]


def make(config: PretrainedConfig = LLAMA) -> PreTrainedModel:
    torch.manual_seed(0)
    register_packed_attention()
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation=PACKED_ATTENTION)
    return model


def draw_table(count: int = 20) -> pa.Table:
    """Sequences that count upwards in steps of 1 to 3: something that can be learned."""
    draw = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for row in range(count):
        length = int(draw.integers(4, 20))
        ids = (draw.integers(VOCABULARY) + np.arange(length) * (1 + row % 3)) % VOCABULARY
        spans = [length // 2, length] if row % 4 else [1, 2, 3, length]
        rows.append({"example_id": 1000 - row, "input_ids": ids.tolist(), "response_spans": spans})
    kinds = {"example_id": pa.int64(), "input_ids": pa.list_(pa.int32()), "response_spans": pa.list_(pa.int32())}
    return pa.Table.from_pylist(rows, pa.schema(kinds))


def trainer_of(model: PreTrainedModel, config: FinetuneConfig = CONFIG, count: int = 20) -> Trainer:
    return Trainer(Likelihood(model), TrainingSet.of([draw_table(count)]), config)


def run(trainer: Trainer) -> list[StepReport]:
    return list(trainer.steps())


def weights(model: PreTrainedModel) -> Weights:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def first_gradient(model: PreTrainedModel, config: FinetuneConfig) -> Weights:
    """The gradient of the first step, unclipped."""
    found: Weights = {}

    def keep(_optimizer: Any, _args: Any, _kwargs: Any) -> None:
        if not found:
            found.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    handle = register_optimizer_step_pre_hook(keep)
    try:
        run(trainer_of(model, replace(config, epochs=1, max_grad_norm=1e9)))
    finally:
        handle.remove()
    return found


# --- the plan --------------------------------------------------------------------------------------------------------


@given(st.integers(1, 60), st.integers(1, 70), st.integers(1, 4), st.integers(0, 2**32))
def test_each_epoch_of_the_plan_is_a_permutation(num_examples: int, batch_size: int, epochs: int, seed: int) -> None:
    batches = list(plan(num_examples, batch_size, epochs, seed))
    assert [batch.step for batch in batches] == list(range(1, num_steps(num_examples, batch_size, epochs) + 1))
    for epoch in range(1, epochs + 1):
        own = [batch for batch in batches if batch.epoch == epoch]
        assert sorted(np.concatenate([batch.rows for batch in own]).tolist()) == list(range(num_examples))
        assert [batch.ends_epoch for batch in own] == [False] * (len(own) - 1) + [True]
        assert all(len(batch.rows) == batch_size for batch in own[:-1])


@given(st.integers(1, 60), st.integers(1, 70), st.integers(1, 90), st.floats(0.1, 300))
def test_the_rows_of_steps_are_those_of_the_plan(num_examples: int, batch_size: int, steps: int, rows: float) -> None:
    batches = list(plan(num_examples, batch_size, 1, 0, max_steps=max(steps, 400)))
    seen = np.cumsum([len(batch.rows) for batch in batches])
    assert rows_in(steps, num_examples, batch_size) == seen[steps - 1]
    found = steps_for(rows, num_examples, batch_size)
    assert found == 1 + np.argmin(np.abs(seen - rows))


def test_the_plan_depends_on_seed_and_epoch_only() -> None:
    def epoch_orders(epochs: int, batch_size: int, seed: int) -> list[list[int]]:
        batches = list(plan(30, batch_size, epochs, seed))
        epoch_numbers = range(1, epochs + 1)
        return [[int(r) for batch in batches if batch.epoch == epoch for r in batch.rows] for epoch in epoch_numbers]

    first, second = epoch_orders(2, 8, seed=0)
    assert first != second
    assert epoch_orders(3, 5, seed=0)[:2] == [first, second]
    assert first not in epoch_orders(2, 8, seed=1)


@pytest.mark.parametrize(("total", "ratio"), [(1, 0.03), (10, 0.0), (100, 0.03), (100, 0.5), (7, 0.9)])
def test_the_learning_rate_warms_up_linearly_then_follows_transformers_cosine(total: int, ratio: float) -> None:
    warmup = math.ceil(ratio * total)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup, total)
    for step in range(1, total + 1):
        expected = step / warmup if step <= warmup else schedule.get_last_lr()[0]
        assert learning_rate_factor(step, total, ratio) == pytest.approx(expected)
        optimizer.step()
        schedule.step()


# --- the examples ----------------------------------------------------------------------------------------------------


def test_a_training_set_holds_every_example_of_all_tables_that_can_be_predicted() -> None:
    table = draw_table(6)
    unpredicted = pa.Table.from_pylist(
        [{"example_id": 1, "input_ids": [4, 5], "response_spans": spans} for spans in ([0, 2], [])], table.schema
    )
    examples = TrainingSet.of([table.slice(0, 2), unpredicted, table.slice(2)])
    assert examples.ids.tolist() == table["example_id"].to_pylist()
    assert examples.lengths.tolist() == [len(ids) for ids in table["input_ids"].to_pylist()]
    rows = np.array([4, 0])
    built = examples.pack(rows)
    expected = [table["input_ids"][int(row)].as_py() for row in rows]
    assert built.input_ids_T.tolist() == expected[0] + expected[1]
    assert sum(built.num_scored) == examples.weight(rows) == len(built.targets_R)


def test_a_set_of_which_nothing_can_be_predicted_is_refused() -> None:
    row = {"example_id": 1, "input_ids": [4, 5], "response_spans": [0, 2]}
    with pytest.raises(DataError, match="no example can be trained on"):
        TrainingSet.of([pa.Table.from_pylist([row], draw_table(1).schema)])


# --- steps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", [False, True])
def test_the_gradient_of_many_packs_is_that_of_one_and_of_the_plain_loss(recompute: bool) -> None:
    config = replace(CONFIG, gradient_checkpointing=recompute)
    many = first_gradient(make(), replace(config, tokens_per_pack=1))
    one = first_gradient(make(), replace(config, tokens_per_pack=10_000))
    plain = plain_gradient()
    assert many.keys() == one.keys() == plain.keys()
    for name in one:
        room = 1e-6 * float(one[name].abs().max())
        torch.testing.assert_close(many[name], one[name], rtol=1e-6, atol=room)
        torch.testing.assert_close(one[name].double(), plain[name], rtol=1e-5, atol=10 * room)


def plain_gradient() -> Weights:
    """Of the first batch's mean loss over response tokens, by all logits of a float64 model with eager attention."""
    model = AutoModelForCausalLM.from_config(LLAMA, attn_implementation="eager")
    model.load_state_dict(make().state_dict())
    model.double()
    nlls = []
    table = draw_table().to_pylist()
    for row in next(plan(20, CONFIG.batch_size, 1, CONFIG.seed)).rows:
        ids_T, spans = torch.tensor(table[row]["input_ids"]), table[row]["response_spans"]
        logprobs_TV = torch.log_softmax(model(input_ids=ids_T[None], use_cache=False).logits[0], dim=-1)
        pairs = zip(spans[::2], spans[1::2], strict=True)
        nlls += [-logprobs_TV[at - 1, ids_T[at]] for start, end in pairs for at in range(start, end)]
    torch.stack(nlls).mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_the_reported_loss_is_the_mean_over_the_batchs_response_tokens() -> None:
    model = make()
    rows = next(plan(20, CONFIG.batch_size, 1, CONFIG.seed)).rows
    with torch.inference_mode():
        expected = Likelihood(model)(TrainingSet.of([draw_table()]).pack(rows)).mean()
    assert run(trainer_of(model))[0].loss == pytest.approx(float(expected), rel=1e-5)


def test_the_gradients_norm_is_reported_and_clipped_after() -> None:
    gradient = first_gradient(make(), CONFIG)
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradient.values()))
    assert run(trainer_of(make()))[0].grad_norm == pytest.approx(norm, rel=1e-5)


def test_the_loss_falls_on_a_tiny_set() -> None:
    trainer = trainer_of(make(), replace(CONFIG, epochs=20))
    reports = run(trainer)
    assert reports[-1].loss < 0.5 * reports[0].loss
    summary = trainer.summary(max_points=5)
    assert summary["step"] == reports[-1].step == reports[-1].total_steps == 60
    assert summary["loss"] == reports[-1].loss
    assert [point[0] for point in summary["by_step"]["loss"]] == [12, 24, 36, 48, 60]
    assert summary["by_step"]["loss"][0][1] == pytest.approx(np.mean([report.loss for report in reports[:12]]))


def test_the_same_run_gives_the_same_bits() -> None:
    first, second = make(), make()
    assert [r.loss for r in run(trainer_of(first))] == [r.loss for r in run(trainer_of(second))]
    assert_same_bits(weights(first), weights(second))


def test_where_a_batch_has_all_rows_the_seed_changes_dropout_alone() -> None:
    """So that models without it are the same, whatever their packs; where rows are in several batches they differ."""

    def trained(config: PretrainedConfig, batch_size: int, seed: int) -> Weights:
        model = make(config)
        run(trainer_of(model, replace(CONFIG, batch_size=batch_size, seed=seed, tokens_per_pack=40)))
        return weights(model)

    def differs(config: PretrainedConfig, batch_size: int) -> bool:
        first, second = (trained(config, batch_size, seed) for seed in (0, 1))
        return any(not torch.equal(first[name], second[name]) for name in first)

    assert not differs(LLAMA, batch_size=20)
    assert not differs(LLAMA, batch_size=64)
    assert differs(LLAMA, batch_size=19)
    assert differs(GPT2, batch_size=20)


def test_a_loss_that_is_not_finite_names_its_step_and_changes_no_weight() -> None:
    model = make()

    steps = trainer_of(model).steps()
    assert [next(steps).step, next(steps).step] == [1, 2]
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(TrainingError, match=r"at step 3\b"):
        next(steps)
    assert torch.isfinite(model.base_model.embed_tokens.weight).all()


# --- resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2-with-dropout"])
@pytest.mark.parametrize("last_step", [1, 3, 5])
def test_a_run_continues_bit_for_bit_where_it_was_stopped(
    config: PretrainedConfig, last_step: int, tmp_path: Path
) -> None:
    whole = make(config)
    trainer = trainer_of(whole)
    expected = run(trainer)
    killed = trainer_of(make(config))
    next(report for report in killed.steps() if report.step == last_step)
    killed.save_state(tmp_path)
    add_checksums(tmp_path)
    torch.manual_seed(12345)
    continued = make(config)
    with torch.no_grad():
        for parameter in continued.parameters():
            parameter.zero_()
    resumed = trainer_of(continued)
    resumed.load_state(tmp_path)
    reports = run(resumed)
    assert [r.step for r in reports] == [r.step for r in expected[last_step:]]
    assert [r.loss for r in reports] == [r.loss for r in expected[last_step:]]
    assert_same_bits(weights(continued), weights(whole))
    assert resumed.summary(100) == trainer.summary(100)


@pytest.mark.parametrize("at", [0, 500, -1])
def test_a_damaged_state_is_refused(tmp_path: Path, at: int) -> None:
    trainer = trainer_of(make())
    trainer.save_state(tmp_path)
    add_checksums(tmp_path)
    content = bytearray((tmp_path / STATE_FILE).read_bytes())
    content[at] ^= 1
    (tmp_path / STATE_FILE).write_bytes(bytes(content))
    with pytest.raises(IntegrityError, match="does not match its checksum"):
        trainer.load_state(tmp_path)


def test_every_step_draws_its_own_dropout() -> None:
    config = replace(CONFIG, batch_size=20, tokens_per_pack=10_000, learning_rate=1e-20, epochs=3)
    without = [report.loss for report in run(trainer_of(make(), config))]
    assert without == pytest.approx([without[0]] * 3, rel=1e-6)
    assert len({round(report.loss, 4) for report in run(trainer_of(make(GPT2), config))}) == 3


def test_dropout_is_on_while_training() -> None:
    losses = [run(trainer_of(make(GPT2), replace(CONFIG, seed=0, tokens_per_pack=b)))[0].loss for b in (1, 10_000)]
    assert losses[0] != pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("config", [GPT2, LlamaConfig(**LLAMA.to_diff_dict() | {"attention_dropout": 0.5})])
def test_a_model_whose_dropout_is_switched_off_has_none_in_training(config: PretrainedConfig) -> None:
    as_it_is, switched_off = make(config).train(), make(config).train()
    switch_off_dropout(switched_off)
    rows = np.arange(8)
    losses = [[trainer_of(model).backward(rows)[0] for _ in range(2)] for model in (as_it_is, switched_off)]
    without = trainer_of(make(config).eval()).backward(rows)[0]
    assert losses[0][0] != losses[0][1]
    assert losses[1] == [without, without]


def test_what_text_does_not_reach_is_frozen_and_nothing_else() -> None:
    text = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 8}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    seeing = Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config=text,
            vision_config={
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
            },
        )
    )
    freeze_what_text_does_not_reach(seeing)
    for name, parameter in seeing.named_parameters():
        assert parameter.requires_grad == ("vision" not in name and "projector" not in name), name
    for model in (make(), make(GPT2)):
        freeze_what_text_does_not_reach(model)
        assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_saved_reference_is_a_plain_checkpoint(tmp_path: Path, tokenizer: Any) -> None:
    model = make()
    run(trainer_of(model))
    save_reference(Likelihood(model), tokenizer, tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, use_safetensors=True)
    assert_same_bits(weights(again), weights(model))
    assert not list(tmp_path.glob("*.bin"))


def assert_same_bits(first: Weights, second: Weights) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


# --- memory ----------------------------------------------------------------------------------------------------------


def limit_memory(monkeypatch: pytest.MonkeyPatch, num_tokens: int) -> list[int]:
    """Let passes of more tokens run out of memory; returns the tokens of those that were tried."""
    forward, tried = Likelihood.forward, list[int]()

    def limited(self: Likelihood, pack: Pack) -> torch.Tensor:
        tried.append(len(pack.input_ids_T))
        if tried[-1] > num_tokens:
            raise torch.OutOfMemoryError("no room")
        return forward(self, pack)

    monkeypatch.setattr(Likelihood, "forward", limited)
    return tried


def test_the_budget_is_halved_until_its_largest_pack_fits_and_no_step_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(CONFIG, tokens_per_pack=200, batch_size=20)
    model = make()
    trainer, before = trainer_of(model, config), weights(model)
    tried = limit_memory(monkeypatch, 60)
    trainer.fit_budget()
    assert tried == sorted(tried, reverse=True)
    assert tried[-2] == tried[-1] <= min(60, trainer.budget), "a pass beside the gradients of another"
    assert tried[-3] > 60
    assert 150 < tried[0] <= 200
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
    assert all(parameter.grad is None for parameter in model.parameters())
    expected = run(trainer_of(make(), replace(config, tokens_per_pack=trainer.budget)))
    assert [report.loss for report in run(trainer)] == [report.loss for report in expected]


def test_the_memory_is_tried_as_in_training_with_activations_recomputed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make().eval()  # as a checkpoint is loaded
    passes: list[bool] = []
    trainer = trainer_of(model, replace(CONFIG, gradient_checkpointing=True))
    model.model.layers[0].input_layernorm.register_forward_hook(lambda module, *_: passes.append(module.training))
    trainer.fit_budget()
    assert passes == [True] * 4  # forward and again in backward, twice


def test_an_example_that_does_not_fit_by_itself_names_what_to_change(monkeypatch: pytest.MonkeyPatch) -> None:
    limit_memory(monkeypatch, 15)
    with pytest.raises(TrainingError, match=r"an example of 19 tokens does not fit .*--finetune.lora_rank 16"):
        trainer_of(make()).fit_budget()


# --- two processes ---------------------------------------------------------------------------------------------------


DISTRIBUTED = [
    CONFIG,
    replace(CONFIG, tokens_per_pack=10_000, batch_size=19),
    replace(CONFIG, gradient_checkpointing=True),
]
"""Several turns of two packs; a batch of one example, so that one of two processes has none; recomputed activations."""


def test_batches_of_several_turns_and_ranks_without_a_pack_are_tried() -> None:
    examples = TrainingSet.of([draw_table()])
    turns = [
        [
            deal(examples.lengths[batch.rows], examples.ids[batch.rows], config.tokens_per_pack or 0, 2)
            for batch in plan(len(examples), config.batch_size, config.epochs, config.seed)
        ]
        for config in DISTRIBUTED
    ]
    assert max(map(len, turns[0])) > 1
    assert [pack is None for pack in turns[1][-1][0]] == [False, True]


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    run_two_ranks(__file__, tmp_path)
    for number, config in enumerate(DISTRIBUTED):
        alone = make()
        expected = run(trainer_of(alone, config))
        for rank in range(2):
            losses = json.loads((tmp_path / f"losses-{number}-{rank}.json").read_text())
            np.testing.assert_allclose(losses, [report.loss for report in expected], rtol=1e-5)
            found = torch.load(tmp_path / f"weights-{number}-{rank}.pt", weights_only=True)
            for name, value in weights(alone).items():
                torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)


def train_in_a_process(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for number, config in enumerate(DISTRIBUTED):
        losses, found = train_wrapped(config)
        (folder / f"losses-{number}-{rank}.json").write_text(json.dumps(losses))
        torch.save(found, folder / f"weights-{number}-{rank}.pt")
    dist.destroy_process_group()


def train_wrapped(config: FinetuneConfig) -> tuple[list[float], Weights]:
    """Train in DistributedDataParallel, which must be freed before the process group is destroyed.

    Else it owns the group's last reference, and its destructor waits with the interpreter lock held for a thread that
    wants the lock: one run in eight hung on a busy machine (torch 2.13).
    """
    model = make()
    module = DistributedDataParallel(Likelihood(model))
    reports = run(Trainer(module, TrainingSet.of([draw_table()]), config))
    return [report.loss for report in reports], weights(model)


if __name__ == "__main__":
    train_in_a_process(int(sys.argv[1]), Path(sys.argv[2]))
