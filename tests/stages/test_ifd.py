"""IFD as a pass of a run: added to a complete one alone, continued shard by shard, and ranked by."""

import gzip
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.compute as pc
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from davir_ray.complete import complete_run
from davir_ray.config.align import AlignRunConfig
from davir_ray.config.prepare import PrepareConfig
from davir_ray.config.rank import RankOptions
from davir_ray.config.run import RunConfig
from davir_ray.config.scoring import ScoreConfig
from davir_ray.config.selection import RankConfig, SelectConfig
from davir_ray.errors import ConfigError, IntegrityError, OutputError
from davir_ray.pipeline import rank_only, run_all, verify_only
from davir_ray.run.files import in_folder, read_parquet, write_parquet
from davir_ray.run.folder import Run
from davir_ray.run.status import status

ROWS = 60


def test_an_order_by_ifd_needs_its_pass() -> None:
    wanted = {"output": "run", "base": "base", "data": "data", "rank": RankConfig(order="ifd")}
    with pytest.raises(ConfigError, match=r"rank.order is ifd.*add --score.also '\[ifd\]'"):
        RunConfig(**wanted).require_input()
    RunConfig(**wanted, score=ScoreConfig(also=["ifd"])).require_input()
    with pytest.raises(ConfigError, match="without repetition"):
        ScoreConfig(also=["ifd", "ifd"])
    assert "score.also" in AlignRunConfig(score=ScoreConfig(precision="float32", also=["ifd"])).without_effect()


@pytest.fixture(scope="module")
def config(
    data_folder: Path, base_folder: Path, reference_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> RunConfig:
    folder = tmp_path_factory.mktemp("ifd")
    with gzip.open(data_folder / "alpaca_9k.jsonl.gz", "rt") as rows:
        (folder / "rows.jsonl").write_text("".join(next(rows) for _ in range(ROWS)))
    return RunConfig(
        output=str(folder / "run"),
        base=str(base_folder),
        reference=str(reference_folder),
        data=str(folder / "rows.jsonl"),
        max_bad_fraction=0.9,
        prepare=PrepareConfig(max_tokens=200, shard_rows=12),
        score=ScoreConfig(num_actors=1, precision="float64"),
        select=SelectConfig(top_k=5),
    )


def also_ifd(config: RunConfig, **changes: Any) -> RunConfig:
    return replace(config, score=replace(config.score, also=["ifd"]), **changes)


@pytest.fixture(scope="module")
def complete(config: RunConfig, ray_session: None) -> Path:
    """A complete run without the pass."""
    run_all(config)
    return Path(str(config.output))


@pytest.fixture(scope="module")
def added(config: RunConfig, complete: Path) -> tuple[RunConfig, dict[str, bytes], dict[str, int]]:
    """The same run after the pass was added; and the content and the time of each file before."""
    shutil.copytree(complete, complete.parent / "without")
    config, before = also_ifd(config), files_of(complete)
    times = {name: (complete / name).stat().st_mtime_ns for name in before}
    run_all(config)
    return config, before, times


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def table_of(folder: Path) -> pd.DataFrame:
    return pd.concat([pd.read_parquet(path) for path in sorted(folder.iterdir())], ignore_index=True)


@pytest.mark.slow
def test_a_complete_run_gets_the_pass_and_nothing_else(
    added: tuple[RunConfig, dict[str, bytes], dict[str, int]], caplog: pytest.LogCaptureFixture
) -> None:
    config, before, times = added
    output = Path(str(config.output))
    after = files_of(output)
    new = set(after) - set(before)
    shards = {name.removeprefix("scores/") for name in before if name.startswith("scores/")}
    assert len(shards) >= 3
    assert new == {f"extra/ifd/{name}" for name in shards} | {"manifests/ifd.json"}
    written = {name for name in before if (output / name).stat().st_mtime_ns != times[name]}
    assert written == {"config.yaml", "progress.json", "manifests/complete.json"}
    assert all(after[name] == before[name] for name in set(before) - written)
    assert "ifd " in "\n".join(status(str(output)).lines())
    with caplog.at_level(logging.INFO):
        assert complete_run(config) is not None
    assert "ifd: complete, skipped" in caplog.text
    run_all(replace(config, score=replace(config.score, also=[])))  # without it nothing is lost
    assert {name: content for name, content in files_of(output).items() if name in new} == {
        name: after[name] for name in new
    }
    run_all(config)
    assert complete_run(config) is not None


@pytest.mark.slow
def test_the_values_are_those_of_a_loop_over_the_examples(
    added: tuple[RunConfig, dict[str, bytes], dict[str, int]], base_folder: Path
) -> None:
    """Of whole and of truncated rows, in float64: nothing is tokenised again."""
    output = Path(str(added[0].output))
    found, examples = table_of(output / "extra" / "ifd"), table_of(output / "examples")
    assert found["example_id"].tolist() == examples["example_id"].tolist()
    assert 3 < examples["truncated"].sum() < len(examples) - 3
    model = AutoModelForCausalLM.from_pretrained(base_folder, attn_implementation="sdpa", dtype=torch.float64).eval()
    bos = AutoTokenizer.from_pretrained(base_folder).bos_token_id

    @torch.no_grad()
    def mean_loss(ids: list[int], num_scored: int) -> float:
        logprobs_TV = torch.log_softmax(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0], dim=-1)
        return -float(np.mean([float(logprobs_TV[at - 1, ids[at]]) for at in range(len(ids) - num_scored, len(ids))]))

    for row, example in zip(found.to_dict("records"), examples.to_dict("records"), strict=True):
        ids = [int(token) for token in example["input_ids"]]
        (start, end), count = example["response_spans"], example["num_response_tokens"]
        assert end == len(ids)
        with_prompt, alone = mean_loss(ids, count), mean_loss([bos, *ids[start:end]], count)
        assert row["alone_nll"] == pytest.approx(alone * count, rel=1e-10)
        assert row["ifd"] == pytest.approx(with_prompt / alone, rel=1e-10)
        assert row["ifd_perplexity"] == pytest.approx(np.exp(with_prompt) / np.exp(alone), rel=1e-9)
        assert (row["status"], row["num_response_tokens"]) == ("ok", count)


@pytest.mark.slow
def test_an_unfinished_pass_goes_on_with_what_is_missing(
    added: tuple[RunConfig, dict[str, bytes], dict[str, int]], tmp_path: Path
) -> None:
    source, output = Path(str(added[0].output)), tmp_path / "run"
    shutil.copytree(source, output)
    lost, *kept = sorted((output / "extra" / "ifd").iterdir())
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in kept}
    content = lost.read_bytes()
    lost.unlink()
    (output / "manifests" / "ifd.json").unlink()
    run_all(replace(added[0], output=str(output)))
    assert lost.read_bytes() == content
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in kept} == before
    assert Run.at(output).require("ifd").details["shards_scored_by_this_driver"] == 1


@pytest.mark.slow
def test_rows_are_ranked_and_selected_by_ifd(
    added: tuple[RunConfig, dict[str, bytes], dict[str, int]], complete: Path, tmp_path: Path
) -> None:
    changes = {"rank.order": "ifd", "select.top_k": 7, "select.max_score": 1.0}

    def options(output: Path) -> RankOptions:
        given = {"output": str(output), **changes}
        return RankOptions.of(given, given)

    with pytest.raises(OutputError, match=r"no complete extra/ifd.*--score.also '\[ifd\]'"):
        rank_only(options(complete.parent / "without"))
    output = tmp_path / "run"
    shutil.copytree(Path(str(added[0].output)), output)
    scores = files_of(output / "scores")
    rank_only(options(output))
    assert files_of(output / "scores") == scores
    values, selected = table_of(output / "extra" / "ifd"), table_of(output / "selected")
    eligible = values[values["ifd"] <= 1]
    assert 7 < len(eligible) < len(values)
    expected = eligible.iloc[np.lexsort((eligible["example_id"], -eligible["ifd"]))][:7]
    assert selected["example_id"].tolist() == expected["example_id"].tolist()
    assert selected["ifd"].tolist() == expected["ifd"].tolist()
    assert "by ifd, highest first" in (output / "report.html").read_text()


@pytest.mark.slow
def test_what_has_changed_is_found_by_verify(
    added: tuple[RunConfig, dict[str, bytes], dict[str, int]], tmp_path: Path
) -> None:
    output = tmp_path / "run"
    shutil.copytree(Path(str(added[0].output)), output)
    assert verify_only(str(output), 20, 0).num_rows == 20
    run = Run.at(output)
    name = (run / "extra/ifd").names()[0]
    table, manifest = read_parquet(run / "extra/ifd" / name), run.require("ifd")
    changed = table.set_column(2, "alone_nll", pc.add(table["alone_nll"], 500.0))
    (entry,) = in_folder("extra/ifd", [write_parquet(run / "extra/ifd" / name, changed)])
    files = [entry if one.name == entry.name else one for one in manifest.files]
    replace(manifest, files=files).commit(run.folder)
    with pytest.raises(IntegrityError, match="stored losses of example"):
        verify_only(str(output), ROWS, 0)
    shard = output / "extra" / "ifd" / name
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    with pytest.raises(IntegrityError, match="extra/ifd"):
        verify_only(str(output), 20, 0)


@pytest.mark.slow
def test_a_run_without_bos_puts_eos_before_the_response(
    config: RunConfig, make_checkpoint: Callable[[int], Path], tmp_path: Path, ray_session: None
) -> None:
    """Both losses are of the same tokens: their first one has a predictor in both."""
    base, reference = (shutil.copytree(make_checkpoint(seed), tmp_path / f"model-{seed}") for seed in (0, 1))
    for folder in (base, reference):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.bos_token = None
        tokenizer.save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(base).bos_token_id is None
    eos = AutoTokenizer.from_pretrained(base).eos_token_id
    output = tmp_path / "run"
    run_all(
        also_ifd(config, output=str(output), base=str(base), reference=str(reference), rank=RankConfig(order="ifd"))
    )
    found, examples = table_of(output / "extra" / "ifd"), table_of(output / "examples")
    scores = table_of(output / "scores")
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="sdpa", dtype=torch.float64).eval()
    assert set(found["status"]) == {"ok"}
    for row in range(0, len(found), 7):
        start, end = examples["response_spans"][row]
        ids = torch.tensor([[eos, *examples["input_ids"][row][start:end]]])
        with torch.no_grad():
            logits_TV = model(input_ids=ids, use_cache=False).logits[0, :-1]
        alone = float(torch.nn.functional.cross_entropy(logits_TV, ids[0, 1:], reduction="sum"))
        assert found["alone_nll"][row] == pytest.approx(alone, rel=1e-10)
        assert found["ifd"][row] == pytest.approx(scores["base_nll"][row] / alone, rel=1e-10)
