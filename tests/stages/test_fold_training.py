"""With folds, each reference is the fine-tune of the rows outside one fold, and is continued by itself."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dealt import deal_shards
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from without_ray_train import train_fold, without_ray_train

from davir_ray.config.prepare import PrepareConfig
from davir_ray.config.scoring import ScoreConfig
from davir_ray.config.sources import Source
from davir_ray.config.training import FinetuneConfig
from davir_ray.errors import OutputError, TrainingError
from davir_ray.models.checkpoint import Checkpoint
from davir_ray.run.files import FileEntry, read_parquet
from davir_ray.run.folder import Run
from davir_ray.run.manifest import Manifest
from davir_ray.stages import fold_training
from davir_ray.stages.finetune import finetune
from davir_ray.stages.fold_training import finetune_folds
from davir_ray.stages.folds import ANCHOR, Folds
from davir_ray.stages.prepare import Preparation, prepare, scoring_spec
from davir_ray.stages.score import score, score_anchor
from davir_ray.stages.verify import verify

pytestmark = pytest.mark.usefixtures("ray_session")

FOLD_OF_SHARD = (0, 1, 0, ANCHOR, 2)
RECIPE = FinetuneConfig(epochs=1, batch_size=8, learning_rate=3e-3, precision="float32", use_gpu=False)


@pytest.fixture(scope="module")
def prepared(data_folder: Path, base_folder: Path, ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of real rows, whose shards are dealt to three folds and the anchor."""
    folder = tmp_path_factory.mktemp("dealt") / "run"
    source = Source(name="alpaca", path=str(data_folder / "alpaca_9k.jsonl.gz"), format="alpaca")
    config = PrepareConfig(max_tokens=256, shard_rows=8)
    preparation = Preparation(base=Checkpoint.find(str(base_folder)), config=config, limit=8 * len(FOLD_OF_SHARD))
    prepare(Run.at(folder), [source], preparation, max_bad_fraction=1)
    deal_shards(Run.at(folder), FOLD_OF_SHARD, 3)
    return folder


@pytest.fixture
def run(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A copy; its trainings are in their tasks, without Ray Train."""
    monkeypatch.setattr(fold_training, "train_fold", train_fold)
    return Run.at(shutil.copytree(prepared, tmp_path / "run"))


def spec_of(base: Checkpoint) -> dict[str, Any]:
    preparation = Preparation(base=base, config=PrepareConfig(max_tokens=256))
    return scoring_spec(preparation, [Source(name="alpaca", path="any", format="alpaca")])


def train(run: Run, base_folder: Path, config: FinetuneConfig = RECIPE) -> Manifest:
    folds = Folds.of(run.require("prepare"))
    assert folds is not None
    base = Checkpoint.find(str(base_folder))
    return finetune_folds(run, base, config, spec_of(base), folds)


def references_of(run: Run) -> dict[int, Checkpoint]:
    return {fold: Checkpoint.find(str(run / "reference_folds" / str(fold))) for fold in range(3)}


def without_shards(run: Run, left_out: Sequence[int], target: Path) -> Run:
    """A copy whose examples lack these shards, as if they had never been prepared."""
    other = Run.at(shutil.copytree(run.folder.path, target))
    manifest = other.require("prepare")
    examples = [entry for entry in manifest.files if entry.name.startswith("examples/")]
    gone: list[FileEntry] = [examples[index] for index in left_out]
    for entry in gone:
        Path(other.folder.path, entry.name).unlink()
    replace(manifest, files=[entry for entry in manifest.files if entry not in gone]).commit(other.folder)
    return other


@pytest.mark.slow
def test_a_reference_is_the_fine_tune_of_a_set_without_its_fold_and_the_anchor(
    run: Run, base_folder: Path, tmp_path: Path
) -> None:
    manifest = train(run, base_folder)
    base = Checkpoint.find(str(base_folder))
    for fold in range(3):
        left_out = [shard for shard, of in enumerate(FOLD_OF_SHARD) if of in (fold, ANCHOR)]
        alone = without_shards(run, left_out, tmp_path / f"without-{fold}")
        with without_ray_train():
            shutil.rmtree(tmp_path / f"without-{fold}" / "reference_folds")
            (alone / "manifests" / "finetune.json").remove()
            expected = finetune(alone, base, RECIPE, spec_of(base))
        found = load_file(tmp_path / "run" / "reference_folds" / str(fold) / "model.safetensors")
        plain = load_file(tmp_path / f"without-{fold}" / "reference" / "model.safetensors")
        assert found.keys() == plain.keys()
        assert all(found[name].equal(plain[name]) for name in plain)
        assert manifest.details["by_fold"][fold]["loss_by_step"] == expected.details["loss_by_step"]
    assert manifest.counts == {"references": 3, "examples": 16 + 24 + 24, "steps": 2 + 3 + 3}
    assert not (run / "checkpoints").exists()
    assert not (run / "reference").exists()


@pytest.mark.slow
def test_each_is_continued_by_itself_and_a_changed_one_is_trained_again(
    run: Run, base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(training: fold_training.FoldTraining, counter: Any) -> tuple[int, Manifest]:
        if training.fold == 2:
            raise TrainingError("it diverged")
        return train_fold(training, counter)

    with monkeypatch.context() as patch:
        patch.setattr(fold_training, "train_fold", failing)
        patch.setattr(fold_training, "share_plan", lambda _, config, number: (replace(config, num_workers=1), 1))
        with pytest.raises(TrainingError, match="diverged"):
            train(run, base_folder)
    assert run.manifest("finetune") is None
    models = {fold: Path(run.folder.path, "reference_folds", str(fold), "model.safetensors") for fold in range(3)}
    first = {fold: model.stat().st_mtime_ns for fold, model in models.items() if model.exists()}
    assert first.keys() == {0, 1}
    content = models[1].read_bytes()
    models[1].write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    train(run, base_folder)
    assert models[0].stat().st_mtime_ns == first[0]
    assert models[1].read_bytes() == content
    assert models[2].exists()
    assert train(run, base_folder).counts["references"] == 3  # complete


def check_anchor(run: Run, base: Checkpoint, references: dict[int, Checkpoint], models: dict[int, Any]) -> None:
    """Every other reference scores the anchor, also by transformers; a lost file alone is made again."""
    manifest = score_anchor(run, base, references, ScoreConfig(num_actors=1))
    files = [entry.name for entry in manifest.files_in("extra/anchor")]
    assert len(files) == 2
    (source,) = {file.rpartition("-r")[0] for file in files}
    examples, scores = (read_parquet(run / folder / f"{source}.parquet") for folder in ("examples", "scores"))
    for fold in (1, 2):
        found = read_parquet(run / "extra/anchor" / f"{source}-r{fold}.parquet")
        expected = [plain_loss(models[fold], row) for row in examples.to_pylist()]
        assert found["reference_nll"].to_pylist() == pytest.approx(expected, rel=1e-5)
        for column in ("example_id", "base_nll"):
            assert found[column].equals(scores[column])
        assert set(found["scored_by"].to_pylist()) == {fold}
    assert manifest.counts["scored"] == 2 * examples.num_rows
    lost = run / "extra/anchor" / files[1]
    content = lost.read_bytes()
    lost.remove()
    run.uncommit("anchor")
    again = score_anchor(run, base, references, ScoreConfig(num_actors=1))
    assert (lost.read_bytes(), again.details["shards_scored_by_this_driver"]) == (content, 1)
    with pytest.raises(OutputError, match="anchor differs in reference"):
        score_anchor(run, base, {**references, 1: references[2]}, ScoreConfig(num_actors=1))


def plain_loss(model: Any, row: dict[str, Any]) -> float:
    """Nats of a response by transformers, alone in the batch."""
    ids = torch.tensor([row["input_ids"]])
    with torch.no_grad():
        logprobs_TV = model(input_ids=ids).logits[0].log_softmax(-1)
    start, end = row["response_spans"]
    return -sum(float(logprobs_TV[at - 1, ids[0, at]]) for at in range(start, end))


@pytest.mark.slow
def test_rows_are_scored_by_the_reference_that_has_not_seen_them(run: Run, base_folder: Path) -> None:
    """Against transformers, one row at a time in float64; the anchor is scored by the first reference."""
    train(run, base_folder)
    base, references = Checkpoint.find(str(base_folder)), references_of(run)
    scored = score(run, base, references, ScoreConfig(num_actors=1))
    models = {
        fold: AutoModelForCausalLM.from_pretrained(model.uri, dtype=torch.float64).eval()
        for fold, model in references.items()
    }
    for entry, fold in zip(scored.files_in("scores"), FOLD_OF_SHARD, strict=True):
        examples, scores = (read_parquet(run / folder / entry.name) for folder in ("examples", "scores"))
        expected = [plain_loss(models[max(0, fold)], row) for row in examples.to_pylist()]
        assert scores["reference_nll"].to_pylist() == pytest.approx(expected, rel=1e-5)
    check_anchor(run, base, references, models)
    assert verify(run, base, references, num_rows=40, seed=0).num_rows == 40 + 4
    with pytest.raises(OutputError, match="is not the reference"):
        verify(run, base, {**references, 0: references[1], 1: references[0]}, num_rows=40, seed=0)
