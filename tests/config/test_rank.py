"""jobs/rank.py begins with the run's own settings: what a command changes, what it may not, what a file must say."""

import logging
from pathlib import Path
from typing import Any

import pytest
import yaml

from davir_ray.cli import parse_as, parse_rank
from davir_ray.config.prepare import PrepareConfig
from davir_ray.config.run import RunConfig
from davir_ray.config.selection import Part, RankConfig, SelectConfig
from davir_ray.config.sources import Source
from davir_ray.config.training import FinetuneConfig
from davir_ray.config.yaml import dump
from davir_ray.errors import ConfigError

FILTERS: dict[str, Any] = {
    "drop_duplicates": True, "min_response_tokens": 4, "max_response_tokens": 90, "balance": ["source"],
}  # fmt: skip
OWN = RunConfig(
    output="out",
    base="org/model",
    sources=[Source(name="org/a", path="x", format="alpaca"), Source(name="b", path=["y", "z"], format="gsm8k")],
    limit=50,
    finetune=FinetuneConfig(epochs=1, learning_rate=1e-4),
    rank=RankConfig(order="rho_sum", lowest=True),
    select=SelectConfig(top_k=9, **FILTERS),
)
FILE = """
sources:
- {name: org/a, path: x, format: alpaca}
- {name: b, path: [y, z], format: gsm8k}
base: org/model
limit: 50
finetune: {epochs: 1, learning_rate: 1e-4}
select: {top_fraction: 0.5, drop_duplicates: true}
"""


def applied(*argv: str, own: RunConfig = OWN) -> RunConfig:
    return parse_rank(["--output", "out", *argv]).applied_to(own)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "run.yaml").write_text(FILE)
    return tmp_path / "run.yaml"


def test_without_options_it_is_the_runs_own() -> None:
    assert applied() == OWN


@pytest.mark.parametrize(
    ("argv", "rank", "select"),
    [
        (["--rank.order", "length"], {"order": "length", "lowest": True}, {"top_k": 9, **FILTERS}),
        (["--rank.lowest", "false"], {"order": "rho_sum"}, {"top_k": 9, **FILTERS}),
        (["--select.top_k", "5"], {"order": "rho_sum", "lowest": True}, {"top_k": 5, **FILTERS}),
        (["--select.top_fraction", "0.03"], {"order": "rho_sum", "lowest": True}, {"top_fraction": 0.03, **FILTERS}),
        (
            ["--select", "{min_score: .inf}"],
            {"order": "rho_sum", "lowest": True},
            {"min_score": float("inf"), **FILTERS},
        ),
        (
            ["--select.drop_duplicates", "false", "--select.min_response_tokens", "null", "--select.balance", "[]"],
            {"order": "rho_sum", "lowest": True},
            {"top_k": 9, "max_response_tokens": 90},
        ),
        (
            ["--select.quotas", "{org/a: 3}"],
            {"order": "rho_sum", "lowest": True},
            {"quotas": {"org/a": 3}, **FILTERS},
        ),
        (
            ["--select.mixture", "[{source: b, all: true}]", "--select.balance", "[]"],
            {"order": "rho_sum", "lowest": True},
            {"mixture": [Part(source="b", all=True)], **FILTERS, "balance": []},
        ),
    ],
)  # fmt: skip
def test_what_is_given_changes_and_the_rest_stays(
    argv: list[str], rank: dict[str, Any], select: dict[str, Any]
) -> None:
    found = applied(*argv)
    assert (found.rank, found.select) == (RankConfig(**rank), SelectConfig(**select))
    assert dump(found).partition("\nrank:")[0] == dump(OWN).partition("\nrank:")[0]


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--base", "m"], "jobs/rank.py does not take --base"),
        (["--dry_run"], "does not take --dry_run"),
        (["--overwrite=true"], "does not take --overwrite"),
        (["--score.num_actors", "1"], "does not take --score.num_actors"),
        (["--finetune", "{epochs: 1}"], "does not take --finetune"),
        (["--sources+", "[]"], "does not take --sources"),
        (["--select.balance+", "length"], "give the whole list"),
        (["--no_such", "1"], "no_such"),
        (["--select.top_k", "3", "--select.top_k", "4"], "given 2 times"),
        (["--select.top_k", "3", "--select.top_tokens", "4"], "give exactly one rule"),
        (["--select.top_k", "0"], "select.top_k is 0"),
        (["--select.quotas", "{nobody: 3}"], "names the source 'nobody'; the sources are org/a, b"),
        (["--select.mixture", "[{source: b, all: true}]"], "leave select.balance out"),
        (["--rank.seed", "3"], "--rank.seed has no effect"),
        (["--select.shuffle_seed", "3"], "--select.shuffle_seed has no effect"),
    ],
)
def test_what_it_does_not_take_is_named(argv: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told.replace(".", r"\.")):
        applied(*argv)


def test_every_option_of_the_main_job_that_is_not_taken_is_refused() -> None:
    taken = {"output", "output_is_shared", "trust_remote_code", "rank", "select"}
    others = yaml.safe_load(dump(RunConfig())).keys() - taken
    assert len(others) > 10
    for name in others:
        with pytest.raises(ConfigError, match=f"does not take --{name};"):
            parse_rank(["--output", "out", f"--{name}", "null"])


def test_an_output_is_asked_for() -> None:
    with pytest.raises(ConfigError, match="--output"):
        parse_rank(["--select.top_k", "3"])


def test_the_order_follows_from_the_repeats_unless_it_is_given() -> None:
    own = RunConfig(select=SelectConfig(top_k=9))
    repeated = applied("--rank.repeats", "[b, s3://bucket/c]", own=own)
    assert repeated.rank == RankConfig(order="davir_repeated", repeats=["b", "s3://bucket/c"])
    assert applied("--select.top_k", "3", own=repeated).rank == repeated.rank
    assert applied("--rank.repeats", "[b]", "--rank.order", "davir", own=own).rank.order == "davir"
    assert applied("--rank.repeats", "[]", own=repeated).rank == RankConfig(order="davir")
    as_it_is = RunConfig(select=SelectConfig(top_k=9), rank=RankConfig(order="davir", repeats=["b"]))
    assert applied("--rank.repeats", "[b]", own=as_it_is).rank == as_it_is.rank, "the same repeats change nothing"
    folds = RunConfig(prepare=PrepareConfig(folds=2), rank=RankConfig(repeats=["b"]))
    assert folds.rank.order == "davir_repeated"
    assert applied("--select.top_k", "1", "--rank.repeats", "[]", own=folds).rank.order == "davir_aligned"
    with pytest.raises(ConfigError, match=r"min_score is 0\.5.*another order \(davir\)|with repeats the order"):
        applied("--rank.repeats", "[b]", own=RunConfig(select=SelectConfig(min_score=0.5)))
    with pytest.raises(ConfigError, match=r"--rank\.repeats has no effect: rank\.order is length"):
        applied("--rank.repeats", "[b]", "--rank.order", "length", own=own)


def test_a_score_of_another_order_is_not_compared_with_the_runs_min_score() -> None:
    own = RunConfig(select=SelectConfig(min_score=0.5))
    with pytest.raises(ConfigError, match=r"min_score is 0\.5, which the run has for another order \(davir\)"):
        applied("--rank.order", "length", own=own)
    with pytest.raises(ConfigError, match="min_score"):
        applied("--rank.lowest", own=own)
    assert applied("--rank.order", "length", "--select.min_score", "0.5", own=own).select.min_score == 0.5


# --- with the file that the run was scored with ----------------------------------------------------------------------


def test_the_runs_file_is_taken_and_options_stand_above_it(file: Path) -> None:
    with_file = applied("--config", str(file))
    assert with_file.select == SelectConfig(top_fraction=0.5, **FILTERS)
    assert with_file.rank == OWN.rank
    both = applied(f"--config={file}", "--select.top_tokens", "70", "--rank.order", "random")
    assert both.select == SelectConfig(top_tokens=70, **FILTERS)
    assert both.rank == RankConfig(order="random", lowest=True)


def test_a_whole_dump_of_the_run_is_taken(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(dump(OWN))
    assert applied("--config", str(tmp_path / "config.yaml"), "--select.top_k", "3").select.top_k == 3


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("base: other", "base is 'other' in the configuration file but 'org/model' in the run"),
        ("limit: null", "limit is None .* but 50 in"),
        ("finetune: {epochs: 1, batch_size: 9}", r"finetune\.batch_size is 9 .* but 128 in"),
        ("sources: [{name: org/a, path: x, format: alpaca}]", "sources is"),
        ("overwrite: true", "overwrite is True"),
        ("dry_run: true", "dry_run is True"),
        ("trust_remote_code: true", "trust_remote_code is True"),
        ("select:", "select is empty"),
        ("data: ['s3://key:secret@host/data']", r"^data is 's3://…@host/data', with a password in it"),
    ],
)
def test_a_file_of_another_run_is_refused_with_both_values(file: Path, line: str, told: str) -> None:
    values = yaml.safe_load(FILE) | yaml.safe_load(line)
    file.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match=told):
        applied("--config", str(file))


def test_debug_is_of_the_command(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "davir_ray"):
        assert applied("--config", str(file), "--debug") == applied("--config", str(file))
        assert logging.getLogger("davir_ray").level == logging.DEBUG


def test_switches_that_are_off_ask_for_nothing(file: Path) -> None:
    file.write_text(FILE + "overwrite: false\ndry_run: false\n")
    own = parse_as(RunConfig, ["--config", str(file), "--overwrite", "--output", "out"])
    assert applied("--config", str(file), own=own).select == own.select


@pytest.mark.parametrize("flag", [False, True])
def test_only_the_flag_lets_code_run(file: Path, flag: bool) -> None:
    file.write_text(FILE + "trust_remote_code: true\n")
    options = parse_rank(["--output", "out", "--config", str(file), *["--trust_remote_code"] * flag])
    assert options.trust_remote_code is flag


@pytest.mark.parametrize("option", ["--help", "--print_config"])
def test_help_shows_what_is_taken(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_rank(["--select.top_k", "3", option], "What it does.")
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert "top_k" in out
    assert "--finetune" not in out
    assert "finetune:" not in out
