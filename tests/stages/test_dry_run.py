"""The estimate before a run: against counted arithmetic, and against what real data turn out to hold."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from stand_in import read_lines
from torch.utils.flop_counter import FlopCounterMode

from davir_ray.config.prepare import PrepareConfig
from davir_ray.config.sources import Source
from davir_ray.config.training import FinetuneConfig
from davir_ray.data.files import list_files
from davir_ray.data.records import estimate_rows
from davir_ray.models.checkpoint import Checkpoint
from davir_ray.models.size import ModelSize
from davir_ray.stages.dry_run import DataSize, Estimate, estimate, estimate_lines, preview
from davir_ray.stages.prepare import Preparation

DATA = DataSize(num_rows=1000, num_examples=900, num_tokens=90_000, num_scored=30_000)


@pytest.fixture(scope="module")
def size(base_folder: Path) -> ModelSize:
    return ModelSize.of(Checkpoint.find(str(base_folder)))


def test_parameters_are_those_of_the_loaded_model(base_folder: Path, size: ModelSize) -> None:
    model = Checkpoint.find(str(base_folder)).model(torch.float32, torch.device("cpu"))
    assert size.num_parameters == model.num_parameters()
    assert size.num_body == sum(p.numel() for p in model.get_decoder().layers.parameters()) + size.hidden
    assert size.num_head == model.lm_head.weight.numel()


def test_a_forward_pass_takes_the_counted_arithmetic(base_folder: Path, size: ModelSize) -> None:
    model = Checkpoint.find(str(base_folder)).model(torch.float32, torch.device("cpu"))
    model.set_attn_implementation("eager")
    length = 128
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, length, dtype=torch.long))
    # Eager attention multiplies the masked half, too: as much as causal attention over twice the length.
    assert size.forward_flops(length, length, 2 * length) == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_the_parts_add_up(size: ModelSize) -> None:
    forward = size.forward_flops(90_000, 30_000, 100)
    full = estimate(size, DATA, 100, FinetuneConfig(epochs=3, gradient_checkpointing=False))
    assert full.num_shards == 9
    assert full.score_flops == 2 * forward
    assert full.finetune_flops == 3 * 3 * forward
    assert full.checkpoint_bytes == 2 * 12 * size.num_parameters
    assert estimate(size, DATA, 100, FinetuneConfig(epochs=1)).finetune_flops == 3 * forward
    recomputed = FinetuneConfig(epochs=1, gradient_checkpointing=True)
    assert estimate(size, DATA, 100, recomputed).finetune_flops == 4 * forward
    also = estimate(size, DATA, 100, None, num_extra_passes=1).score_flops - 2 * forward
    alone = DATA.num_scored + DATA.num_examples
    assert also == pytest.approx(size.forward_flops(alone, DATA.num_scored, alone / DATA.num_examples))
    anchored = estimate(size, DATA, 100, None, num_folds=5, anchor=0.03)
    assert anchored.score_flops == pytest.approx((2 + 4 * 0.03) * forward)
    trained = estimate(size, DATA, 100, FinetuneConfig(epochs=1), num_folds=5, anchor=0.03)
    assert trained.finetune_flops == pytest.approx(4 * 0.97 * 3 * forward)
    large = DataSize(num_rows=52_000, num_examples=52_000, num_tokens=6_400_000, num_scored=1)
    assert estimate(size, large, None, None).num_shards == 64
    assert estimate(size, DATA, None, None).num_shards == 2
    given = estimate(size, DATA, 899, None)
    assert (given.num_shards, given.finetune_flops, given.checkpoint_bytes) == (2, 0, 0)
    adapter = estimate(size, DATA, 100, FinetuneConfig(epochs=1, lora_rank=8))
    assert adapter.finetune_flops == 2 * forward
    assert adapter.reference_bytes < full.reference_bytes


def test_a_batch_of_pairs_holds_two_examples_each(size: ModelSize) -> None:
    """450 pairs in 45 batches of ten are one epoch."""
    steps = FinetuneConfig(max_steps=45, batch_size=10)
    pairs = estimate(size, DATA, 100, steps, examples_per_unit=2)
    assert pairs.finetune_flops == estimate(size, DATA, 100, FinetuneConfig(epochs=1)).finetune_flops
    assert estimate(size, DATA, 100, steps).finetune_flops == pairs.finetune_flops / 2


def test_the_cost_is_the_hours_at_the_rate(size: ModelSize) -> None:
    found = Estimate(
        data=DATA,
        num_shards=3,
        finetune_flops=3.6e18,
        score_flops=7.2e18,
        checkpoint_bytes=2.5e9,
        reference_bytes=1e6,
    )
    assert found.device_hours(100) == (10, 20)
    text = "\n".join(estimate_lines(found, 100, "as given", 10, 2.5))
    for part in (
        "1,000 rows",
        "3 shards",
        "2.5 GB",
        "30 device-hours",
        "(10 fine-tune, 20 score)",
        "2 hours",
        "75.00",
    ):
        assert part in text
    assert "cost" not in "\n".join(estimate_lines(found, 100, "as given", 10, None))


def write_rows(folder: Path, num_files: int, rows_a_file: int) -> None:
    folder.mkdir()
    for number in range(num_files):
        rows = [{"instruction": f"{row} " * (row % 40), "output": "x" * (row % 90)} for row in range(rows_a_file)]
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        (folder / f"{number}.jsonl.gz").write_bytes(gzip.compress(lines))
        (folder / f"{number}.jsonl").write_bytes(lines)
        (folder / f"{number}.json").write_text(json.dumps(rows))
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{number}.parquet")


@pytest.mark.parametrize("pattern", ["*.parquet", "*.jsonl", "*.jsonl.gz", "*.json"])
def test_rows_of_small_files_are_counted(tmp_path: Path, pattern: str) -> None:
    write_rows(tmp_path / "data", 5, 300)
    assert estimate_rows(list_files(Source(name="s", path=str(tmp_path / "data" / pattern), format="alpaca"))) == 1500


@pytest.mark.parametrize("pattern", ["*.parquet", "*.jsonl", "*.jsonl.gz"])
def test_rows_of_many_and_large_files_are_estimated(tmp_path: Path, pattern: str) -> None:
    write_rows(tmp_path / "data", 20, 3000)
    large = b"".join((tmp_path / "data" / "0.jsonl").read_bytes() for _ in range(20))
    (tmp_path / "data" / "large.jsonl").write_bytes(large)
    expected = 20 * 3000 + (60_000 if pattern == "*.jsonl" else 0)
    found = estimate_rows(list_files(Source(name="s", path=str(tmp_path / "data" / pattern), format="alpaca")))
    assert found == pytest.approx(expected, rel=0.05)


def test_nothing_is_estimated_as_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"")
    assert estimate_rows(list_files(Source(name="s", path=str(tmp_path), format="alpaca"))) <= 1


def test_real_data_hold_about_what_was_estimated(data_folder: Path, base_folder: Path) -> None:
    preparation = Preparation(base=Checkpoint.find(str(base_folder)), config=PrepareConfig(max_tokens=1024))
    file = data_folder / "alpaca_9k.jsonl.gz"
    source = Source(name="alpaca", path=str(file), format="alpaca")
    num_rows = len(list(read_lines(file)))
    _, few = preview([source], preparation)
    _, many = preview([source], preparation, num_records=3000)
    assert few.num_rows == many.num_rows == num_rows
    assert few.num_tokens == pytest.approx(many.num_tokens, rel=0.25)
    assert few.num_scored == pytest.approx(many.num_scored, rel=0.35)
    _, limited = preview([source], replace(preparation, limit=50))
    assert limited.num_rows == 50
    assert limited.num_tokens == pytest.approx(50 * few.num_tokens / num_rows, rel=0.35)
