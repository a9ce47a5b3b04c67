"""The whole chain on real data: equal to a plain loop, ordered, complete, resumable, and refused where it must be."""

import gzip
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from without_ray_train import without_ray_train

from davir_ray import schema
from davir_ray.cli import parse_rank
from davir_ray.compare.job import _preparation as prepare_heldout
from davir_ray.config.compare import CompareConfig
from davir_ray.config.prepare import PrepareConfig
from davir_ray.config.rank import RankOptions
from davir_ray.config.run import RunConfig
from davir_ray.config.scoring import ScoreConfig
from davir_ray.config.selection import RankConfig, SelectConfig
from davir_ray.config.sources import Source
from davir_ray.config.training import FinetuneConfig
from davir_ray.errors import ConfigError, IntegrityError, ModelError, OutputError
from davir_ray.inputs import last_config
from davir_ray.pipeline import dry_run, rank_only, run_all, verify_only
from davir_ray.run.files import read_parquet, write_parquet
from davir_ray.run.folder import Run
from davir_ray.run.manifest import Manifest, differences
from davir_ray.run.status import status
from davir_ray.stages.prepare import TOKENIZER_CLASS

LIMIT = 150
MAX_TOKENS = 320
SCHEMAS = {name: getattr(schema, name.upper()) for name in ("examples", "scores", "ranked", "selected")}
TABLES = ("examples", "rejects", "scores", "ranked", "selected")
STAGES = ("prepare", "finetune", "score", "rank", "select")
TEXT_FIELDS = {"alpaca": ("instruction", "output"), "gsm8k": ("question", "answer")}


def real_sources(data_folder: Path) -> list[Source]:
    return [
        Source(name="alpaca", path=str(data_folder / "alpaca_9k.jsonl.gz"), format="alpaca"),
        Source(name="gsm8k", path=str(data_folder / "gsm8k_train.jsonl.gz"), format="gsm8k"),
    ]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that is there once the code of the model of these tests has run."""
    return tmp_path_factory.mktemp("ran") / "ran"


@pytest.fixture(scope="module")
def coded_base(base_folder: Path, ran: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base with code of its own, without which it can be used, too."""
    folder = tmp_path_factory.mktemp("coded") / "base"
    shutil.copytree(base_folder, folder)
    own = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    config = json.loads((folder / "config.json").read_text()) | {"auto_map": own}
    (folder / "config.json").write_text(json.dumps(config))
    # Classes of its own: transformers marks those that code brings, for all who use them in this process.
    (folder / "own.py").write_text(
        f"open({str(ran)!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Config(LlamaConfig): pass\n"
        "class Model(LlamaForCausalLM): config_class = Config\n"
    )
    return folder


@pytest.fixture(scope="module")
def config(data_folder: Path, coded_base: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return RunConfig(
        output=str(tmp_path_factory.mktemp("chain") / "run"),
        base=str(coded_base),
        sources=real_sources(data_folder),
        limit=LIMIT,
        max_bad_fraction=0.1,
        prepare=PrepareConfig(max_tokens=MAX_TOKENS, shard_rows=64),
        finetune=FinetuneConfig(epochs=1, batch_size=64, learning_rate=1e-3, precision="float32"),
        score=ScoreConfig(num_actors=2, precision="float32"),
        select=SelectConfig(top_fraction=0.29),
    )


@pytest.fixture(scope="module")
def finished(config: RunConfig, ray_session: None) -> Path:
    """A finished run with a reference that was fine-tuned in it; not to be changed."""
    with without_ray_train():
        run_all(config)
    return Path(str(config.output))


@pytest.fixture
def copied(finished: Path, config: RunConfig, tmp_path: Path) -> RunConfig:
    """The configuration of a copy of the finished run, which a test may change; what is scored, one actor scores."""
    shutil.copytree(finished, tmp_path / "run")
    return replace(config, output=str(tmp_path / "run"), score=replace(config.score, num_actors=1))


def files_of(run: Path | str | None, folder: str) -> list[Path]:
    return sorted(Path(str(run), folder).glob("*.parquet"))


def read_folder(run: Path | str | None, folder: str) -> pd.DataFrame:
    return pa.concat_tables([pq.read_table(file) for file in files_of(run, folder)]).to_pandas()


def manifest(run: Path | str | None, stage: str) -> Manifest:
    found = Run.at(str(run)).manifest(stage)
    assert found is not None
    return found


def snapshot(run: Path | str | None, *folders: str) -> dict[str, tuple[int, bytes]]:
    """Modification time and content of every file of some folders."""
    files = [file for folder in folders for file in Path(str(run), folder).rglob("*") if file.is_file()]
    return {str(file.relative_to(str(run))): (file.stat().st_mtime_ns, file.read_bytes()) for file in files}


def source_lines(path: str) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def plain_ids(tokenizer: PreTrainedTokenizerFast, row: dict[str, Any]) -> tuple[list[int], int]:
    """Tokens of one example under the limit, and where its response starts, from its text alone."""
    prompt = [tokenizer.bos_token_id, *tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]]
    response = [*tokenizer(row["response"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return (prompt + response)[:MAX_TOKENS], len(prompt)


def plain_nlls(folder: Path, rows: list[dict[str, Any]]) -> list[float]:
    """Summed response losses, one example at a time, in double precision."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").double().eval()
    losses = []
    for row in rows:
        ids, start = plain_ids(tokenizer, row)
        with torch.no_grad():
            log_probs = torch.log_softmax(model(torch.tensor([ids])).logits[0], dim=-1)
        losses.append(-sum(float(log_probs[position - 1, ids[position]]) for position in range(start, len(ids))))
    return losses


# --- the result ------------------------------------------------------------------------------------------------------


def test_scores_equal_a_plain_loop_in_double_precision(finished: Path, base_folder: Path) -> None:
    text = read_folder(finished, "examples")[["example_id", "prompt", "response"]]
    rows = read_folder(finished, "scores").merge(text, on="example_id").sort_values("example_id")[:200]
    base = np.array(plain_nlls(base_folder, rows.to_dict("records")))
    reference = np.array(plain_nlls(finished / "reference", rows.to_dict("records")))
    assert (base != reference).all()
    assert rows["truncated"].sum() > 10
    np.testing.assert_allclose(rows["base_nll"], base, rtol=1e-5)
    np.testing.assert_allclose(rows["reference_nll"], reference, rtol=1e-5)
    np.testing.assert_allclose(rows["davir"], (base - reference) / base, rtol=0, atol=1e-5)
    np.testing.assert_allclose(rows["rho_sum"], base - reference, rtol=0, atol=1e-5 * base.max())
    np.testing.assert_allclose(rows["rho_mean"], rows["rho_sum"] / rows["num_response_tokens"], rtol=1e-12)


def test_examples_hold_the_text_and_tokens_of_the_source(
    finished: Path, config: RunConfig, tokenizer: PreTrainedTokenizerFast
) -> None:
    examples = read_folder(finished, "examples")
    lines = {Path(str(source.path)).name: source_lines(str(source.path)) for source in config.sources}
    for row in examples.to_dict("records"):
        line = lines[row["source_file"]][row["source_row"]]
        instruction, answer = (line[name] for name in TEXT_FIELDS[row["source"]])
        assert instruction in row["prompt"]
        assert row["response"] == answer
        assert json.loads(row["record"]) == line
        ids, start = plain_ids(tokenizer, row)
        assert row["input_ids"].tolist() == ids
        assert row["response_spans"].tolist() == [start, len(ids)]
        assert (row["num_prompt_tokens"], row["num_response_tokens"]) == (start, len(ids) - start)
        assert row["truncated"] == (ids[-1] != tokenizer.eos_token_id)


def test_every_source_row_is_in_examples_or_rejects_once(finished: Path, config: RunConfig) -> None:
    found = [read_folder(finished, folder) for folder in ("examples", "rejects") if files_of(finished, folder)]
    rows = [(row.source, row.source_row) for table in found for row in table.itertuples()]
    assert sorted(rows) == [(source.name, row) for source in config.sources for row in range(LIMIT)]


def test_the_books_balance(finished: Path) -> None:
    prepared, scored, ranked, selected = (manifest(finished, s).counts for s in ("prepare", "score", "rank", "select"))
    assert prepared["read"] == prepared["prepared"] + prepared["rejected"] == 2 * LIMIT
    statuses = {name: count for name, count in scored.items() if name not in ("examples", "scored")}
    assert prepared["prepared"] == scored["examples"] == sum(statuses.values())
    assert scored["scored"] == statuses["ok"]
    assert scored["examples"] == ranked["ranked"] + ranked["unranked"]
    assert selected == {
        "ranked": ranked["ranked"], "eligible": ranked["ranked"], "selected": int(ranked["ranked"] * 29) // 100
    }  # fmt: skip
    for folder, count in {
        "scores": scored["examples"],
        "ranked": ranked["ranked"],
        "selected": selected["selected"],
    }.items():
        assert len(read_folder(finished, folder)) == count


def test_manifests_name_every_file_with_its_rows(finished: Path) -> None:
    for stage, folder in {"score": "scores", "rank": "ranked", "select": "selected"}.items():
        entries = manifest(finished, stage).files
        assert [entry.name for entry in entries] == [f"{folder}/{file.name}" for file in files_of(finished, folder)]
        assert [entry.rows for entry in entries] == [pq.read_metadata(f).num_rows for f in files_of(finished, folder)]
    prepared = {entry.name for entry in manifest(finished, "prepare").files}
    assert prepared == {
        f"{file.parent.name}/{file.name}" for f in ("examples", "rejects") for file in files_of(finished, f)
    }


def test_ranks_are_the_exact_order_of_the_scores(finished: Path) -> None:
    scores, ranked = read_folder(finished, "scores"), read_folder(finished, "ranked")
    order = np.lexsort((scores["example_id"], -scores["davir"]))
    assert ranked["rank"].tolist() == list(range(1, len(scores) + 1))
    assert ranked["example_id"].tolist() == scores["example_id"].to_numpy()[order].tolist()
    pd.testing.assert_frame_equal(ranked.drop(columns="rank"), scores.iloc[order].reset_index(drop=True))


def test_the_selection_is_the_first_ranks_with_their_text(finished: Path, config: RunConfig) -> None:
    ranked, selected = read_folder(finished, "ranked"), read_folder(finished, "selected")
    scores = list(ranked.columns)
    pd.testing.assert_frame_equal(selected[scores], ranked[: len(selected)])
    lines = {Path(str(source.path)).name: source_lines(str(source.path)) for source in config.sources}
    examples = read_folder(finished, "examples").set_index("example_id")
    for row in selected.to_dict("records"):
        line = lines[row["source_file"]][row["source_row"]]
        instruction, answer = (line[name] for name in TEXT_FIELDS[row["source"]])
        assert (instruction in row["prompt"], row["response"], json.loads(row["record"])) == (True, answer, line)
        assert row["prompt"] == examples.loc[row["example_id"], "prompt"]


def test_files_have_the_schemas_of_the_contract(finished: Path) -> None:
    for folder, expected in SCHEMAS.items():
        assert files_of(finished, folder)
        for file in files_of(finished, folder):
            assert pq.read_schema(file).remove_metadata().equals(expected), file


def test_data_folders_hold_parquet_only_and_load_anywhere(finished: Path, tmp_path: Path) -> None:
    for folder in SCHEMAS:
        assert {path.suffix for path in (finished / folder).iterdir()} == {".parquet"}
        expected = sum(pq.read_metadata(file).num_rows for file in files_of(finished, folder))
        loaded = datasets.load_dataset("parquet", data_dir=str(finished / folder), cache_dir=str(tmp_path))
        assert loaded["train"].num_rows == expected
        assert len(pd.read_parquet(finished / folder)) == expected


def test_ranked_and_selected_name_their_run_and_version(finished: Path) -> None:
    for folder in ("ranked", "selected"):
        metadata = pq.read_schema(files_of(finished, folder)[0]).metadata
        assert metadata[b"davir_ray.run"].decode() == str(finished)
        assert {b"davir_ray.fingerprint", b"davir_ray.version", b"davir_ray.order"} <= set(metadata)


def test_at_least_two_hundred_rows_keep_token_losses_that_add_up(finished: Path) -> None:
    scores = read_folder(finished, "scores")
    kept = scores[scores["base_token_nll"].notna()]
    assert len(kept) >= 200
    for row in kept.itertuples():
        assert len(row.base_token_nll) == len(row.reference_token_nll) == row.num_response_tokens
        assert row.base_token_nll.sum(dtype=np.float64) == pytest.approx(row.base_nll, rel=1e-12)


def test_page_and_json_tell_the_counts_of_the_manifests(finished: Path) -> None:
    facts = json.loads((finished / "report.json").read_text())
    counts = {**manifest(finished, "prepare").counts, **manifest(finished, "rank").counts}
    counts |= {**manifest(finished, "score").counts, **manifest(finished, "select").counts}
    for name in ("read", "prepared", "rejected", "scored", "ranked", "selected"):
        assert facts["headline"][name] == counts[name]
    assert all(book["balanced"] for book in facts["books"])
    page = (finished / "report.html").read_text()
    assert page.lstrip().startswith("<!doctype html") or page.lstrip().startswith("<!DOCTYPE html")
    for name in ("read", "prepared", "selected"):
        assert f"{counts[name]:,}" in page


def test_the_reference_says_how_its_text_was_encoded(finished: Path) -> None:
    spec = json.loads((finished / "reference" / "scoring_spec.json").read_text())
    assert spec["max_tokens"] == MAX_TOKENS
    assert (spec["bos_token"], spec["eos_token"], spec["eos_scored"]) == ("<s>", "</s>", True)
    assert spec == manifest(finished, "prepare").fingerprint["encoding"]
    assert not list((finished / "reference").glob("*.bin"))
    assert not (finished / "checkpoints").exists()


# --- again -----------------------------------------------------------------------------------------------------------


def test_what_only_an_unfinished_stage_needs_is_cleared_away(copied: RunConfig) -> None:
    for name in ("prepare_tasks/0123/00000.json", "checkpoints/0123/checkpoint_1/training_state.pt"):
        (Run.at(str(copied.output)) / name).write_text("left by a driver that died")
    run_all(copied)
    assert not (Run.at(str(copied.output)) / "prepare_tasks").exists()
    assert not (Run.at(str(copied.output)) / "checkpoints").exists()


def test_a_second_run_skips_everything(copied: RunConfig) -> None:
    before = snapshot(copied.output, *TABLES, "reference")
    manifests = {stage: snapshot(copied.output, "manifests")[f"manifests/{stage}.json"] for stage in STAGES}
    run_all(copied)
    assert snapshot(copied.output, *TABLES, "reference") == before
    after = snapshot(copied.output, "manifests")
    assert {stage: after[f"manifests/{stage}.json"] for stage in STAGES} == manifests


def test_only_missing_shards_are_scored_again_and_to_the_same_bytes(finished: Path, copied: RunConfig) -> None:
    before = snapshot(copied.output, "scores")
    lost = [str(file.relative_to(str(copied.output))) for file in files_of(copied.output, "scores")[1:3]]
    for name in [*lost, "manifests/score.json"]:
        Path(str(copied.output), name).unlink()
    scored, ranked = manifest(finished, "score"), manifest(copied.output, "rank")
    run_all(copied)
    after = snapshot(copied.output, "scores")
    assert {name: content for name, (_, content) in after.items()} == {n: content for n, (_, content) in before.items()}
    assert [name for name in before if after[name][0] != before[name][0]] == lost
    assert manifest(copied.output, "rank") == ranked
    again = manifest(copied.output, "score")
    assert (again.fingerprint, again.counts, again.files) == (scored.fingerprint, scored.counts, scored.files)


CHANGES: dict[str, Callable[[RunConfig], RunConfig]] = {
    "limit": lambda config: replace(config, limit=LIMIT - 1),
    "max_tokens": lambda config: replace(config, prepare=replace(config.prepare, max_tokens=MAX_TOKENS - 1)),
    "sources": lambda config: replace(config, sources=config.sources[:1]),
    "keep_record": lambda config: replace(config, keep_record=False),
    "learning_rate": lambda config: replace(config, finetune=replace(config.finetune, learning_rate=5e-4)),
    "precision": lambda config: replace(config, score=replace(config.score, precision="float64")),
    "num_threads": lambda config: replace(config, score=replace(config.score, num_cpus=2)),
    "keep_token_nll": lambda config: replace(config, keep_token_nll="all"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_other_settings_are_refused_by_name_and_change_nothing(copied: RunConfig, name: str) -> None:
    before = snapshot(copied.output, *TABLES, "reference", "manifests")
    remembered = Path(str(copied.output), "config.yaml").read_text()
    with pytest.raises(OutputError, match=name) as caught:
        run_all(CHANGES[name](copied))
    assert "--overwrite" in str(caught.value)
    assert snapshot(copied.output, *TABLES, "reference", "manifests") == before
    assert Path(str(copied.output), "config.yaml").read_text() == remembered


def test_another_base_is_refused(copied: RunConfig, reference_folder: Path) -> None:
    with pytest.raises(OutputError, match=r"base\.model\.safetensors"):
        run_all(replace(copied, base=str(reference_folder)))


def test_a_base_of_links_is_the_same_base_until_other_weights_are_behind_them(
    copied: RunConfig, coded_base: Path, reference_folder: Path, tmp_path: Path
) -> None:
    linked = tmp_path / "linked"
    linked.mkdir()
    for file in coded_base.iterdir():
        (linked / file.name).symlink_to(file)
    before = snapshot(copied.output, "examples", "reference", "scores")
    run_all(replace(copied, base=str(linked)))
    (linked / "model.safetensors").unlink()
    (linked / "model.safetensors").symlink_to(reference_folder / "model.safetensors")
    with pytest.raises(OutputError, match=r"holds another run: .*base\.model\.safetensors"):
        run_all(replace(copied, base=str(linked)))
    assert snapshot(copied.output, "examples", "reference", "scores") == before


def test_a_tokenizer_that_encodes_otherwise_is_refused(copied: RunConfig, base_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(base_folder, tmp_path / "base")
    tokenizer = json.loads((tmp_path / "base" / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"]["add_prefix_space"] = True
    (tmp_path / "base" / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(OutputError, match=r"prepare differs in encoding\.tokenizer.*--overwrite.*another --output"):
        run_all(replace(copied, base=str(tmp_path / "base")))


def test_changed_source_files_are_refused(finished: Path, config: RunConfig, copied: RunConfig, tmp_path: Path) -> None:
    file = tmp_path / "alpaca_9k.jsonl.gz"
    lines = source_lines(str(config.sources[0].path))
    file.write_bytes(gzip.compress("".join(json.dumps(line) + "\n" for line in lines[:-1]).encode()))
    changed = [replace(config.sources[0], path=str(file)), config.sources[1]]
    with pytest.raises(OutputError, match=r"alpaca_9k\.jsonl\.gz"):
        run_all(replace(copied, sources=changed))


@pytest.mark.slow
def test_overwrite_redoes_what_differs_with_a_given_reference_too(copied: RunConfig, reference_folder: Path) -> None:
    outside = replace(copied, reference=str(reference_folder), overwrite=True)
    before = snapshot(copied.output, "examples", "reference")
    run_all(outside)
    assert snapshot(copied.output, "examples", "reference") == before
    assert len(read_folder(copied.output, "scores")) == manifest(copied.output, "prepare").counts["prepared"] > LIMIT

    run_all(replace(outside, limit=20))
    assert not Path(str(copied.output), "reference").exists()
    assert not Path(str(copied.output), "manifests", "finetune.json").exists()
    text = read_folder(copied.output, "examples")[["example_id", "prompt", "response"]]
    scores = read_folder(copied.output, "scores").merge(text, on="example_id")
    assert len(scores) == len(read_folder(copied.output, "ranked")) == 40
    expected = plain_nlls(reference_folder, scores.to_dict("records"))
    np.testing.assert_allclose(scores["reference_nll"], expected, rtol=1e-5)


@pytest.mark.slow
def test_an_unfinished_score_stage_of_other_settings_is_refused(copied: RunConfig) -> None:
    Path(str(copied.output), "manifests/score.json").unlink()
    files_of(copied.output, "scores")[0].unlink()
    other = replace(copied, keep_token_nll="none")
    with pytest.raises(OutputError, match=r"holds an unfinished score with other settings.*settings.keep_token_nll"):
        run_all(other)
    run_all(replace(other, overwrite=True))
    assert len(read_folder(copied.output, "scores")) == manifest(copied.output, "prepare").counts["prepared"] > LIMIT


@pytest.mark.parametrize("folder", ["examples", "scores", "reference"])
def test_a_lost_file_of_a_complete_stage_is_named(copied: RunConfig, folder: str) -> None:
    lost = next(Path(str(copied.output), folder).glob("*.parquet" if folder != "reference" else "*.safetensors"))
    lost.unlink()
    with pytest.raises(OutputError, match=f"{folder}/{lost.name}"):
        run_all(copied)


@pytest.mark.parametrize("folder", ["examples", "scores", "ranked", "selected", "reference"])
@pytest.mark.parametrize("keeps_its_time", [True, False])
def test_verify_finds_a_flipped_bit_anywhere(copied: RunConfig, folder: str, keeps_its_time: bool) -> None:
    file = max(Path(str(copied.output), folder).iterdir(), key=lambda path: path.stat().st_size)
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(bytes(content))
    if keeps_its_time:
        os.utime(file, ns=times)
    with pytest.raises(IntegrityError, match=f"{folder}/{file.name}: sha256"):
        verify_only(str(copied.output), 10, 0)


def test_verify_finds_a_report_that_is_not_as_it_was_written(copied: RunConfig) -> None:
    page = Path(str(copied.output), "report.html")
    page.write_text(page.read_text().replace("Known limits", "No limits"))
    Path(str(copied.output), "report.json").unlink()
    with pytest.raises(
        IntegrityError, match=r"2 files .*report\.html: \d+ bytes → \d+; report\.json: \d+ bytes → missing"
    ):
        verify_only(str(copied.output), 10, 0)


def test_verify_does_not_take_files_for_sound_whose_manifest_is_gone(copied: RunConfig) -> None:
    Path(str(copied.output), "manifests", "prepare.json").unlink()
    with pytest.raises(OutputError, match="no complete prepare stage"):
        verify_only(str(copied.output), 10, 0)


@pytest.mark.parametrize("folder", ["examples", "scores", "reference"])
def test_a_changed_file_of_a_complete_stage_is_named(copied: RunConfig, folder: str) -> None:
    file = max(Path(str(copied.output), folder).iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(bytes(content))
    with pytest.raises(OutputError, match=f"{folder}/{file.name}: sha256.*--overwrite"):
        run_all(copied)


def test_verify_scores_again_and_agrees(copied: RunConfig) -> None:
    found = verify_only(str(copied.output), 50, 0)
    assert found.num_rows == 50
    assert found.largest_nll_difference < 1e-4
    assert found.rank_correlation > 0.999
    assert found.overlap == 1
    stages = [manifest(copied.output, stage) for stage in (*STAGES, "report")]
    assert found.num_files == sum(len(stage.files) for stage in stages)


@pytest.mark.slow
def test_verify_finds_a_score_that_the_models_do_not_give(copied: RunConfig) -> None:
    """Of a row whose losses were written by a faulty kernel, checksums and all."""
    (name, *_) = [path.name for path in files_of(copied.output, "scores")]
    place = Run.at(str(copied.output)) / "scores" / name
    table = read_parquet(place)
    wrong = pa.array([value + 5 for value in table["base_nll"].to_pylist()])
    table = table.set_column(table.schema.get_field_index("base_nll"), "base_nll", wrong)
    entry = write_parquet(place, table)
    scored = manifest(copied.output, "score")
    files = [replace(entry, name=f"scores/{name}") if file.name.endswith(name) else file for file in scored.files]
    replace(scored, files=files).commit(Run.at(str(copied.output)).folder)
    with pytest.raises(IntegrityError, match=r"stored losses of example \d+ differ by [\d.]+ nats per token"):
        verify_only(str(copied.output), 300, 0)


def test_verify_refuses_another_base(copied: RunConfig, coded_base: Path, tmp_path: Path) -> None:
    config = Path(str(copied.output), "config.yaml")
    shutil.copytree(coded_base, tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text((coded_base / "config.json").read_text() + " ")
    config.write_text(config.read_text().replace(str(coded_base), str(tmp_path / "other")))
    with pytest.raises(OutputError, match=r"other is not the base that the run was scored with \(config\.json"):
        verify_only(str(copied.output), 10, 0)


@pytest.mark.slow
def test_only_their_own_flag_lets_other_jobs_run_the_code_of_a_runs_model(copied: RunConfig, ran: Path) -> None:
    """Whatever the run's configuration says, which somebody else may have written."""
    run, file = Run.at(str(copied.output)), Path(str(copied.output), "config.yaml")
    file.write_text(file.read_text().replace("trust_remote_code: false", "trust_remote_code: true"))
    before = last_config(run)
    assert before.trust_remote_code
    heldout = CompareConfig(heldout_sources=copied.sources)

    verify_only(str(run), 3, 0)
    rank_only(RankOptions(output=str(run), changes={"select.top_k": 3}))
    prepared = prepare_heldout(run, before, heldout)
    assert not (prepared.base.trust_remote_code or ran.exists())

    with pytest.raises(ModelError):  # the reference was saved without the code
        verify_only(str(run), 3, 0, trust_remote_code=True)
    assert ran.exists()
    ran.unlink()
    rank_only(RankOptions(output=str(run), changes={"select.top_k": 4}, trust_remote_code=True))
    assert not ran.exists(), "the tokenizer's class is transformers' own, as prepare has noted"
    prepared_by_0_2 = manifest(copied.output, "prepare")
    del prepared_by_0_2.details[TOKENIZER_CLASS]
    prepared_by_0_2.write(run.folder)
    rank_only(RankOptions(output=str(run), changes={"select.top_k": 5}, trust_remote_code=True))
    assert ran.exists()
    assert prepare_heldout(run, before, replace(heldout, trust_remote_code=True)).base.trust_remote_code


def test_a_flipped_byte_in_a_manifest_is_found(copied: RunConfig) -> None:
    for stage in ("score", "prepare"):
        file = Path(str(copied.output), "manifests", f"{stage}.json")
        whole = file.read_bytes()
        place = whole.index(b"scored" if stage == "score" else b"prepared")
        file.write_bytes(whole[:place] + b"x" + whole[place + 1 :])
        with pytest.raises(IntegrityError, match=stage):
            run_all(copied)
        file.write_bytes(whole)


def test_a_folder_of_somebody_else_is_never_touched(config: RunConfig, ray_session: None, tmp_path: Path) -> None:
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "mine.py").write_text("mine")
    with pytest.raises(OutputError, match="examples"):
        run_all(replace(config, output=str(tmp_path)))
    assert (tmp_path / "examples" / "mine.py").read_text() == "mine"


# --- rank and select again -------------------------------------------------------------------------------------------


def test_another_rule_selects_again_without_a_flag(copied: RunConfig) -> None:
    before = snapshot(copied.output, "examples", "scores", "ranked")
    run_all(replace(copied, select=SelectConfig(top_k=7)))
    assert snapshot(copied.output, "examples", "scores", "ranked") == before
    assert read_folder(copied.output, "selected")["rank"].tolist() == list(range(1, 8))


def test_another_order_ranks_again_without_a_flag(copied: RunConfig) -> None:
    before = snapshot(copied.output, "examples", "scores")
    run_all(replace(copied, rank=RankConfig(order="base_nll", lowest=True)))
    assert snapshot(copied.output, "examples", "scores") == before
    assert read_folder(copied.output, "ranked")["base_nll"].is_monotonic_increasing
    assert len(read_folder(copied.output, "selected")) == len(read_folder(copied.output, "ranked")) * 29 // 100


def test_rank_only_needs_only_the_output(copied: RunConfig) -> None:
    before = snapshot(copied.output, "examples", "scores", "reference")
    rank_only(parse_rank(["--output", str(copied.output), "--rank.order", "rho_sum", "--select.top_k", "3"]))
    assert snapshot(copied.output, "examples", "scores", "reference") == before
    scores, selected = read_folder(copied.output, "scores"), read_folder(copied.output, "selected")
    order = np.lexsort((scores["example_id"], -scores["rho_sum"]))[:3]
    assert selected["example_id"].tolist() == scores["example_id"].to_numpy()[order].tolist()
    facts = json.loads(Path(str(copied.output), "report.json").read_text())
    assert facts["headline"]["selected"] == 3
    assert facts["headline"]["base"] == copied.base


def test_a_progress_file_that_cannot_be_written_ends_nothing(
    copied: RunConfig, caplog: pytest.LogCaptureFixture
) -> None:
    file = Path(str(copied.output), "progress.json")
    file.unlink()
    (file / "in the way").mkdir(parents=True)  # no file takes the place of a folder
    rank_only(RankOptions(output=str(copied.output), changes={"select.top_k": 4}))
    assert len(read_folder(copied.output, "selected")) == 4
    assert (Path(str(copied.output)) / "report.html").exists()
    told = [record.getMessage() for record in caplog.records if "cannot be written" in record.getMessage()]
    assert len(told) == 1
    assert f"{file} cannot be written" in told[0]
    found = status(str(copied.output))
    assert found.stages["select"]["selected"] == 4
    assert found.progress is None


@pytest.mark.slow
def test_ranking_again_begins_with_the_runs_own_order_and_filters(copied: RunConfig) -> None:
    filters = SelectConfig(top_fraction=0.5, drop_duplicates=True, min_response_tokens=30)
    run_all(replace(copied, rank=RankConfig(order="base_nll", lowest=True), select=filters))
    rank_only(parse_rank(["--output", str(copied.output), "--select.top_k", "9"]))
    scores, selected = read_folder(copied.output, "scores"), read_folder(copied.output, "selected")
    scores = scores.sort_values(["base_nll", "example_id"]).drop_duplicates("content_hash")
    scores = scores[scores["num_response_tokens"] >= 30]
    assert selected["example_id"].tolist() == scores["example_id"].tolist()[:9]
    last = last_config(Run.at(str(copied.output)))
    assert (last.rank, last.select) == (
        RankConfig(order="base_nll", lowest=True), replace(filters, top_fraction=None, top_k=9),
    )  # fmt: skip


def test_rank_only_refuses_a_run_without_scores(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no complete score stage"):
        rank_only(RankOptions(output=str(tmp_path), changes={"select.top_k": 3}))


# --- an outside reference --------------------------------------------------------------------------------------------


@pytest.fixture
def untouched_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where Ray would be connected."""
    monkeypatch.setattr("davir_ray.pipeline.connected_to", lambda: pytest.fail("Ray was started"))


def with_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerFast, target: Path) -> Path:
    """A copy of a checkpoint with another tokenizer."""
    shutil.copytree(folder, target)
    tokenizer.save_pretrained(target)
    return target


def test_a_reference_with_another_tokenizer_is_refused_before_ray_starts(
    config: RunConfig,
    untouched_ray: None,
    reference_folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    other = tokenizer.train_new_from_iterator(["entirely other words make other merges " * 20], len(tokenizer))
    reference = with_tokenizer(reference_folder, other, tmp_path / "reference")
    with pytest.raises(ModelError, match="encode alike"):
        run_all(replace(config, output=str(tmp_path / "run"), reference=str(reference)))


def test_a_reference_with_another_end_token_is_refused_before_ray_starts(
    config: RunConfig, untouched_ray: None, reference_folder: Path, tmp_path: Path
) -> None:
    other = AutoTokenizer.from_pretrained(reference_folder)
    other.eos_token = "<pad>"
    reference = with_tokenizer(reference_folder, other, tmp_path / "reference")
    with pytest.raises(ModelError, match="eos_token"):
        run_all(replace(config, output=str(tmp_path / "run"), reference=str(reference)))


def test_a_reference_trained_under_another_limit_is_refused_before_ray_starts(
    finished: Path, config: RunConfig, untouched_ray: None, tmp_path: Path
) -> None:
    other = replace(config.prepare, max_tokens=MAX_TOKENS + 1)
    reference = str(finished / "reference")
    with pytest.raises(ModelError, match=f"max_tokens: {MAX_TOKENS} → {MAX_TOKENS + 1}"):
        run_all(replace(config, output=str(tmp_path), reference=reference, prepare=other))


def test_a_limit_above_the_models_positions_is_refused(config: RunConfig, untouched_ray: None) -> None:
    with pytest.raises(ConfigError, match="1024 positions"):
        run_all(replace(config, prepare=PrepareConfig(max_tokens=1025)))


def test_more_than_all_is_refused_before_the_fine_tune(
    config: RunConfig, ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("davir_ray.stages.finetune.finetune", lambda *a, **k: pytest.fail("the fine-tune was started"))
    with pytest.raises(ConfigError, match="top_k"):
        run_all(replace(config, output=str(tmp_path / "run"), limit=5, select=SelectConfig(top_k=11)))


# --- a dry run -------------------------------------------------------------------------------------------------------


def test_a_dry_run_shows_examples_with_the_scored_tokens_marked_and_writes_nothing(
    config: RunConfig, ray_session: None, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    text = "\n".join(dry_run(replace(config, output=str(output))))
    assert not output.exists()
    first = source_lines(str(config.sources[0].path))[0]
    assert f"### Response:⟦{first['output']}</s>⟧" in text
    assert text.count("⟦") == text.count("⟧") == 6
    assert str(output) in text


def test_differences_name_old_and_new() -> None:
    assert differences({"a": {"b": 1}, "c": 2}, {"a": {"b": 3}, "c": 2}) == ["a.b: 1 → 3"]
