"""The main job with folds: no row is scored by a model that has seen it or a copy, also after a death."""

import json
import random
from collections import defaultdict
from itertools import combinations
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from drivers import Driver
from transformers import AutoModelForCausalLM

from davir_ray.cli import parse_as, parse_rank
from davir_ray.config.export import ExportOptions
from davir_ray.config.run import RunConfig
from davir_ray.errors import OutputError
from davir_ray.export.job import export
from davir_ray.pipeline import rank_only, run_all, verify_only
from davir_ray.run.files import read_parquet
from davir_ray.run.folder import Run
from davir_ray.run.status import status

pytestmark = pytest.mark.slow

NUM_ROWS = 60
NUM_COPIES = 8


def rows() -> list[dict[str, str]]:
    """Each an own text of forty words; eight of them four times, as a near copy and two exact ones."""
    draw = random.Random(0)
    made = []
    for row in range(NUM_ROWS):
        words = [draw.choice("abcdefghij") + str(draw.randrange(10**6)) for _ in range(40)]
        answer = " ".join(words)
        made.append({"prompt": f"Say what {row} is.", "response": answer})
        if row < NUM_COPIES:
            near = " ".join([*words[:-1], "otherwise"])
            made += [{"prompt": f"Say what {row} is!", "response": text} for text in (near, answer, answer)]
    return made


@pytest.fixture(scope="module")
def options(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    data = tmp_path_factory.mktemp("data") / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows())))
    return {
        "data": data, "format": "prompt_response", "base": base_folder, "prepare.folds": 2, "prepare.shard_rows": 8,
        "prepare.max_tokens": 512, "finetune.epochs": 2, "finetune.batch_size": 8, "finetune.learning_rate": 1e-2,
        "finetune.precision": "float32", "score.num_actors": 1, "score.both": "true", "select.top_k": 12,
    }  # fmt: skip


@pytest.fixture(scope="module")
def finished(options: dict[str, Any], ray_address: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose driver was killed when it had one of two references, and started again."""
    folder = tmp_path_factory.mktemp("folds")
    run = Run.at(folder / "run")
    given = {**options, "output": run, "finetune.num_cpus": 3}  # of four, so that one follows the other
    first = Driver("score.py", given, folder / "first.log", address=ray_address)
    noted = [run / "checkpoints" / "trained" / str(fold) / "manifests" / "finetune.json" for fold in range(2)]
    first.wait_for(lambda: any(place.exists() for place in noted), "the first reference")
    first.kill()
    done = [fold for fold, place in enumerate(noted) if place.exists()]
    assert len(done) == 1
    before = (run / "reference_folds" / str(done[0])).listed()
    second = Driver("score.py", given, folder / "second.log", address=ray_address)
    assert second.finish() == 0, second.output
    assert "1 references to train, each on the rows outside one fold, 1 done" in second.output
    assert (run / "reference_folds" / str(done[0])).listed() == before
    return run


def table(run: Run, folder: str) -> pa.Table:
    return pa.concat_tables([read_parquet(run / folder / name) for name in (run / folder).names(".parquet")])


def test_no_reference_has_seen_what_it_scores_or_a_copy_of_it(finished: Run) -> None:
    """By the losses of transformers, and copies by comparing every pair of texts."""
    examples = table(finished, "examples").to_pylist()
    scores = {row["example_id"]: row for row in table(finished, "scores").to_pylist()}
    seen = {row["example_id"]: row for row in table(finished, "extra/seen").to_pylist()}
    folds = defaultdict(list)
    for row in examples:
        folds[row["fold"]].append(row)
    assert sorted(folds) == [0, 1]
    assert abs(len(folds[0]) - len(folds[1])) <= NUM_COPIES
    for left, right in combinations(examples, 2):
        words = [set(row["response"].split()) for row in (left, right)]
        if len(words[0] & words[1]) > 20:
            assert left["fold"] == right["fold"]
    for fold, other in ((0, 1), (1, 0)):
        place = Path(finished.folder.path, "reference_folds")
        models = [AutoModelForCausalLM.from_pretrained(place / str(of)).eval() for of in (fold, other)]
        for row in folds[fold][::6]:
            ids, (start, end) = torch.tensor([row["input_ids"]]), row["response_spans"]
            with torch.no_grad():
                logprobs = [model(input_ids=ids).logits[0].double().log_softmax(-1) for model in models]
            sums = [-sum(float(of[at - 1, ids[0, at]]) for at in range(start, end)) for of in logprobs]
            found = [of[row["example_id"]]["reference_nll"] for of in (scores, seen)]
            assert found == pytest.approx(sums, rel=1e-4)
    gain = [seen[key]["davir"] - scores[key]["davir"] for key in scores]
    assert sum(gain) > 0, "what a reference has seen it knows better"


def test_the_order_is_the_place_within_the_fold(finished: Run) -> None:
    aligned = {row["example_id"]: row["davir_aligned"] for row in table(finished, "extra/davir_aligned").to_pylist()}
    ranked = table(finished, "ranked")
    assert ranked.column_names[-1] == "davir_aligned"
    expected = sorted(aligned, key=lambda key: (-aligned[key], key))
    assert ranked["example_id"].to_pylist() == expected
    fold_of = dict(
        zip(*(table(finished, "examples")[name].to_pylist() for name in ("example_id", "fold")), strict=True)
    )
    davir = dict(zip(*(ranked[name].to_pylist() for name in ("example_id", "davir")), strict=True))
    for fold in (0, 1):
        in_fold = [davir[key] for key in expected if fold_of[key] == fold]
        assert in_fold == sorted(in_fold, reverse=True)


def test_it_is_complete_verified_ranked_again_and_exported(
    finished: Run, options: dict[str, Any], ray_address: str, tmp_path: Path
) -> None:
    again = Driver("score.py", {**options, "output": finished, "finetune.num_cpus": 3}, tmp_path / "again")
    assert again.finish() == 0, again.output
    assert "seen: complete, skipped" in again.output
    assert "Started a local Ray" not in again.output
    assert "computed again one at a time" in "\n".join(verify_only(str(finished), 200, 0).lines())
    assert "2 references" in "\n".join(status(str(finished)).lines())
    rank_only(parse_rank(["--output", str(finished), "--rank.order", "davir", "--select.top_k", "5"]))
    assert (
        table(finished, "ranked")["davir"].to_pylist() == sorted(table(finished, "ranked")["davir"].to_pylist())[::-1]
    )
    rank_only(parse_rank(["--output", str(finished), "--rank.order", "davir_aligned", "--select.top_k", "5"]))
    export(ExportOptions(run=str(finished), to="sharegpt", output=str(tmp_path / "exported")))
    line = json.loads(next((tmp_path / "exported" / "data").iterdir()).read_text().splitlines()[0])
    assert line["davir_aligned"] > 0.9
    assert "for each of 2 folds" in (tmp_path / "exported" / "README.md").read_text()


def test_its_references_serve_the_same_folds_alone(
    finished: Run, options: dict[str, Any], ray_address: str, tmp_path: Path
) -> None:
    given = {name: value for name, value in options.items() if not name.startswith("finetune") and name != "score.both"}
    given["reference"] = finished
    other = run_all(parsed(given, output=tmp_path / "other"))
    assert table(other, "scores").equals(table(finished, "scores"))
    with pytest.raises(OutputError, match="were trained on other folds"):
        run_all(parsed(given, output=tmp_path / "fewer", limit=40))


def test_a_repeat_has_another_deal_and_is_averaged(
    finished: Run, options: dict[str, Any], ray_address: str, tmp_path: Path
) -> None:
    """No row is scored by a reference that has seen it, in either deal; the mean is that of the two places."""
    second = Run.at(tmp_path / "second")
    given = {name: value for name, value in options.items() if name != "score.both"}
    given |= {"output": second, "prepare.fold_seed": 1, "finetune.seed": 1}

    def job(name: str, expected: int = 0, **options: Any) -> str:
        words = {key.replace("__", "."): value for key, value in options.items()}
        driver = Driver(name, words, tmp_path / name, address=ray_address)
        assert driver.finish() == expected, driver.output
        return driver.output

    assert "not measured (one reference); score again with another seed" in job("score.py", **given)
    folds = [
        dict(zip(*(table(run, "examples")[name].to_pylist() for name in ("example_id", "fold")), strict=True))
        for run in (finished, second)
    ]
    assert folds[0].keys() == folds[1].keys()
    assert 0.25 < sum(folds[0][row] == folds[1][row] for row in folds[0]) / len(folds[0]) < 0.75
    scores = {row["example_id"]: row for row in table(second, "scores").to_pylist()}
    for fold in (0, 1):
        rows = [row for row in table(second, "examples").to_pylist() if row["fold"] == fold]
        place = Path(second.folder.path, "reference_folds", str(fold))
        assert (place.parent / str(1 - fold)).is_dir()
        model = AutoModelForCausalLM.from_pretrained(place).eval()
        for row in rows[::8]:
            ids, (start, end) = torch.tensor([row["input_ids"]]), row["response_spans"]
            with torch.no_grad():
                logprobs = model(input_ids=ids).logits[0].double().log_softmax(-1)
            expected = -sum(float(logprobs[at - 1, ids[0, at]]) for at in range(start, end))
            assert scores[row["example_id"]]["reference_nll"] == pytest.approx(expected, rel=1e-4)
    trained = [run.require("finetune").fingerprint for run in (finished, second)]
    assert trained[0]["examples"] != trained[1]["examples"]

    said = job("rank.py", output=second, rank__repeats=f"[{finished}]")
    assert "the selections of two references overlap by" in said
    aligned = [
        {row["example_id"]: row["davir_aligned"] for row in table(run, "extra/davir_aligned").to_pylist()}
        for run in (finished, second)
    ]
    means = {row: (aligned[0][row] + aligned[1][row]) / 2 for row in aligned[0]}
    ranked = table(second, "ranked")
    found = dict(zip(*(ranked[name].to_pylist() for name in ("example_id", "davir_repeated")), strict=True))
    assert found == pytest.approx(means)
    assert list(found) == sorted(found, key=lambda row: (-found[row], row))
    page = (second / "report.html").read_text()
    assert "not measured (one reference)" not in page
    assert "it does not include how much references vary" in page
    assert "computed again one at a time" in job("verify.py", output=second)
    assert "2 runs" in job("status.py", output=second)
    assert "repeats: complete, skipped" in job("rank.py", output=second, select__top_k=6)
    for other in (second, tmp_path / "nothing"):
        assert len(job("rank.py", 2, output=second, rank__repeats=f"[{other}]").splitlines()) == 1
    assert "stability: " not in job("rank.py", output=second, rank__repeats="[]")
    assert "not measured (one reference)" in (second / "report.html").read_text()


def parsed(options: dict[str, Any], **more: Any) -> RunConfig:
    return parse_as(RunConfig, [f"--{name}={value}" for name, value in (options | more).items()])
