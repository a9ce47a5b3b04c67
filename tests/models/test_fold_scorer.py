"""A scorer of folds: each fold's rows by its own reference, to the bit as a scorer that never had another one."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from scoring_tables import scoring_table
from transformers import PreTrainedTokenizerFast

from davir_ray.config.training import FinetuneConfig
from davir_ray.models.adapter import add_adapter
from davir_ray.models.checkpoint import Checkpoint
from davir_ray.models.kernel.likelihood import Likelihood
from davir_ray.models.scorer import FOLD, FoldScorer, Scorer, ScorerSettings
from davir_ray.models.training.model import save_reference

SETTINGS = ScorerSettings(keep_token_nll="all")
ORDER = (0, 1, 0, -1, 2)
"""Folds of consecutive shards: a reference comes back, and the anchor takes the first."""

References = dict[int, Checkpoint]


@pytest.fixture(scope="module")
def full(make_checkpoint: Callable[[int], Path]) -> References:
    return {fold: Checkpoint.find(str(make_checkpoint(20 + fold))) for fold in range(3)}


@pytest.fixture(scope="module")
def adapters(
    base_folder: Path, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> References:
    """Three LoRA adapters of random weights."""
    found = {}
    for fold in range(3):
        model = Checkpoint.find(str(base_folder)).model(torch.float32, torch.device("cpu"))
        add_adapter(model, FinetuneConfig(lora_rank=4), 4)
        torch.manual_seed(fold)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.1)
        folder = tmp_path_factory.mktemp(f"adapter-{fold}")
        save_reference(Likelihood(model), tokenizer, folder)
        found[fold] = Checkpoint.find(str(folder))
    return found


def shard(fold: int, seed: int) -> pa.Table:
    draw = np.random.default_rng(seed)
    lengths = draw.integers(6, 60, 8)
    table = scoring_table([(draw.integers(3, 700, length), [int(length) // 2, int(length)]) for length in lengths])
    return table.append_column(FOLD, pa.array([fold] * table.num_rows, pa.int8()))


@pytest.mark.parametrize("kind", ["full", "adapters"])
def test_each_fold_has_the_bits_of_its_own_reference(
    kind: str, base_folder: Path, request: pytest.FixtureRequest
) -> None:
    base = Checkpoint.find(str(base_folder))
    references: References = request.getfixturevalue(kind)
    scorer = FoldScorer(base, references, SETTINGS)
    seen = []
    for seed, fold in enumerate(ORDER):
        table = shard(fold, seed)
        alone = Scorer(base, references[max(0, fold)], SETTINGS)
        expected = alone(table.drop_columns([FOLD]))
        scores = scorer(table)
        assert scores.equals(expected)
        assert scorer.numerics == alone.numerics
        seen += scores["reference_nll"].to_pylist()
    assert len(set(seen)) == len(seen)


def test_the_base_is_loaded_once_and_one_reference_at_a_time(
    base_folder: Path, full: References, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []
    model = Checkpoint.model

    def noted(self: Checkpoint, *arguments: object) -> object:
        loaded.append(self.uri)
        return model(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Checkpoint, "model", noted)
    scorer = FoldScorer(Checkpoint.find(str(base_folder)), full, SETTINGS)
    for seed, fold in enumerate((0, 0, 1, 1, 2)):
        scorer(shard(fold, seed))
    assert loaded == [str(base_folder), *(full[fold].uri for fold in range(3))]


def test_rows_of_two_folds_are_no_shard(base_folder: Path, full: References) -> None:
    mixed = pa.concat_tables([shard(0, 1), shard(1, 2)])
    with pytest.raises(ValueError, match="one fold"):
        FoldScorer(Checkpoint.find(str(base_folder)), full, SETTINGS)(mixed)
