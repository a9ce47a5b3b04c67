"""The study from start to end on a small design, its tables recomputed from the files of the runs."""

import json
from dataclasses import replace
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from davir_ray.errors import OutputError
from davir_ray.study import losses, runs
from davir_ray.study.job import Design, run_study
from davir_ray.study.losses import loss_tables
from davir_ray.study.pools import PoolSize, write_rows
from davir_ray.study.runs import SMALL_RECIPE, Plan

POOL = PoolSize(clean=40, clean_copies=3, rare=4, exchanged=8, exchanged_copies=6, exchanged_near=5)
DESIGN = Design(pool=POOL, plan=Plan(epochs=(3,), four_folds=()), num_replicates=1, recipe=SMALL_RECIPE, base=None)


@pytest.fixture
def data(tmp_path: Path) -> tuple[Path, Path]:
    """Files of 240 and 20 rows that only this test has."""
    draw = np.random.default_rng(5)
    words = [f"w{number}" for number in range(60)]
    rows = [
        {"instruction": f"Say {number}: {' '.join(draw.choice(words, 4))}", "input": "",
         "output": " ".join(draw.choice(words, draw.integers(5, 20)))}
        for number in range(240)
    ]  # fmt: skip
    rare = [{"question": f"What is {number} + 1?", "answer": f"{number} plus one is then {number + 1} as I see it"}
            for number in range(20)]  # fmt: skip
    for name, found in (("alpaca", rows), ("rare", rare)):
        write_rows(tmp_path / f"{name}.jsonl", found)
    return tmp_path / "alpaca.jsonl", tmp_path / "rare.jsonl"


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_study_says_what_its_files_say_and_does_nothing_twice(
    data: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "PRETRAINING", replace(runs.PRETRAINING, max_steps=4))
    monkeypatch.setattr(losses, "NUM_DRAWS", 2)
    monkeypatch.setattr(losses, "GATE_P", 1.0)  # open, so that the selections are compared, too
    monkeypatch.setattr("davir_ray.study.job.NUM_FOR_BASE", 100)
    monkeypatch.setattr("davir_ray.study.job.NUM_HELD_OUT", 10)
    output = tmp_path / "study"
    text = run_study(*data, output, DESIGN)
    assert (output / "results.txt").read_text() == text + "\n"
    run, pool = output / "replicate-0" / "two-3", output / "replicate-0" / "pool.jsonl"
    found = duckdb.sql(
        f"""
        SELECT source_row, scores.davir, seen.davir AS seen
        FROM '{run}/examples/*.parquet' JOIN '{run}/scores/*.parquet' AS scores USING (example_id)
        JOIN '{run}/extra/seen/*.parquet' AS seen USING (example_id) ORDER BY source_row
        """
    ).fetchnumpy()
    rows = pq.read_table(output / "replicate-0" / "rows.parquet")
    assert rows["davir_two_3"].to_pylist() == found["davir"].tolist()
    assert rows["seen_two_3"].to_pylist() == found["seen"].tolist()
    truth = [json.loads(line) for line in pool.read_text().splitlines()]
    by_group: dict[int, list[float]] = {}
    for row, davir in zip(truth, found["davir"], strict=True):
        by_group.setdefault(row["group"], []).append(davir)
    classes = {row["group"]: row["planted_class"] for row in truth}
    clean, copied = (
        [np.mean(by_group[group]) for group, name in classes.items() if name == wanted]
        for wanted in ("clean", "exchanged_copies")
    )
    expected = np.mean([float(a > b) + 0.5 * float(a == b) for a in clean for b in copied])
    table = text[text.index("AUROC, clean above exchanged copies") :].splitlines()
    printed = next(line for line in table if line.strip().startswith("two, unseen, 3 epochs"))
    assert f" {expected:.3f} [" in printed
    chosen = duckdb.sql(f"SELECT record FROM '{run}/selected/*.parquet'").fetchall()
    share = sum(json.loads(record)["planted_class"] == "clean" for (record,) in chosen) / len(chosen)
    assert f"two, 3 epochs {'':<14}clean {share:.1%}" in text
    one, matched = (json.loads((output / "losses" / f"{name}-0.json").read_text()) for name in ("one", "random"))
    assert f"one - random: {one['loss'] - matched['loss']:.3f} [" in text
    lengths = duckdb.sql(f"SELECT num_response_tokens FROM '{run}/examples/*.parquet' ORDER BY source_row").fetchnumpy()
    assert sum(lengths["num_response_tokens"][one["rows"]]) == one["tokens"]
    assert abs(one["tokens"] - 0.06 * lengths["num_response_tokens"].sum()) <= lengths["num_response_tokens"].max() / 2
    assert len(matched["rows"]) == len(one["rows"])
    written = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.suffix in (".json", ".safetensors")}
    assert run_study(*data, output, DESIGN) == text
    with pytest.raises(OutputError, match=r"holds another study .*choose another --output"):
        run_study(data[1], data[0], output, DESIGN)
    assert written == {path: path.stat().st_mtime_ns for path in written}


@pytest.mark.slow
def test_a_held_out_loss_is_that_of_plain_transformers(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After training that changes nothing: the loss of the base itself."""
    monkeypatch.setattr(losses, "NUM_DRAWS", 1)
    rows = [{"prompt": f"Count to {number}.", "response": "one two three " * (1 + number % 4)} for number in range(40)]
    write_rows(tmp_path / "pool.jsonl", rows)
    write_rows(tmp_path / "held_out.jsonl", rows[:7])
    truth = pa.table({"planted_class": ["clean"] * 40})
    still = replace(SMALL_RECIPE, learning_rate=1e-30)
    text = loss_tables(
        base_folder, [(tmp_path / "pool.jsonl", truth)], tmp_path / "held_out.jsonl", still, tmp_path / "losses"
    )
    model = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    total, num_tokens = 0.0, 0
    for row in rows[:7]:
        prompt = [tokenizer.bos_token_id, *tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]]
        response = [*tokenizer(row["response"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        ids = torch.tensor([[*prompt, *response]])
        labels = torch.tensor([[-100] * len(prompt) + response])
        with torch.inference_mode():
            total += float(model(ids, labels=labels).loss) * len(response)
        num_tokens += len(response)
    (found,) = (json.loads(path.read_text()) for path in (tmp_path / "losses").glob("clean-0.json"))
    assert found["loss"] == pytest.approx(total / num_tokens, rel=1e-5)
    assert "clean - all" in text
