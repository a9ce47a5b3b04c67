"""Sharded over two processes, a fine-tune takes the steps that it takes replicated; its state and its end are whole."""

import gc
import json
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.distributed as dist
from ranks import run_two_ranks
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig, PreTrainedModel

from davir_ray.config.training import FinetuneConfig
from davir_ray.errors import ConfigError, IntegrityError, ModelError
from davir_ray.models.adapter import add_adapter
from davir_ray.models.device import uses_autocast
from davir_ray.models.kernel.attention import PACKED_ATTENTION, register_packed_attention
from davir_ray.models.kernel.layers import layers_of
from davir_ray.models.kernel.likelihood import Likelihood
from davir_ray.models.kernel.packing import deal
from davir_ray.models.training.examples import TrainingSet
from davir_ray.models.training.loop import Trainer, plan
from davir_ray.models.training.model import save_reference
from davir_ray.models.training.parallel import SHARDS_FILE, add_checksums, sharded, together

VOCABULARY = 61
"""Odd, as no other size here: the rows of two ranks differ in number."""

LLAMA = LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.1,
    tie_word_embeddings=False,
)
TIED = LlamaConfig(**LLAMA.to_dict() | {"tie_word_embeddings": True})
GPT2 = GPT2Config(
    vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
)
CONFIG = FinetuneConfig(
    epochs=2,
    batch_size=8,
    learning_rate=3e-3,
    tokens_per_pack=48,
    gradient_checkpointing=False,
    precision="float32",
    weight_decay=0.01,
)
CASES: dict[str, tuple[PretrainedConfig, FinetuneConfig]] = {
    "untied": (LLAMA, CONFIG),
    "tied": (TIED, replace(CONFIG, gradient_checkpointing=True)),
    "gpt2": (GPT2, CONFIG),
    "one-pack": (TIED, replace(CONFIG, tokens_per_pack=10_000, batch_size=19)),
    "bfloat16": (TIED, replace(CONFIG, precision="bfloat16", gradient_checkpointing=True)),
    "adapter": (TIED, replace(CONFIG, lora_rank=4, learning_rate=3e-2)),
}
"""Small packs are dealt in several turns; in one-pack's last batch of one example, one of two ranks has none."""

CONTINUED = {"tied": 1, "adapter": 0}
"""With the seed of the model that takes over: of an adapter's the base is not in the state."""

SAVED_STEP = 2

CPU = torch.device("cpu")
Weights = dict[str, torch.Tensor]


def make(config: PretrainedConfig, finetune: FinetuneConfig, seed: int = 0) -> Likelihood:
    torch.manual_seed(seed)
    register_packed_attention()
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation=PACKED_ATTENTION)
    if finetune.lora_rank is not None:
        add_adapter(model, finetune, finetune.lora_rank)
    return Likelihood(model)


def draw_examples(count: int = 20) -> TrainingSet:
    """Sequences that count upwards in steps of 1 to 3: something that can be learned."""
    draw = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for row in range(count):
        length = int(draw.integers(4, 20))
        ids = (draw.integers(VOCABULARY) + np.arange(length) * (1 + row % 3)) % VOCABULARY
        rows.append({"example_id": row, "input_ids": ids.tolist(), "response_spans": [length // 2, length]})
    kinds = {"example_id": pa.int64(), "input_ids": pa.list_(pa.int32()), "response_spans": pa.list_(pa.int32())}
    return TrainingSet.of([pa.Table.from_pylist(rows, pa.schema(kinds))])


def shard(config: PretrainedConfig, finetune: FinetuneConfig, seed: int = 0) -> Likelihood:
    return sharded(partial(make, config, finetune, seed), CPU, autocast=uses_autocast(finetune.precision, CPU))


def trainer_of(name: str, seed: int = 0) -> Trainer:
    config, finetune = CASES[name]
    return Trainer(shard(config, finetune, seed), draw_examples(), finetune)


def train(trainer: Trainer, save_to: Path | None = None, at: int = 0) -> list[float]:
    losses: list[float] = []
    for report in trainer.steps():
        losses.append(report.loss)
        if save_to is not None and report.step == at:
            trainer.save_state(save_to)
            add_checksums(save_to)
    return losses


def weights(likelihood: Likelihood) -> Weights:
    return {
        n: p.detach().clone() for n, p in likelihood.model.named_parameters(remove_duplicate=False) if p.requires_grad
    }


# --- what two processes do -------------------------------------------------------------------------------------------


def train_replicated(name: str, folder: Path, rank: int) -> None:
    config, finetune = CASES[name]
    likelihood = make(config, finetune)
    losses = train(Trainer(DistributedDataParallel(likelihood), draw_examples(), finetune))
    (folder / f"{name}-ddp-{rank}.json").write_text(json.dumps(losses))
    if rank == 0:
        torch.save(weights(likelihood), folder / f"{name}-ddp.pt")


def train_sharded(name: str, folder: Path, rank: int) -> None:
    trainer = trainer_of(name)
    own = folder / f"{name}-state-{rank}"
    own.mkdir()
    losses = train(trainer, own, SAVED_STEP)
    (folder / f"{name}-fsdp-{rank}.json").write_text(json.dumps(losses))
    held = sum(p.to_local().numel() for p in trainer.likelihood.parameters())
    (folder / f"{name}-held-{rank}.json").write_text(json.dumps(held))
    found = trainer.gathered_weights()
    if rank == 0:
        torch.save(found, folder / f"{name}-fsdp.pt")
    else:
        assert found == {}


def continue_sharded(name: str, folder: Path, rank: int) -> None:
    dist.barrier()
    if rank == 0:
        state = folder / f"{name}-state"
        for source in range(2):
            shutil.copytree(folder / f"{name}-state-{source}", state, dirs_exist_ok=True)
        broken = Path(shutil.copytree(state, folder / f"{name}-broken"))
        flip(sorted(broken.glob("*.safetensors"))[1])
    dist.barrier()
    with pytest.raises(IntegrityError) as raised:
        trainer_of(name, CONTINUED[name]).load_state(folder / f"{name}-broken")
    (folder / f"{name}-error-{rank}.json").write_text(json.dumps(str(raised.value)))
    own = Path(shutil.copytree(folder / f"{name}-state", folder / f"{name}-copied-{rank}"))
    if rank == 1:  # on its way to this rank's node alone
        flip(own / SHARDS_FILE)
    with pytest.raises(IntegrityError, match=f"{SHARDS_FILE} does not match its checksum"):
        together(partial(trainer_of(name, CONTINUED[name]).load_state, own))
    trainer = trainer_of(name, CONTINUED[name])
    trainer.load_state(folder / f"{name}-state")
    (folder / f"{name}-continued-{rank}.json").write_text(json.dumps(train(trainer)))
    found = trainer.gathered_weights()
    if rank == 0:
        torch.save(found, folder / f"{name}-continued.pt")


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=600))
    for name in CASES:
        train_replicated(name, folder, rank)
        train_sharded(name, folder, rank)
    for name in CONTINUED:
        continue_sharded(name, folder, rank)
    with pytest.raises(ModelError) as raised:  # rank 0 alone meets it
        sharded(refuse, CPU, autocast=False)
    assert "not a good model" in str(raised.value)
    with pytest.raises(ModelError, match="the disk of rank 1 is full"):
        together(partial(fill_disk, rank))
    assert together(lambda: rank) == rank
    gc.collect()  # what holds the process group must be freed before it is destroyed
    dist.destroy_process_group()


def fill_disk(rank: int) -> None:
    """An error that one node meets, and all must hear of."""
    if rank == 1:
        raise ModelError("the disk of rank 1 is full")


def refuse() -> Likelihood:
    assert dist.get_rank() == 0
    raise ModelError("not a good model")


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))


# --- and what comes of it --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with what two processes have found."""
    folder = tmp_path_factory.mktemp("trained")
    run_two_ranks(__file__, folder)
    return folder


@pytest.fixture
def _alone() -> Iterator[None]:
    """Make this process the only rank of a group."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    gc.collect()
    dist.destroy_process_group()
    torch.set_num_threads(threads)


def losses_of(folder: Path, name: str, rank: int = 0) -> list[float]:
    return list(json.loads((folder / f"{name}-{rank}.json").read_text()))


def weights_of(folder: Path, name: str) -> Weights:
    return dict(torch.load(folder / f"{name}.pt", weights_only=True))


def assert_close(first: Weights, second: Weights, room: float) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=0, atol=room)


def test_several_turns_and_a_rank_without_a_pack_are_tried() -> None:
    examples = draw_examples()
    config = CASES["one-pack"][1]
    *_, last = plan(len(examples), config.batch_size, config.epochs, config.seed)
    assert deal(examples.lengths[last.rows], examples.ids[last.rows], 10_000, 2)[0][1] is None
    batches = plan(len(examples), CONFIG.batch_size, CONFIG.epochs, CONFIG.seed)
    rows_of = (batch.rows for batch in batches)
    assert any(len(deal(examples.lengths[rows], examples.ids[rows], 48, 2)) > 1 for rows in rows_of)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_sharded_over_two_ranks_a_model_takes_the_steps_of_a_replicated_one(trained: Path, name: str) -> None:
    # In bfloat16 gradients of the norms' weights are rounded, too.
    room, rtol = (1e-2, 1e-3) if name == "bfloat16" else (1e-5, 1e-5)
    expected = losses_of(trained, f"{name}-ddp")
    assert expected[-1] < expected[0] - 0.3
    for rank in range(2):
        np.testing.assert_allclose(losses_of(trained, f"{name}-fsdp", rank), expected, rtol=rtol)
    assert_close(weights_of(trained, f"{name}-fsdp"), weights_of(trained, f"{name}-ddp"), room)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_each_rank_holds_its_part_of_the_weights(trained: Path, name: str) -> None:
    held = [json.loads((trained / f"{name}-held-{rank}.json").read_text()) for rank in range(2)]
    whole = sum(parameter.numel() for parameter in make(*CASES[name]).parameters())
    assert sum(held) == whole
    assert max(held) < 0.52 * whole


@pytest.mark.slow
@pytest.mark.parametrize("name", CONTINUED)
def test_a_sharded_run_continues_bit_for_bit_where_it_was_saved(trained: Path, name: str) -> None:
    for rank in range(2):
        assert losses_of(trained, f"{name}-continued", rank) == losses_of(trained, f"{name}-fsdp", rank)[SAVED_STEP:]
    assert_close(weights_of(trained, f"{name}-continued"), weights_of(trained, f"{name}-fsdp"), 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONTINUED)
def test_a_damaged_part_is_named_on_every_rank(trained: Path, name: str) -> None:
    for rank in range(2):
        message = str(json.loads((trained / f"{name}-error-{rank}.json").read_text()))
        assert re.fullmatch(r"shard-00002-\S+ does not match its checksum", message)


@pytest.mark.slow
@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize("name", CONTINUED)
def test_a_run_saved_by_two_ranks_continues_on_one(trained: Path, name: str) -> None:
    trainer = trainer_of(name, CONTINUED[name])
    trainer.load_state(trained / f"{name}-state")
    np.testing.assert_allclose(train(trainer), losses_of(trained, f"{name}-fsdp")[SAVED_STEP:], rtol=1e-5)
    found = trainer.gathered_weights()
    assert found is not None
    assert_close(found, weights_of(trained, f"{name}-fsdp"), 1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("_alone")
def test_any_part_that_is_damaged_or_missing_is_named(trained: Path, tmp_path: Path) -> None:
    trainer = trainer_of("tied")
    for file in (trained / "tied-state").iterdir():
        for number, spoil in enumerate((flip, Path.unlink)):
            state = Path(shutil.copytree(trained / "tied-state", tmp_path / f"{file.name}-{number}"))
            spoil(state / file.name)
            named = file.name if number else file.name.removesuffix(".sha256")
            with pytest.raises(IntegrityError, match=named):
                trainer.load_state(state)


@pytest.mark.slow
@pytest.mark.usefixtures("_alone")
def test_the_state_of_the_other_strategy_is_refused(trained: Path, tmp_path: Path) -> None:
    replicated = Trainer(make(*CASES["tied"]), draw_examples(), CONFIG)
    with pytest.raises(ConfigError, match=r"written with finetune\.strategy fsdp; give --finetune\.strategy fsdp"):
        replicated.load_state(trained / "tied-state")
    replicated.save_state(tmp_path)
    add_checksums(tmp_path)
    with pytest.raises(ConfigError, match=r"give --finetune\.strategy ddp"):
        trainer_of("tied").load_state(tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("_alone")
def test_the_state_of_an_earlier_version_is_refused(trained: Path, tmp_path: Path) -> None:
    """Version 0.2.0 kept the checksums of a sharded state in its index."""
    state = Path(shutil.copytree(trained / "tied-state", tmp_path / "state"))
    index = json.loads((state / SHARDS_FILE).read_text())
    index["files"] = {name: (state / name).with_suffix(".sha256").read_text() for name in index["files"]}
    (state / SHARDS_FILE).write_text(json.dumps(index))
    (state / SHARDS_FILE).with_suffix(".sha256").write_text(sha256((state / SHARDS_FILE).read_bytes()).hexdigest())
    with pytest.raises(ConfigError, match="an earlier version of davir_ray wrote it"):
        trainer_of("tied").load_state(state)


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize("name", ["tied", "untied", "gpt2"])
def test_one_rank_takes_the_steps_of_a_model_that_is_not_sharded_and_saves_a_plain_checkpoint(
    name: str, tmp_path: Path, tokenizer: Any
) -> None:
    config, finetune = CASES[name]
    plain = make(config, finetune)
    losses = train(Trainer(plain, draw_examples(), finetune))
    trainer = trainer_of(name)
    assert train(trainer) == losses
    for folder, likelihood, found in (
        ("plain", plain, None),
        ("sharded", trainer.likelihood, trainer.gathered_weights()),
    ):
        save_reference(likelihood, tokenizer, tmp_path / folder, found)
    files = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "sharded").iterdir())
    for file in files:
        assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "sharded" / file).read_bytes(), file
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "sharded", attn_implementation=PACKED_ATTENTION)
    examples = draw_examples()
    with torch.no_grad():
        nlls = [Likelihood(model)(examples.pack(np.arange(5))) for model in (again, plain.model)]
    assert torch.equal(*nlls)


@pytest.mark.usefixtures("_alone")
def test_layers_are_sharded_by_themselves_and_what_the_kernel_uses_with_the_root() -> None:
    likelihood = shard(TIED, CONFIG)
    layers = list(likelihood.model.get_decoder().layers)
    assert len(layers) == len(layers_of(make(TIED, CONFIG).model, otherwise="")) == 2
    assert [m for m in likelihood.modules() if isinstance(m, FSDPModule)] == [likelihood, *layers]
    assert likelihood.model.lm_head.weight is likelihood.model.get_input_embeddings().weight


def test_a_model_that_names_no_layers_is_refused() -> None:
    model = make(LLAMA, CONFIG).model
    model._no_split_modules = set()
    with pytest.raises(ModelError, match="does not name its layers; use ddp"):
        layers_of(model, otherwise="use ddp")


@pytest.mark.usefixtures("_alone")
def test_sequences_that_would_run_the_layers_twice_on_some_ranks_are_refused() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    config = LlamaConfig(**LLAMA.to_dict() | {"rope_parameters": rope, "max_position_embeddings": 8})
    Trainer(make(config, CONFIG), draw_examples(), CONFIG)
    with pytest.raises(ConfigError, match=r"of 19 tokens: above 8 .* lower prepare.max_tokens to 8"):
        Trainer(shard(config, CONFIG), draw_examples(), CONFIG)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
