"""The configuration is checked when it is made: a value out of range never reaches a stage."""

import dataclasses
from typing import Any

import pytest

from davir_ray.api.scoring import RowScoring
from davir_ray.config import align, compare, prepare, rank, run, scoring, selection, sources, training
from davir_ray.config.align import AlignRunConfig
from davir_ray.config.compare import CompareConfig
from davir_ray.config.prepare import PrepareConfig
from davir_ray.config.run import (
    EstimateConfig,
    GenerateConfig,
    OutputConfig,
    RunConfig,
)
from davir_ray.config.scoring import ScoreConfig
from davir_ray.config.selection import (
    Part,
    RankConfig,
    SelectConfig,
    count_from_fraction,
)
from davir_ray.config.sources import Source
from davir_ray.config.training import FinetuneConfig
from davir_ray.errors import ConfigError
from davir_ray.models.generator import GeneratorSettings
from davir_ray.models.scorer import ScorerSettings
from davir_ray.stages.prepare import Preparation

OUT_OF_RANGE: list[tuple[type, dict[str, Any], str]] = [
    (PrepareConfig, {"max_tokens": 1}, "prepare.max_tokens is 1"),
    (PrepareConfig, {"shard_rows": 0}, "prepare.shard_rows is 0"),
    (PrepareConfig, {"shard_rows": 4097}, "prepare.shard_rows is 4097"),
    (PrepareConfig, {"folds": 0}, "prepare.folds is 0"),
    (PrepareConfig, {"folds": 65}, "prepare.folds is 65"),
    (PrepareConfig, {"folds": 2, "fold_by": " "}, "prepare.fold_by is ' '"),
    (PrepareConfig, {"folds": 2, "anchor": 1.0}, "prepare.anchor is 1.0"),
    (PrepareConfig, {"fold_by": "user"}, "prepare.fold_by is 'user', but prepare.folds is 1"),
    (PrepareConfig, {"anchor": 0.1}, "prepare.anchor is 0.1, but prepare.folds is 1"),
    (PrepareConfig, {"folds": 2, "fold_seed": -1}, "prepare.fold_seed is -1"),
    (PrepareConfig, {"fold_seed": 1}, "prepare.fold_seed is 1, but prepare.folds is 1"),
    (AlignRunConfig, {"prepare": PrepareConfig(folds=2)}, "prepare.folds is 2"),
    (AlignRunConfig, {"prepare": PrepareConfig(near_duplicates="drop")}, "prepare.near_duplicates is 'drop'"),
    *[
        (FinetuneConfig, {name: 0}, f"finetune.{name} is 0")
        for name in ("epochs", "batch_size", "tokens_per_pack", "num_workers", "num_cpus", "checkpoint_every_steps")
    ],
    (FinetuneConfig, {"learning_rate": 0.0}, "finetune.learning_rate"),
    (FinetuneConfig, {"learning_rate": float("nan")}, "finetune.learning_rate"),
    (FinetuneConfig, {"max_grad_norm": -1.0}, "finetune.max_grad_norm"),
    (FinetuneConfig, {"warmup_ratio": 1.0}, "finetune.warmup_ratio"),
    (FinetuneConfig, {"weight_decay": -0.1}, "finetune.weight_decay"),
    (FinetuneConfig, {"max_failures": -1}, "finetune.max_failures"),
    (ScoreConfig, {"num_actors": 0}, "score.num_actors"),
    (ScoreConfig, {"num_cpus": 0.0}, "score.num_cpus"),
    (ScoreConfig, {"num_gpus": -1.0}, "score.num_gpus"),
    (ScoreConfig, {"tokens_per_pack": 0}, "score.tokens_per_pack"),
    (ScoreConfig, {"no_progress_timeout_s": 0}, "score.no_progress_timeout_s"),
    (GenerateConfig, {"max_new_tokens": 0}, "generate.max_new_tokens is 0"),
    (GenerateConfig, {"tokens_per_batch": 0}, "generate.tokens_per_batch is 0"),
    (SelectConfig, {"top_k": 0}, "select.top_k"),
    (SelectConfig, {"top_tokens": 0}, "select.top_tokens"),
    (SelectConfig, {"top_fraction": 0.0}, "select.top_fraction"),
    (SelectConfig, {"top_fraction": 1.0001}, "select.top_fraction"),
    (SelectConfig, {"top_fraction": float("nan")}, "select.top_fraction"),
    (SelectConfig, {"min_score": float("nan")}, "select.min_score"),
    (RankConfig, {"repeats": ["a", "b", "a"]}, "rank.repeats is"),
    (RankConfig, {"repeats": [" "]}, "rank.repeats is"),
    (
        RankConfig,
        {"repeats": ["a", "s3://user:secret@host/b"]},
        "rank.repeats is 's3://…@host/b', with a password in it",
    ),
    (
        RunConfig,
        {"rank": RankConfig(order="davir_repeated")},
        "rank.order is davir_repeated, but rank.repeats is empty",
    ),
    (
        RunConfig,
        {"rank": RankConfig(repeats=["a"]), "select": SelectConfig(min_score=0.5)},
        "with repeats the order is davir_repeated, on a scale of its own; give --rank.order davir_repeated or davir",
    ),
    (RunConfig, {"max_bad_fraction": -0.01}, "max_bad_fraction"),
    (RunConfig, {"max_bad_fraction": 1.01}, "max_bad_fraction"),
    (RunConfig, {"limit": 0}, "limit"),
]


@pytest.mark.parametrize(("section", "values", "told"), OUT_OF_RANGE)
def test_a_value_out_of_range_is_refused_with_its_name_and_value(
    section: type, values: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        section(**values)


@pytest.mark.parametrize(
    "section", [PrepareConfig, FinetuneConfig, ScoreConfig, GenerateConfig, SelectConfig, RunConfig]
)
def test_defaults_are_valid_and_frozen(section: type) -> None:
    config = section()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.changed = 1


SETTINGS = [
    *(
        found
        for module in (align, compare, prepare, rank, run, scoring, selection, sources, training)
        for found in vars(module).values()
        if dataclasses.is_dataclass(found) and found.__module__ == module.__name__
    ),
    Preparation, RowScoring, ScorerSettings, GeneratorSettings,
]  # fmt: skip


@pytest.mark.parametrize("section", SETTINGS)
def test_settings_are_given_by_name(section: Any) -> None:
    """By position a value of the right type may land in a wrong field, and nobody sees it."""
    assert all(field.kw_only for field in dataclasses.fields(section))


@pytest.mark.parametrize("values", [{"name": " ", "path": "a"}, {"name": "a", "path": ""}, {"name": "a", "path": []}])
def test_a_source_needs_a_name_and_a_path(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Source(**values, format="alpaca")


def test_source_names_are_unique() -> None:
    with pytest.raises(ConfigError, match="unique"):
        RunConfig(sources=[Source(name="a", path="x", format="alpaca"), Source(name="a", path="y", format="gsm8k")])


def test_exactly_one_selection_rule() -> None:
    with pytest.raises(ConfigError, match="top_k and top_fraction"):
        SelectConfig(top_k=3, top_fraction=0.1)
    with pytest.raises(ConfigError, match="no selection rule"):
        SelectConfig().require_rule()


def test_skip_top_needs_every_rank() -> None:
    with pytest.raises(ConfigError, match=r"rank\.most is 50, but select\.skip_top is a share of every ranked row"):
        RunConfig(rank=RankConfig(most=50), select=SelectConfig(top_k=5, skip_top=0.1))


def test_min_score_has_no_meaning_for_a_random_order() -> None:
    with pytest.raises(ConfigError, match="random"):
        RunConfig(rank=RankConfig(order="random"), select=SelectConfig(min_score=0.5))


def test_data_and_sources_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="both data and sources"):
        RunConfig(data="x", format="alpaca", sources=[Source(name="a", path="x", format="alpaca")])


@pytest.mark.parametrize("given", [{"format": "alpaca"}, {"columns": {"prompt": "x"}}, {"ignore_columns": ["tools"]}])
def test_what_belongs_to_data_needs_data(given: dict[str, Any]) -> None:
    (name,) = given
    with pytest.raises(ConfigError, match=f"{name} is given without data"):
        RunConfig(**given)
    sources = RunConfig(data="x", **given).all_sources()
    assert [getattr(source, name) for source in sources] == [given[name]]


@pytest.mark.parametrize("format", ["auto", None])
def test_the_format_may_be_left_out(format: Any) -> None:
    """Runs before 0.3 remember null where they have sources."""
    assert RunConfig(data="x", format=format).all_sources() == RunConfig(data="x").all_sources()
    assert RunConfig(data="x").all_sources() == [Source(name="auto", path="x", format="auto")]
    RunConfig(data="x", select=SelectConfig(mixture=[Part(source="alpaca", all=True)]))  # named when it is found


def test_a_column_is_named_once() -> None:
    assert Source(name="a", path="x", prompt_column="q", columns={"response": "a"}).renamed == {
        "prompt": "q", "response": "a",
    }  # fmt: skip
    with pytest.raises(ConfigError, match="both prompt_column and prompt in columns"):
        Source(name="a", path="x", prompt_column="q", columns={"prompt": "q"})


def test_data_is_one_source_named_after_its_format() -> None:
    config = RunConfig(data=["x", "y"], format="gsm8k")
    assert config.all_sources() == [Source(name="gsm8k", path=["x", "y"], format="gsm8k")]


@pytest.mark.parametrize(
    ("given", "asked"),
    [({}, "--output"), ({"output": "o"}, "--base"), ({"output": "o", "base": "b"}, "--data")],
)
def test_what_a_job_needs_is_asked_for_by_its_option(given: dict[str, str], asked: str) -> None:
    with pytest.raises(ConfigError, match=asked):
        RunConfig(**given).require_input()


@pytest.mark.parametrize(
    ("fraction", "rows", "expected"),
    [(0.29, 100, 29), (0.06, 50, 3), (0.07, 100, 7), (0.1, 5, 1), (1.0, 7, 7), (1e-9, 10**9, 1), (0.57, 100, 57)],
)
def test_a_fraction_counts_the_floor_of_the_exact_decimal(fraction: float, rows: int, expected: int) -> None:
    assert count_from_fraction(fraction, rows) == expected


@pytest.mark.parametrize(
    ("select", "told"),
    [
        ({"quotas": {"a": 1}}, "quotas needs select.balance"),
        ({"quotas": {7: 1}, "balance": ["source"]}, "a group of select.quotas is 7; it must be text"),
        ({"quotas": {"a": 0}, "balance": ["source"]}, "quotas of 'a' is 0"),
        ({"quotas": {"a": 1}, "balance": ["source"], "top_k": 1}, "top_k and quotas"),
        ({"mixture": [Part(source="a", all=True)], "top_k": 1}, "top_k and mixture"),
        ({"min_score": 0.0, "top_k": 1}, "top_k and min_score"),
        ({"mixture": [Part(source="a", all=True)], "balance": ["source"]}, "leave select.balance out"),
        ({"mixture": [Part(source="a", all=True), Part(source="a", top_k=1)]}, "given once"),
        ({"length_edges": [32, 32]}, "length_edges"),
        ({"length_edges": [0, 32]}, "length_edges"),
        ({"length_edges": []}, "length_edges"),
        ({"balance": ["length", "length"]}, "without repetition"),
        ({"min_response_tokens": 9, "max_response_tokens": 8}, "at most 8"),
    ],
)
def test_selections_that_contradict_themselves_are_refused(select: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told.replace(".", r"\.")):
        SelectConfig(**select)


@pytest.mark.parametrize("part", [{}, {"all": True, "top_k": 1}, {"top_k": 0}, {"all": True, "repeat": 0}])
def test_a_part_of_a_mixture_has_exactly_one_rule(part: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="mixture of 'a'"):
        Part(source="a", **part)


SOURCES = [Source(name="a", path="x", format="alpaca"), Source(name="b", path="y", format="gsm8k")]


@pytest.mark.parametrize(
    "select",
    [
        SelectConfig(mixture=[Part(source="a", all=True), Part(source="nobody", all=True)]),
        SelectConfig(balance=["source"], quotas={"nobody": 3}),
        SelectConfig(balance=["source", "length"], quotas={"nobody/0-31": 3}),
        SelectConfig(balance=["length", "source"], quotas={"0-31/nobody": 3}),
    ],
)
def test_a_selection_of_a_source_that_is_not_there_is_refused_at_once(select: SelectConfig) -> None:
    with pytest.raises(ConfigError, match="names the source 'nobody'; the sources are a, b"):
        RunConfig(sources=SOURCES, select=select)
    RunConfig(select=select)  # ranking again, from a run whose sources are on record


def test_groups_of_the_sources_that_are_there_are_taken() -> None:
    RunConfig(sources=SOURCES, select=SelectConfig(balance=["source", "length"], quotas={"a/0-31": 3}))
    RunConfig(sources=SOURCES, select=SelectConfig(balance=["length"], quotas={"0-31": 3}))
    RunConfig(sources=SOURCES, select=SelectConfig(mixture=[Part(source="b", all=True)]))


@pytest.mark.parametrize("group", ["0-32", "a/0-32", "a"])
def test_a_quota_of_a_range_of_lengths_that_is_none_is_refused_at_once(group: str) -> None:
    balance: list[Any] = ["source", "length"] if "/" in group else ["length"]
    select = SelectConfig(balance=balance, quotas={group: 3}, length_edges=[32, 99])
    with pytest.raises(ConfigError, match=f"has '{group}'.*the ranges are 0-31, 32-98, 99-"):
        select.require_rule()


@pytest.mark.parametrize(("name", "value"), [("lora_alpha", 8), ("lora_dropout", 0.1), ("lora_targets", "x")])
def test_a_setting_of_an_adapter_needs_the_adapter(name: str, value: Any) -> None:
    options = {"output": "o", "base": "b", "data": "d", "format": "alpaca"}
    config = RunConfig(**options, finetune=FinetuneConfig(**{name: value}))
    with pytest.raises(ConfigError, match=rf"finetune\.{name} is given, but finetune\.lora_rank is not"):
        config.require_input()
    RunConfig(**options, finetune=FinetuneConfig(**{name: value, "lora_rank": 4})).require_input()


@pytest.mark.parametrize(
    ("config", "unused"),
    [
        (RunConfig(rank=RankConfig(seed=3)), ["rank.seed"]),
        (RunConfig(rank=RankConfig(order="random", seed=3)), []),
        (RunConfig(select=SelectConfig(shuffle_seed=3)), ["select.shuffle_seed"]),
        (RunConfig(select=SelectConfig(shuffle_seed=3, mixture=[Part(source="a", all=True)])), []),
        (RunConfig(select=SelectConfig(length_edges=[9], balance=["source"])), ["select.length_edges"]),
        (RunConfig(select=SelectConfig(length_edges=[9], balance=["length"])), []),
        (RunConfig(estimate=EstimateConfig(device_tflops=1)), ["estimate.device_tflops"]),
        (RunConfig(estimate=EstimateConfig(device_tflops=1), dry_run=True), []),
        (RunConfig(finetune=FinetuneConfig(epochs=2, max_steps=9)), ["finetune.epochs"]),
        (AlignRunConfig(), []),
        (RunConfig(reference="r", finetune=FinetuneConfig(batch_size=9)), ["finetune.batch_size"]),
        (RunConfig(reference="r"), []),
        (CompareConfig(instructions_chat=True), ["instructions_chat"]),
        (CompareConfig(instructions_chat=True, instructions="i"), []),
        (CompareConfig(generate=GenerateConfig(max_new_tokens=9)), ["generate.max_new_tokens"]),
        (CompareConfig(generate=GenerateConfig(max_new_tokens=9), instructions="i"), []),
        (CompareConfig(generate=GenerateConfig(sources=["a"]), instructions="i"), ["generate.sources"]),
        (CompareConfig(generate=GenerateConfig(sources=["a"]), measures=["exact_match"]), []),
    ],
)
def test_what_changes_nothing_is_known(config: OutputConfig, unused: list[str]) -> None:
    assert list(config.without_effect()) == unused


@pytest.mark.parametrize(
    ("select", "fits"),
    [
        ({"top_k": 10}, True),
        ({"top_k": 11}, False),
        ({"top_fraction": 0.1}, False),
        ({"min_score": 0.1}, False),
        ({"top_k": 3, "balance": ["source"]}, False),
        ({"quotas": {"a": 3}, "balance": ["source"]}, True),
    ],
)
def test_a_ranking_of_the_first_ranks_serves_rules_that_need_no_more(select: dict[str, Any], fits: bool) -> None:
    if fits:
        RunConfig(rank=RankConfig(most=10), select=SelectConfig(**select))
        return
    with pytest.raises(ConfigError, match=r"rank\.most"):
        RunConfig(rank=RankConfig(most=10), select=SelectConfig(**select))


def test_json_lines_need_the_records() -> None:
    with pytest.raises(ConfigError, match="keep_record"):
        RunConfig(keep_record=False, select=SelectConfig(top_k=1, jsonl=True))
