"""Every mistake on the command line is one line on standard error and exit status 2, before a model is loaded."""

import json
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import constants
from transformers import AutoTokenizer

from davir_ray.cli import exit_status, parse_as, run_job
from davir_ray.config.run import RunConfig
from davir_ray.config.selection import RankConfig, SelectConfig
from davir_ray.config.sources import Source
from davir_ray.config.training import FinetuneConfig
from davir_ray.config.yaml import dump
from davir_ray.errors import ConfigError, DavirError, IntegrityError, ProgressError, StorageError, TrainingError
from davir_ray.inputs import check_inputs
from davir_ray.pipeline import dry_run, finetune_only, run_all
from davir_ray.run.folder import SUBMITTED_JOB
from davir_ray.run.location import Location

Fails = Callable[..., str]


@pytest.fixture
def good(base_folder: Path, tmp_path: Path) -> dict[str, str]:
    """Options that would run; the data is two lines."""
    data = tmp_path / "data.jsonl"
    data.write_text('{"instruction": "Say x", "output": "x"}\n{"instruction": "Say y", "output": "y"}\n')
    return {
        "--data": str(data), "--format": "alpaca", "--base": str(base_folder), "--output": str(tmp_path / "run"),
        "--select.top_k": "1",
    }  # fmt: skip


def words(options: dict[str, str]) -> list[str]:
    return [word for pair in options.items() for word in pair]


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Fails:
    """The one line of a command line that must fail with status 2 and without a model."""

    def check(argv: list[str], job: Callable[[RunConfig], object] = run_all) -> str:
        monkeypatch.setattr(
            "davir_ray.stages.finetune.finetune", lambda *a, **k: pytest.fail("the fine-tune was started")
        )
        monkeypatch.setattr("davir_ray.stages.score.score", lambda *a, **k: pytest.fail("scoring was started"))
        capsys.readouterr()
        assert run_job(lambda config: job(config) and None, RunConfig, "", argv) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.endswith("\n")
        assert err.count("\n") == 1, err
        return err

    return check


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("davir_ray.pipeline.connected_to", lambda: pytest.fail("Ray was started"))


BAD_OPTIONS: dict[str, tuple[list[str], str]] = {
    "unknown option": (["--no_such_option", "1"], "no_such_option"),
    "abbreviated option": (["--outp", "x"], "outp"),
    "unknown nested option": (["--score.actors", "1"], "actors"),
    "stray word": (["stray"], "stray"),
    "wrong type": (["--limit", "many"], "limit"),
    "not a whole number": (["--select.top_k", "1.5"], "top_k"),
    "unknown choice": (["--rank.order", "best"], "order"),
    "unknown format": (["--format", "xml"], "format"),
    "fraction above one": (["--select.top_fraction", "6"], "top_fraction is 6"),
    "negative learning rate": (["--finetune.learning_rate", "-1"], "learning_rate is -1"),
    "two rules": (["--select.top_k", "3", "--select.min_score", "0.5"], "give exactly one rule"),
    "repeated option": (["--limit", "3", "--limit", "4"], "--limit is given 2 times"),
    "repeated with equals sign": (["--limit=3", "--limit=4"], "--limit is given 2 times"),
    "repeated flag": (["--overwrite", "--overwrite"], "--overwrite is given 2 times"),
    "no such file": (["--config", "/no/such/file.yaml"], "/no/such/file.yaml"),
    "repeated key": (["--select.quotas", "{a: 1, a: 2}", "--select.balance", "[source]"], "the key 'a' is given twice"),
    "repeated key in a list": (
        ["--select.mixture", "[{source: a, top_k: 1, top_k: 2}]"],
        "the key 'top_k' is given twice",
    ),
    "no random order": (["--rank.seed", "3"], "--rank.seed has no effect: rank.order is davir"),
    "nothing trained": (["--reference", "r", "--finetune.epochs", "1"], "--finetune.epochs has no effect"),
    "format without data": (["--format", "alpaca"], "format is given without data"),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_a_bad_option_is_one_line(name: str, fails: Fails, no_ray: None) -> None:
    argv, told = BAD_OPTIONS[name]
    assert told in fails(argv)


@pytest.mark.parametrize("missing", ["--base", "--output", "--select.top_k"])
def test_a_missing_option_is_named(missing: str, good: dict[str, str], fails: Fails, no_ray: None) -> None:
    del good[missing]
    assert missing.split(".")[0] in fails(words(good))


BAD_FILES = {
    "misspelt key": ("outputt: x", "outputt"),
    "misspelt key in a section": ("score: {num_actor: 1}", "num_actor"),
    "misspelt key in a source": ("sources: [{name: a, path: x, format: alpaca, spilt: train}]", "spilt"),
    "missing key in a source": ("sources: [{name: a, format: alpaca}]", "path"),
    "wrong type in a source": ("sources: [{name: a, path: 3, format: alpaca}]", "path"),
    "a source name twice": (
        "sources: [{name: a, path: x, format: alpaca}, {name: a, path: y, format: alpaca}]",
        "source name is 'a'; it must be unique",
    ),
    "wrong type": ("limit: many", "limit"),
    "data and sources": (
        "{data: x, format: alpaca, sources: [{name: a, path: x, format: alpaca}]}",
        "both data and sources",
    ),
    "two rules": ("select: {top_k: 1, top_fraction: 0.5}", "give exactly one rule"),
    "a section twice": (
        "finetune: {epochs: 1}\nselect: {top_k: 3}\nfinetune: {batch_size: 16}",
        "the key 'finetune' is given twice in the YAML (lines 1 and 3)",
    ),
    "a key twice, once in quotes": ("finetune:\n  epochs: 1\n  'epochs': 2", "'finetune.epochs' is given twice"),
    "a key twice, once with dots": ("finetune: {epochs: 1}\nfinetune.epochs: 2", "'finetune.epochs' is given twice"),
    "a key twice in a source": (
        "sources:\n- {name: a, path: x, format: alpaca}\n- name: b\n  path: x\n  format: alpaca\n  path: y",
        "the key 'path' is given twice in the YAML (lines 4 and 6)",
    ),
    "a group twice": ("select: {balance: [source], quotas: {a: 1, a: 2}}", "'select.quotas.a' is given twice"),
    "an empty section": ("finetune:\nlimit: 3", "finetune is empty"),
    "not YAML": ("a: [", "config"),
    "a list": ("[1, 2]", "config"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_one_line(name: str, fails: Fails, no_ray: None, tmp_path: Path) -> None:
    text, told = BAD_FILES[name]
    (tmp_path / "run.yaml").write_text(text)
    assert told in fails(["--config", str(tmp_path / "run.yaml")])


def test_a_file_in_a_store_may_not_repeat_a_key_either() -> None:
    place = Location.of(f"memory://{uuid.uuid4().hex}") / "run.yaml"
    place.write_text("limit: 3\nlimit: 4")
    with pytest.raises(ConfigError, match=r"the key 'limit' is given twice in the YAML \(lines 1 and 2\)"):
        parse_as(RunConfig, ["--config", str(place)])


def test_keys_that_only_look_alike_are_no_repetition(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "base: &base m\nsources: [{name: a, path: x, format: alpaca}, {name: a.b, path: x, format: alpaca}]\n"
        "finetune: &tuned {epochs: 2, learning_rate: 1e-4}\nprepare: {max_tokens: 9}\n"
        "select: {balance: [source], quotas: {a: 1, a.b: 2}}\n"
    )
    config = parse_as(RunConfig, ["--config", str(file)])
    assert config.select.quotas == {"a": 1, "a.b": 2}
    assert config.finetune == FinetuneConfig(epochs=2, learning_rate=0.0001)


def test_a_file_may_hold_what_another_command_needs(
    tmp_path: Path, good: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    """The same field on the command line is refused."""
    (tmp_path / "run.yaml").write_text("{estimate: {price_per_device_hour: 2}, rank: {seed: 3}}")
    config = parse_as(RunConfig, ["--config", str(tmp_path / "run.yaml"), *words(good)])
    check_inputs(config)
    assert [record.getMessage() for record in caplog.records if "without effect" in record.message] == [
        "without effect: estimate.price_per_device_hour (only --dry_run uses it); rank.seed (rank.order is davir, not "
        "random)"
    ]


def test_a_chat_template_for_data_without_messages_is_one_line(
    good: dict[str, str], fails: Fails, no_ray: None, tmp_path: Path
) -> None:
    (tmp_path / "chat.jinja").write_text("{{ messages }}")
    assert "chat_template is given" in fails(words(good | {"--chat_template": str(tmp_path / "chat.jinja")}))


def test_nothing_is_trained_beside_a_reference(good: dict[str, str], fails: Fails, no_ray: None) -> None:
    assert "nothing to train" in fails(words(good | {"--reference": good["--base"]}), finetune_only)


def test_a_path_without_data_is_one_line(good: dict[str, str], fails: Fails, ray_session: None) -> None:
    assert "/no/such/data does not exist" in fails(words(good | {"--data": "/no/such/data"}))


def test_a_base_that_is_none_is_one_line(good: dict[str, str], fails: Fails, no_ray: None, tmp_path: Path) -> None:
    assert "is not a folder" in fails(words(good | {"--base": str(tmp_path / "none")}))
    assert "no config.json" in fails(words(good | {"--base": str(tmp_path)}))


@pytest.mark.parametrize("job", [run_all, dry_run, finetune_only])
def test_tokens_that_were_added_without_a_resize_are_one_line(
    good: dict[str, str],
    fails: Fails,
    no_ray: None,
    base_folder: Path,
    tmp_path: Path,
    job: Callable[[RunConfig], object],
) -> None:
    padded = shutil.copytree(base_folder, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(padded)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(padded)
    message = fails(words(good | {"--base": str(padded)}), job)
    assert "the token '[PAD]' with the id 1024" in message
    assert "1024 embedding rows" in message


def test_a_mistyped_folder_is_one_line(
    good: dict[str, str], fails: Fails, no_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "llama").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "models/lama is not a folder (models has llama)" in fails(words(good | {"--base": "models/lama"}))


def test_a_pickled_base_is_refused(
    good: dict[str, str], fails: Fails, no_ray: None, base_folder: Path, tmp_path: Path
) -> None:
    pickled = shutil.copytree(base_folder, tmp_path / "base")
    (pickled / "model.safetensors").unlink()
    torch.save({}, pickled / "pytorch_model.bin")
    assert "pickled weights are refused" in fails(words(good | {"--base": str(pickled)}))


def test_the_output_of_another_run_is_one_line_that_names_the_difference(
    good: dict[str, str], fails: Fails, ray_session: None
) -> None:
    with pytest.raises(pytest.fail.Exception, match="fine-tune was started"):
        fails(words(good))
    assert "limit: null → 1" in fails(words(good | {"--limit": "1"}))


def test_somebodys_folder_is_one_line_before_ray_starts(good: dict[str, str], fails: Fails, no_ray: None) -> None:
    Path(good["--output"], "examples").mkdir(parents=True)
    assert "holds examples but no run" in fails(words(good))


@pytest.mark.parametrize("job", [run_all, dry_run])
def test_messages_without_a_chat_template_are_one_line(
    good: dict[str, str], fails: Fails, ray_session: None, job: Callable[[RunConfig], object]
) -> None:
    Path(good["--data"]).write_text(json.dumps({"messages": []}) + "\n")
    assert "--chat_template" in fails(words(good | {"--format": "messages"}), job)


def test_a_chat_template_that_cannot_be_read_is_one_line(good: dict[str, str], fails: Fails, no_ray: None) -> None:
    assert "chat_template /no/such/file" in fails(words(good | {"--chat_template": "/no/such/file"}))


def test_a_relative_output_of_a_submitted_job_is_refused(
    good: dict[str, str], fails: Fails, no_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SUBMITTED_JOB, "{}")
    assert "output 'run' is relative" in fails(words(good | {"--output": "run"}))


def test_a_dry_run_prints_examples_and_writes_nothing(good: dict[str, str], ray_session: None) -> None:
    """What the job would write may lie among its data, as a cache of an earlier run does here."""
    folder = Path(good["--data"]).parent
    good |= {"--data": str(folder), "--score.base_cache": str(folder / "cache")}
    (folder / "cache").mkdir()
    shutil.copy(folder / "data.jsonl", folder / "cache")
    lines: list[str] = []
    assert run_job(lambda config: lines.extend(dry_run(config)), RunConfig, "", [*words(good), "--dry_run"]) == 0
    assert sum("⟦" in line for line in lines) == 2 and "2 of the first 2 records" in lines[0]
    assert not Path(good["--output"]).exists()


# --- what is parsed --------------------------------------------------------------------------------------------------


def test_flags_need_no_value() -> None:
    config = parse_as(
        RunConfig, ["--overwrite", "--rank.lowest", "--dry_run", "--keep_record", "false", "--limit", "3"]
    )
    assert (config.overwrite, config.rank.lowest, config.dry_run, config.keep_record, config.limit) == (
        True, True, True, False, 3,
    )  # fmt: skip


def test_options_override_the_file_field_by_field(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("{limit: 5, finetune: {epochs: 2, batch_size: 4}}")
    config = parse_as(RunConfig, ["--config", str(file), "--finetune.epochs", "7"])
    assert (config.limit, config.finetune) == (5, FinetuneConfig(epochs=7, batch_size=4))


@pytest.mark.parametrize("given", [["--select.min_score", "-0.5"], ["--select.min_score=-0.5"]])
def test_a_rule_on_the_command_line_replaces_the_files(tmp_path: Path, given: list[str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("select: {top_fraction: 0.5}")
    from_file = ["--config", str(file)]
    for argv, rule in [
        ([*from_file, *given], {"min_score": -0.5}),
        ([*given, *from_file], {"min_score": -0.5}),
        ([*from_file, "--select", "{min_score: -0.5}"], {"min_score": -0.5}),
        ([*from_file, "--select.top_k", "null"], {"top_fraction": 0.5}),
        (from_file, {"top_fraction": 0.5}),
    ]:
        assert parse_as(RunConfig, argv).select == SelectConfig(**rule)


def test_two_rules_on_the_command_line_are_refused_beside_a_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("select: {top_fraction: 0.5}")
    with pytest.raises(ConfigError, match="exactly one"):
        parse_as(RunConfig, ["--config", str(file), "--select.top_k", "3", "--select.top_tokens", "3"])


@pytest.mark.parametrize(
    "config",
    [
        RunConfig(),
        RunConfig(data=["a", "b"], format="gsm8k", select=SelectConfig(top_fraction=1e-5), keep_token_nll="all"),
        RunConfig(
            output="s3://bucket/rün",
            base="org/model",
            sources=[
                Source(name="a", path="x: y # z", format="messages", messages_column="true"),
                Source(name="1.5", path=["p", "q"], format="prompt_response", response_column="null"),
            ],
            finetune=FinetuneConfig(learning_rate=2e-5, use_gpu=False),
            rank=RankConfig(order="length", lowest=True, seed=3),
            select=SelectConfig(min_score=float("-inf")),
            overwrite=True,
        ),
    ],
)
def test_a_dumped_configuration_parses_back_to_itself(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(dump(config))
    assert parse_as(RunConfig, ["--config", str(tmp_path / "run.yaml")]) == config


@pytest.mark.parametrize("option", ["--help", "--print_config"])
def test_help_and_print_config_end_with_status_0(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_job(lambda config: pytest.fail("the job was started"), RunConfig, "What it does.", [option])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    if option == "--help":
        assert "What it does." in out
        assert "Number of rows to take, best first." in out
    else:
        assert yaml.safe_load(out)["finetune"]["learning_rate"] == 2e-5


def test_an_error_that_is_not_the_users_is_not_hidden() -> None:
    def job(config: RunConfig) -> None:
        raise RuntimeError("ours")

    with pytest.raises(RuntimeError, match="ours"):
        run_job(job, RunConfig, "", [])


@pytest.mark.parametrize(
    ("kind", "status"),
    [(ConfigError, 2), (TrainingError, 2), (StorageError, 1), (ProgressError, 1), (IntegrityError, 1)],
)
def test_only_a_mistake_of_the_users_has_status_2(
    kind: type[DavirError], status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def job(config: RunConfig) -> None:
        raise kind("what is wrong,\nand what to change")

    assert run_job(job, RunConfig, "", []) == status
    assert capsys.readouterr().err.endswith(": what is wrong, and what to change\n")


def test_ctrl_c_is_one_line_and_no_success(capsys: pytest.CaptureFixture[str]) -> None:
    def job(config: RunConfig) -> None:
        raise KeyboardInterrupt

    assert run_job(job, RunConfig, "", []) == 130
    assert capsys.readouterr().err.endswith(": interrupted\n")


def test_a_job_without_standard_output_and_error_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that a daemon starts with both closed."""
    monkeypatch.setattr("sys.stdout", None)
    monkeypatch.setattr("sys.stderr", None)
    assert exit_status(lambda: print("the result")) == 0  # noqa: T201


def test_the_file_of_a_section_that_is_not_utf_8_is_named(tmp_path: Path) -> None:
    section, file = tmp_path / "finetune.yaml", tmp_path / "run.yaml"
    section.write_bytes("epochs: 2".encode("utf-16"))
    file.write_text(f"finetune: {section}")
    for argv in (["--finetune", str(section)], [f"--finetune={section}"]):
        with pytest.raises(ConfigError, match=r"finetune\.yaml or .* is not UTF-8 text .*; save it as UTF-8"):
            parse_as(RunConfig, argv)
    with pytest.raises(ConfigError, match=r"run\.yaml or a file that .* names is not UTF-8 text"):
        parse_as(RunConfig, ["--config", str(file)])
    section.write_text("epochs: 2")
    assert parse_as(RunConfig, ["--config", str(file)]).finetune.epochs == 2


def test_yaml_that_holds_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("select: &a {mixture: [*a]}")
    with pytest.raises(ConfigError, match="contains itself"):
        parse_as(RunConfig, ["--config", str(tmp_path / "run.yaml")])


def test_output_that_nobody_reads_ends_the_job_without_a_traceback() -> None:
    code = "from davir_ray.cli import exit_status; raise SystemExit(exit_status(lambda: print('x' * 100_000)))"
    job = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert job.stdout is not None and job.stderr is not None
    job.stdout.close()
    assert (job.stderr.read(), job.wait()) == (b"", 1)
