"""Preference training on real pairs: equal to plain forwards, complete, skipped when done, refused where it must be."""

import gzip
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from drivers import Driver, checkpoint_is_known
from safetensors.torch import load_file
from scipy import stats
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM
from without_ray_train import without_ray_train

from davir_ray import schema
from davir_ray.align import sweep
from davir_ray.align.job import dry_run, run_alignment
from davir_ray.align.training import check_arithmetic
from davir_ray.config.align import AlignConfig, AlignRunConfig
from davir_ray.config.prepare import PrepareConfig
from davir_ray.config.scoring import ScoreConfig
from davir_ray.config.training import FinetuneConfig
from davir_ray.config.yaml import dump
from davir_ray.errors import ClusterError, ConfigError, DataError, OutputError
from davir_ray.models.checkpoint import Checkpoint
from davir_ray.models.training.pairs import is_held_out
from davir_ray.run.files import in_folder, write_parquet
from davir_ray.run.folder import Run
from davir_ray.run.location import Location
from davir_ray.run.manifest import Manifest

RECORDS = 60
STAGES = ("prepare", "freeze", "align", "score", "margins", "report")


@pytest.fixture(scope="module")
def config(data_folder: Path, base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> AlignRunConfig:
    folder = tmp_path_factory.mktemp("alignment")
    with gzip.open(data_folder / "hh_harmless_pairs_1k.jsonl.gz", "rt") as lines:
        records = [json.loads(line) for line in lines][:RECORDS]
    bad = [{"chosen": "no prompt", "rejected": "at all"}, {**records[0], "rejected": records[0]["chosen"]}]
    (folder / "pairs.jsonl").write_text("\n".join(json.dumps(record) for record in [*records, *bad]))
    return AlignRunConfig(
        output=str(folder / "run"),
        base=str(base_folder),
        data=str(folder / "pairs.jsonl"),
        format="preference",
        max_bad_fraction=0.5,
        prepare=PrepareConfig(max_tokens=800, shard_rows=32),
        finetune=FinetuneConfig(epochs=2, batch_size=8, learning_rate=1e-3, precision="float32", num_workers=2),
        score=ScoreConfig(num_actors=1, precision="float32"),
        align=AlignConfig(heldout_fraction=0.3),
        track="tensorboard",
    )


@pytest.fixture(scope="module")
def finished(config: AlignRunConfig, ray_session: None) -> Path:
    """A finished run; not to be changed."""
    run_alignment(config)
    return Path(str(config.output))


@pytest.fixture
def copied(finished: Path, config: AlignRunConfig, tmp_path: Path) -> AlignRunConfig:
    """The configuration of a copy of the finished run, which a test may change."""
    shutil.copytree(finished, tmp_path / "run")
    return replace(config, output=str(tmp_path / "run"))


def read(run: Path, folder: str) -> pd.DataFrame:
    return pa.concat_tables([pq.read_table(file) for file in sorted((run / folder).glob("*.parquet"))]).to_pandas()


def manifest(run: Path | str | None, stage: str) -> Manifest:
    found = Run.at(str(run)).manifest(stage)
    assert found is not None
    return found


def report(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "report.json").read_text())
    return found


@torch.no_grad()
def plain_logprob(model: Any, row: Any) -> float:
    """Of the scored tokens of one row of examples/, by transformers' own forward in double precision."""
    ids, spans = torch.tensor([row.input_ids.tolist()]), row.response_spans
    logprobs_TV = model(input_ids=ids).logits[0].log_softmax(-1)
    places = [at for start, end in zip(spans[::2], spans[1::2], strict=True) for at in range(start, end)]
    return float(sum(logprobs_TV[at - 1, ids[0, at]] for at in places))


@pytest.mark.slow
def test_every_stage_writes_its_files_and_row_counts_reconcile(finished: Path) -> None:
    prepared = manifest(finished, "prepare").counts
    assert prepared["read"] == RECORDS + 2
    assert prepared["prepared"] == 2 * (prepared["read"] - prepared["rejected"])
    assert prepared["no_common_prompt"] == prepared["equal_responses"] == 1
    assert manifest(finished, "freeze").counts["scored"] == prepared["prepared"]
    measured = manifest(finished, "margins").counts
    assert measured["pairs"] == measured["measured"] == prepared["prepared"] // 2
    assert measured["held_out"] + manifest(finished, "align").counts["pairs"] == measured["pairs"]
    for folder, name in (("examples", "PAIRS"), ("frozen", "SCORES"), ("scores", "SCORES"), ("margins", "MARGINS")):
        for file in (finished / folder).glob("*.parquet"):
            assert pq.read_schema(file).equals(getattr(schema, name)), file
    left = {path.name for path in finished.iterdir()} - {"config.yaml", "manifests", "progress.json"}
    assert left == {
        "examples", "rejects", "frozen", "policy", "scores", "margins", "report.html", "report.json", "tracking.json",
        "tensorboard",
    }  # fmt: skip


@pytest.mark.slow
def test_the_curves_and_the_held_out_loss_are_tracked(finished: Path) -> None:
    (folder,) = (finished / "tensorboard").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    trained, pairs = manifest(finished, "align"), read(finished, "margins")
    last = trained.counts["steps"]
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, last + 1))
    for name, curve in trained.details["measures_by_step"].items():
        assert [event.value for event in events.Scalars(f"train/{name}")] == pytest.approx([at for _, at in curve])
    (heldout,) = events.Scalars("heldout/loss")
    assert (heldout.step, heldout.value) == (last, pytest.approx(pairs.loss[pairs.held_out].mean()))
    assert events.Scalars("margins/held_out")[0].value == pairs.held_out.sum()


@pytest.mark.slow
def test_margins_are_those_of_plain_forwards(finished: Path, base_folder: Path) -> None:
    examples, margins = read(finished, "examples"), read(finished, "margins").set_index("pair_id")
    base, policy = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        for folder in (base_folder, finished / "policy")
    )
    beta = manifest(finished, "align").details["beta"]
    pairs = sorted(examples.groupby("pair_id", sort=False), key=lambda pair: pair[1].num_response_tokens.sum())
    for pair_id, pair in pairs[:8]:
        chosen, rejected = pair.itertuples()
        assert (chosen.role, rejected.role) == ("chosen", "rejected")
        row = margins.loc[pair_id]
        rewards = []
        for role, example in (("chosen", chosen), ("rejected", rejected)):
            frozen, trained = plain_logprob(base, example), plain_logprob(policy, example)
            assert row[f"frozen_{role}"] == pytest.approx(frozen, rel=1e-5)
            assert row[f"policy_{role}"] == pytest.approx(trained, rel=1e-5)
            rewards.append(beta * (trained - frozen) / abs(frozen))
        assert row["margin"] == pytest.approx(rewards[0] - rewards[1], abs=2e-4 * beta)
        assert row["loss"] == pytest.approx(np.log1p(np.exp(-row["margin"])))


@pytest.mark.slow
def test_the_default_beta_is_a_tenth_of_the_median_log_probability_of_what_is_trained_on(finished: Path) -> None:
    margins = read(finished, "margins")
    trained = margins[~margins["held_out"]]
    logprobs = np.concatenate([trained["frozen_chosen"], trained["frozen_rejected"]])
    assert manifest(finished, "align").details["beta"] == pytest.approx(0.1 * np.median(np.abs(logprobs)), rel=1e-12)


@pytest.mark.slow
def test_the_report_is_recomputed_from_the_margins(finished: Path) -> None:
    margins, facts = read(finished, "margins"), report(finished)
    prompts = read(finished, "examples")["prompt_hash"].to_numpy()[::2]
    assert np.array_equal(margins["held_out"], is_held_out(prompts, 0.3))
    for name, part in (("trained", margins[~margins["held_out"]]), ("held_out", margins[margins["held_out"]])):
        shown = facts["parts"][name]
        assert shown["pairs"] == len(part) > 5
        assert shown["accuracy"] == pytest.approx((part["margin"] > 0).mean())
        for column in ("loss", "margin", "policy_chosen", "frozen_rejected"):
            assert shown[column] == pytest.approx(part[column].mean())
        difference = part["num_chosen_tokens"] - part["num_rejected_tokens"]
        assert shown["length"]["pearson"] == pytest.approx(np.corrcoef(difference, part["margin"])[0, 1])
        gains = {role: part[f"policy_{role}"] - part[f"frozen_{role}"] for role in ("chosen", "rejected")}
        plain = np.corrcoef(difference, gains["chosen"] - gains["rejected"])[0, 1]
        assert shown["length_of_gains"]["pearson"] == pytest.approx(plain)
        assert shown["margin_median"] == pytest.approx(part["margin"].median())
        assert shown["near_certain"] == (part[["frozen_chosen", "frozen_rejected"]] > -1).to_numpy().sum()
        assert shown["length"]["spearman"] == pytest.approx(stats.spearmanr(difference, part["margin"]).statistic)
    assert facts["paper"] == 0.07
    assert facts["curves"].keys() >= {"loss", "accuracy", "margin", "chosen_logprob", "rejected_logprob"}
    page = (finished / "report.html").read_text()
    assert "DavIR-DPO" in page
    assert "Fisher" in page


@pytest.mark.slow
def test_training_raised_the_margin(finished: Path) -> None:
    aligned = manifest(finished, "align").details
    assert aligned["loss_by_step"][0][1] == pytest.approx(np.log(2), abs=1e-4)
    assert report(finished)["parts"]["trained"]["margin"] > 0.1
    assert report(finished)["parts"]["trained"]["accuracy"] > 0.6


@pytest.mark.slow
def test_a_finished_run_is_skipped(copied: AlignRunConfig) -> None:
    before = {stage: manifest(copied.output, stage).content for stage in STAGES if stage != "report"}
    files = {
        path: path.stat().st_mtime_ns for path in Path(str(copied.output)).rglob("*.*") if "manifests" not in str(path)
    }
    run_alignment(copied)
    assert {stage: manifest(copied.output, stage).content for stage in before} == before
    changed = {path.name for path, at in files.items() if path.stat().st_mtime_ns != at}
    assert changed == {"report.html", "report.json", "config.yaml", "progress.json"}


@pytest.mark.slow
def test_another_loss_is_refused_then_redone_and_compared_with_the_first(
    copied: AlignRunConfig, finished: Path
) -> None:
    alone = replace(copied.finetune, num_workers=1)
    other = replace(copied, align=replace(copied.align, loss="dpo"), finetune=alone)
    with pytest.raises(OutputError, match=r"objective\.loss"):
        run_alignment(other)
    frozen = manifest(copied.output, "freeze")
    with without_ray_train():
        run_alignment(replace(other, overwrite=True))
    assert manifest(copied.output, "freeze") == frozen
    facts = report(Path(str(copied.output)))
    assert (facts["loss"], facts["beta"], facts["paper"]) == ("dpo", 0.1, 0.38)
    margins = read(Path(str(copied.output)), "margins")
    expected = 0.1 * (
        margins["policy_chosen"] - margins["frozen_chosen"] - margins["policy_rejected"] + margins["frozen_rejected"]
    )
    np.testing.assert_allclose(margins["margin"], expected, atol=1e-9)

    run_alignment(replace(other, beside=[str(finished)]))
    compared = report(Path(str(copied.output)))
    assert compared["parts"]["trained"]["margin"] == pytest.approx(facts["parts"]["trained"]["margin"])
    assert facts["sweep"] == []
    assert [(row["loss"], row["seeds"], row["differs"]) for row in compared["sweep"]] == [
        ("dpo", [0], []),
        ("davir_dpo", [0], []),
    ]
    for row, of_its_own in zip(compared["sweep"], (facts, report(finished)), strict=True):
        for part, found in row["parts"].items():
            shown, figures = of_its_own["parts"][part], found["measures"]
            assert (found["pairs"], found["prompts"]) == (shown["pairs"], shown["prompts"])
            expected = {name: shown[name] for name in ("accuracy", "margin")}
            expected |= {name: shown["length"][name] for name in ("pearson", "spearman")}
            expected |= {
                f"plain{name}": shown["length_of_gains"][of]
                for name, of in (("", "pearson"), ("_spearman", "spearman"))
            }
            assert {name: figure["mean"] for name, figure in figures.items()} == pytest.approx(expected)


@pytest.mark.slow
def test_margins_of_an_earlier_version_are_made_again_and_refused_beside_another_run(copied: AlignRunConfig) -> None:
    """They had no prompt_hash, and no columns in their fingerprint."""
    output = Path(str(copied.output))
    before = read(output, "margins")
    entries = [
        write_parquet(Location.of(file), pq.read_table(file).drop_columns("prompt_hash"))
        for file in sorted((output / "margins").iterdir())
    ]
    made = manifest(output, "margins")
    fingerprint = {name: value for name, value in made.fingerprint.items() if name != "columns"}
    Run.at(output).commit(replace(made, fingerprint=fingerprint, files=in_folder("margins", entries)))
    with pytest.raises(ConfigError, match=r"earlier version.*jobs/align\.py --config .*config\.yaml"):
        dry_run(replace(copied, output=f"{output}-2", beside=[str(output)]))
    run_alignment(copied)
    pd.testing.assert_frame_equal(read(output, "margins"), before)
    dry_run(replace(copied, output=f"{output}-2", beside=[str(output)]))


@pytest.mark.slow
def test_trainings_that_are_not_finished_or_on_other_pairs_are_not_compared_with(
    config: AlignRunConfig, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "unfinished").mkdir()
    with pytest.raises(ConfigError, match="unfinished, which has no complete prepare stage"):
        dry_run(replace(config, beside=[str(finished), str(tmp_path / "unfinished")]))
    with pytest.raises(ConfigError, match="not those of"):
        run_alignment(replace(config, output=str(tmp_path / "run"), limit=20, beside=[str(finished)]))
    monkeypatch.setattr(sweep, "num_nodes", lambda: 2)  # as on a cluster, where the driver alone may see a path
    with pytest.raises(ConfigError, match="which is local, but the cluster has 2 nodes"):
        run_alignment(replace(config, output=str(tmp_path / "run"), beside=[str(finished)], overwrite=True))
    assert not (tmp_path / "run" / "frozen").exists()


def test_a_password_is_refused_and_not_repeated() -> None:
    with pytest.raises(ConfigError, match="beside") as error:
        AlignRunConfig(beside=["s3://key:secret@host/run"])
    assert "secret" not in str(error.value)


@pytest.mark.usefixtures("ray_session")
def test_frozen_losses_in_other_arithmetic_than_the_training_are_refused(config: AlignRunConfig) -> None:
    training = replace(config.finetune, precision="auto", use_gpu=False)
    check_arithmetic(training, config.score)
    check_arithmetic(replace(training, precision="float32"), replace(config.score, num_gpus=1))
    with pytest.raises(ConfigError, match=r"trained on CPUs, .* computed on GPUs.*--finetune\.precision float32"):
        check_arithmetic(training, replace(config.score, num_gpus=1))


@pytest.mark.slow
def test_an_adapter_is_trained_and_measured_on_the_bases_weights(copied: AlignRunConfig) -> None:
    """On all pairs: by default none is held out."""
    output = Path(str(copied.output))
    recipe = replace(copied.finetune, lora_rank=4, learning_rate=1e-2, num_workers=1)
    with without_ray_train():
        run_alignment(replace(copied, finetune=recipe, align=AlignConfig(), overwrite=True))
    assert report(output)["parts"].keys() == {"trained"}
    assert Checkpoint.find(str(output / "policy")).is_adapter
    assert report(output)["parts"]["trained"]["margin"] > 0.1


@pytest.mark.slow
def test_a_sharded_policy_whose_driver_dies_goes_on_and_is_that_of_an_undisturbed_one(
    config: AlignRunConfig, finished: Path, ray_address: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    (run / "manifests").mkdir(parents=True)
    for name in ("examples", "rejects", "frozen"):
        shutil.copytree(finished / name, run / name)
    for name in ("config.yaml", "manifests/prepare.json", "manifests/freeze.json"):
        shutil.copy2(finished / name, run / name)
    recipe = replace(config.finetune, strategy="fsdp", checkpoint_every_steps=2)
    (tmp_path / "config.yaml").write_text(dump(replace(config, output=str(run), finetune=recipe)))
    options = {"config": tmp_path / "config.yaml"}
    # With a Ray of its own: in one that lives on, Ray Train's cleaner would ask a dashboard that is not there, forever.
    first = Driver("align.py", options, tmp_path / "first.log")
    first.wait_for(checkpoint_is_known(run), "a checkpoint")
    first.kill()
    assert not (run / "policy").exists()
    frozen = {path: path.stat().st_mtime_ns for path in (run / "frozen").iterdir()}
    again = Driver("align.py", options, tmp_path / "again.log", address=ray_address)
    assert again.finish() == 0, again.output
    assert "freeze: complete, skipped" in again.output
    assert "continuing after step" in again.output
    assert {path: path.stat().st_mtime_ns for path in (run / "frozen").iterdir()} == frozen
    policy, undisturbed = (load_file(folder / "policy" / "model.safetensors") for folder in (run, finished))
    for name, value in undisturbed.items():
        torch.testing.assert_close(policy[name], value, rtol=0, atol=1e-5)
    columns = ["pair_id", "held_out", "margin", "loss"]
    pd.testing.assert_frame_equal(
        read(run, "margins")[columns], read(finished, "margins")[columns], rtol=1e-3, atol=1e-3
    )


def test_a_dry_run_shows_both_responses_with_the_scored_tokens_marked_and_writes_nothing(
    config: AlignRunConfig, ray_session: None, tmp_path: Path
) -> None:
    text = "\n".join(dry_run(replace(config, output=str(tmp_path / "run"))))
    assert not (tmp_path / "run").exists()
    record = json.loads(Path(str(config.data)).read_text().splitlines()[0])
    for role in ("chosen", "rejected"):
        prompt, _, response = record[role].rpartition("Assistant:")
        assert f"{prompt}Assistant:⟦{response}</s>⟧" in text
    assert f"{RECORDS} of the first {RECORDS + 2} records can be prepared" in text
    assert "estimate" in text


def test_what_is_wrong_is_reported_before_anything_is_loaded(config: AlignRunConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs one of preference"):
        run_alignment(replace(config, format="alpaca"))
    many = replace(config, output=str(tmp_path / "run"), finetune=replace(config.finetune, num_workers=64))
    with pytest.raises(ClusterError, match="64 training workers"):
        run_alignment(many)
    assert not (tmp_path / "run" / "examples").exists()
    with pytest.raises(DataError, match="does not exist"):
        run_alignment(replace(config, data=str(tmp_path / "none.jsonl"), output=str(tmp_path / "run")))
