"""The doors: each script parses, calls its chain, says where the result lies and ends with the right status."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

import davir_ray
from davir_ray.run.folder import Run

ROOT = Path(davir_ray.__file__).parent.parent
JOBS = sorted(path.name for path in (ROOT / "jobs").glob("*.py"))


def run_script(name: str, *argv: str, address: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run a job to its end, with a Ray of its own or the running one at `address`."""
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    environment |= {"RAY_ADDRESS": address} if address else {}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, str(ROOT / "jobs" / name), *argv]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


def test_the_main_jobs_have_their_fixed_names() -> None:
    assert {"score.py", "finetune.py", "rank.py"} <= set(JOBS)
    assert not {"select.py", "evaluate.py"} & set(JOBS)


@pytest.mark.parametrize("name", ["score.py", "finetune.py", "rank.py"])
def test_a_mistake_is_one_line_and_status_2(name: str) -> None:
    ended = run_script(name, "--no_such_option", "1")
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr.count("\n") == 1
    assert ended.stderr.startswith(f"{name}: ")
    assert "no_such_option" in ended.stderr


def test_help_shows_the_command_to_submit() -> None:
    ended = run_script("score.py", "--help")
    assert ended.returncode == 0
    assert "ray job submit --working-dir . -- python jobs/score.py" in ended.stdout
    assert "--select.top_fraction" in ended.stdout


@pytest.mark.parametrize(
    "argv",
    [
        ["likelihood", "--no_such", "1"],
        ["likelihood", "--rows", "0"],
        ["likelihood", "--json", "/no/such/folder/result.json"],
        ["likelihood", "--data", "d", "--lengths", "[20]"],
        ["likelihood", "--rows", "3", "--rows", "4"],
        ["likelihood", "--random_init", "{model_type: llama, model_type: gpt2}"],
        ["ranking", "--rows", "many"],
        ["ranking", "--fraction", "2"],
        ["scaling", "--actors", "[0]"],
        ["scaling", "--model", "m", "--random_init", "r"],
        ["scaling", "--shards_per_actor", "1"],
        ["control", "--shards", "many"],
        ["chats", "--templates", "[no_such]"],
        ["chats", "--base", "b", "--templates", "[qwen3]"],
        ["sorting"],
        [],
    ],
)
def test_a_benchmark_tells_a_mistake_in_one_line(
    argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process: each of its own would import for seconds."""
    script = str(ROOT / "jobs" / "benchmark.py")
    monkeypatch.setattr(sys, "argv", [script, *argv])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(script, run_name="__main__")
    out, err = capsys.readouterr()
    assert (ended.value.code, out, err.count("\n")) == (2, "", 1)


@pytest.mark.parametrize("name", ["status.py", "verify.py", "demo.py"])
@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--output", "a", "--output", "b"], "--output is given 2 times"),
        (["--outp", "a", "--output", "b"], "--outp"),
    ],
)
def test_a_job_with_options_of_its_own_takes_none_twice_and_none_cut_short(
    name: str, argv: list[str], told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = str(ROOT / "jobs" / name)
    monkeypatch.setattr(sys, "argv", [script, *argv])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(script, run_name="__main__")
    out, err = capsys.readouterr()
    assert (ended.value.code, out, err.count("\n")) == (2, "", 1)
    assert told in err


@pytest.mark.parametrize("name", [*JOBS, "benchmark.py ranking"])
def test_the_help_of_every_job_says_what_it_does_and_has_debug(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, *command = name.split()
    script = str(ROOT / "jobs" / file)
    monkeypatch.setattr(sys, "argv", [script, *command, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(script, run_name="__main__")
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: {name} [-h]")
    assert f"python jobs/{file}" in out or command
    assert "--debug" in out or name == "benchmark.py"


def test_the_fine_tune_prints_where_the_reference_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("davir_ray.pipeline.finetune_only", lambda config: Run.at(config.output))
    script = str(ROOT / "jobs" / "finetune.py")
    monkeypatch.setattr(sys, "argv", [script, "--output", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(script, run_name="__main__")
    assert (ended.value.code, capsys.readouterr().out) == (0, f"reference: {tmp_path}/reference\n")


@pytest.mark.slow
def test_the_benchmark_of_the_kernel_writes_its_result(ray_address: str, tmp_path: Path) -> None:
    tiny = {"model_type": "llama", "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48}
    tiny |= {"num_hidden_layers": 1, "num_attention_heads": 2}
    ended = run_script(
        "benchmark.py", "likelihood", "--json", str(tmp_path / "result.json"), "--random_init", json.dumps(tiny),
        "--lengths", "[20, 30]", "--rows", "50", "--repeats", "1", "--pipeline_shards", "2",
        address=ray_address,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert json.loads(ended.stdout) == result
    assert result["pipeline_efficiency"] > 0


@pytest.mark.slow
def test_the_benchmark_of_scaling_writes_its_result(ray_address: str, tmp_path: Path) -> None:
    tiny = {"model_type": "llama", "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48}
    tiny |= {"num_hidden_layers": 1, "num_attention_heads": 2}
    ended = run_script(
        "benchmark.py", "scaling", "--json", str(tmp_path / "result.json"), "--random_init", json.dumps(tiny),
        "--rows", "20", "--actors", "[1, 2]", "--shards_per_actor", "2", "--first_shards", "1",
        address=ray_address,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["scaling_efficiency"].keys() == {"1", "2"}
    assert result["scaling_efficiency"]["1"] == 1.0
    assert result["seconds_to_first_shard"] > 0


@pytest.mark.slow
def test_the_main_job_end_to_end_and_ranked_again(
    data_folder: Path, base_folder: Path, reference_folder: Path, ray_address: str, tmp_path: Path
) -> None:
    """With a reference; the guide and the demo run the job with its fine-tune."""
    output = tmp_path / "run"
    (tmp_path / "run.yaml").write_text(
        json.dumps(
            {
                "data": str(data_folder / "gsm8k_train.jsonl.gz"),
                "format": "gsm8k",
                "base": str(base_folder),
                "reference": str(reference_folder),
                "limit": 50,
                "max_bad_fraction": 0.1,
                "score": {"num_actors": 1},
                "select": {"top_k": 49},
            }
        )
    )
    ended = run_script(
        "score.py", "--config", str(tmp_path / "run.yaml"), "--output", str(output), "--select.top_fraction", "0.06",
        address=ray_address,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == [f"selected: {output}/selected", f"report:   {output}/report.html"]
    assert pd.read_parquet(output / "selected")["rank"].tolist() == [1, 2, 3]
    assert len(pd.read_parquet(output / "scores")) == 50

    again = run_script(
        "rank.py", "--output", str(output), "--select.top_k", "5", "--rank.order", "length",
        address=ray_address,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    selected = pd.read_parquet(output / "selected")
    assert selected["rank"].tolist() == [1, 2, 3, 4, 5]
    assert selected["num_response_tokens"].tolist() == sorted(selected["num_response_tokens"], reverse=True)
