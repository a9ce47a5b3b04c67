"""A comparison's settings: what is misspelt, contradicts or is missing is told before anything runs."""

from typing import Any

import pytest

from davir_ray.cli import parse_as
from davir_ray.config.compare import CompareConfig, TrialName
from davir_ray.config.sources import Source
from davir_ray.config.yaml import dump, load
from davir_ray.errors import ConfigError

WHOLE: dict[str, Any] = {"run": "run1", "output": "out", "heldout": "data", "heldout_format": "alpaca"}


def test_a_whole_configuration_by_command_line() -> None:
    argv = ["--run", "run1", "--output", "out", "--heldout", "data", "--heldout_format", "alpaca"]
    argv += ["--arms", "[selection, full]", "--sizes", "[10, 20]", "--recipe", "{epochs: 1, learning_rate: 1e-3}"]
    config = parse_as(CompareConfig, argv)
    config.require()
    assert config.arms == ["selection", "full"]
    assert config.recipe == {"epochs": 1, "learning_rate": 1e-3}
    assert [source.name for source in config.all_heldout()] == ["alpaca"]


def test_runs_and_seeds_by_arm_by_command_line() -> None:
    argv = ["--run", "[run1, run2]", "--seeds", "{random: 8, default: 4}", "--seeds_per_draw", "2"]
    config = parse_as(CompareConfig, argv)
    assert config.runs == ["run1", "run2"]
    assert [config.num_models(arm) for arm in ("random", "selection", "full")] == [8, 4, 4]
    assert [config.row_set("random", model) for model in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [config.row_set("selection", model) for model in range(4)] == [0, 1, 0, 1]
    assert [config.row_set("full", model) for model in range(4)] == [0, 0, 0, 0]
    one = CompareConfig(run="run1", seeds=5)
    assert (one.runs, one.num_models("rho"), one.readings) == (["run1"], 5, ["tokens", "epochs"])
    assert [one.row_set(arm, 3) for arm in ("random", "selection")] == [3, 0]
    assert load(CompareConfig, dump(config)) == config
    # Fewer models than runs are enough where the rows come from one run.
    CompareConfig(run=["run1", "run2"], arms=["random", "full"], seeds=1)


def test_the_first_test_is_of_the_selection_against_random() -> None:
    assert CompareConfig().contrasts() == [
        ("selection", "random"), ("selection", "random_matched"), ("selection", "lowest"), ("selection", "rho"),
        ("selection", "full"), ("random_matched", "random"), ("lowest", "random"), ("rho", "random"),
        ("full", "random"),
    ]  # fmt: skip
    assert CompareConfig(arms=["random", "full"]).contrasts() == [("random", "full")]
    assert CompareConfig(arms=["full"]).contrasts() == []
    given = CompareConfig(tests=["lowest vs rho", "selection vs random"])
    assert given.contrasts() == [("lowest", "rho"), ("selection", "random")]
    assert CompareConfig(margins={"loss": 0.005}).all_margins() == {"loss": 0.005, "exact_match": 0.02}


def test_settings_of_draws_without_a_drawn_arm_have_no_effect() -> None:
    config = CompareConfig(arms=["selection"], seeds_per_draw=2, outside_selection=True, match_prompts=True)
    assert config.without_effect().keys() == {"seeds_per_draw", "outside_selection", "match_prompts"}
    drawn = CompareConfig(arms=["random"], seeds_per_draw=2, outside_selection=True, match_prompts=True)
    assert drawn.without_effect().keys() == {"match_prompts"}


def test_an_arm_may_be_any_other_order() -> None:
    arms = ["selection", "random", "order:ifd", "order:base_mean_nll"]
    seeds = {"order:ifd": 4, "default": 2}
    config = parse_as(CompareConfig, ["--arms", "[selection, random, order:ifd, order:base_mean_nll]"])
    assert config.arms == arms
    config = CompareConfig(run=["run1", "run2"], arms=arms, seeds=seeds, tests=["order:ifd vs random"])
    assert config.contrasts() == [("order:ifd", "random")]
    assert [config.num_models(arm) for arm in arms] == [2, 2, 4, 2]
    assert [config.row_set("order:ifd", model) for model in range(4)] == [0, 1, 0, 1]
    assert str(TrialName("order:ifd", 60, "epochs", 1)) == "order_ifd-60-epochs-seed1"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"recipe": {"epoch": 1}}, "'epoch', which is not a field of finetune"),
        ({"recipe": {"epochs": 0}}, "finetune.epochs is 0"),
        ({"recipe": {"epochs": "three"}}, "recipe is"),
        ({"recipe": {"seed": 1}}, "'seed', which the comparison sets itself"),
        ({"arms": []}, "arms is"),
        ({"arms": ["random", "random"]}, "without repetition"),
        ({"arms": ["selection", "rand"]}, "an arm is 'rand'; it must be one of selection, random, "),
        ({"arms": ["order:loss"]}, "an arm is 'order:loss'"),
        ({"arms": ["order:random"]}, "an order of rank.order that is not random"),
        ({"run": ["run1", "run2"], "arms": ["order:ifd"], "seeds": 1}, "so order:ifd has fewer models than there are"),
        ({"sizes": [0]}, "a size is 0"),
        ({"seeds": 0}, "seeds is 0"),
        ({"seeds": {"default": 3, "lowest": 0}}, "seeds of lowest is 0"),
        ({"seeds": {"default": 3, "rand": 8}}, "an arm of seeds is 'rand'; it must be one of selection, random, "),
        ({"seeds": {"random": 8}, "arms": ["random", "full"]}, "with no number for full; add it, or a default"),
        ({"seeds_per_draw": 0}, "seeds_per_draw is 0"),
        ({"seeds_per_draw": 3}, "all 3 models of random have one draw"),
        ({"seeds": {"rho": 2, "default": 3}, "arms": ["selection", "random"]}, "an arm of seeds is 'rho'"),
        ({"tests": ["selection vs full"], "arms": ["selection", "random"]}, "a test is 'selection vs full'"),
        ({"tests": ["selection-random"]}, "a test is 'selection-random'"),
        ({"tests": ["rho vs full", "rho vs full"]}, "without repetition"),
        ({"margins": {"loss": 0.0}}, "margins.loss is 0.0"),
        ({"margins": {"accuracy": 0.1}}, "a measure in margins is 'accuracy'"),
        ({"run": ["run1", "run1"]}, "a run is 'run1'; it must be given once"),
        ({"run": ["run1", "run2"], "seeds": 1}, "so selection has fewer models than there are runs"),
        ({"run": ["run1", "run2"], "seeds": {"rho": 1, "default": 2}}, "so rho has fewer models than there are runs"),
        ({"run": ["run1", "s3://key:secret@host/run"]}, "with a password in it"),
        ({"heldout": None}, "heldout_format is given without heldout"),
        ({"heldout_sources": [Source(name="a", path="b", format="alpaca")]}, "exactly one of the two"),
        ({"generate": {"sources": ["gsm8k"]}}, "the held-out sources are alpaca"),
        ({"run": "s3://key:secret@host/run"}, "with a password in it"),
        ({"heldout": "s3://key:secret@host/data"}, "with a password in it"),
    ],
)
def test_a_mistake_is_told_at_birth(changes: dict[str, Any], told: str) -> None:
    if "generate" in changes:
        with pytest.raises(ConfigError, match=told):
            parse_as(
                CompareConfig,
                ["--heldout", "d", "--heldout_format", "alpaca", "--generate.sources", "[gsm8k]"],
            )
        return
    with pytest.raises(ConfigError, match=told) as error:
        CompareConfig(**{**WHOLE, **changes})
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("absent", ["run", "output", "heldout"])
def test_what_is_missing_is_named(absent: str) -> None:
    names = ("heldout", "heldout_format") if absent == "heldout" else (absent,)
    config = CompareConfig(**{name: value for name, value in WHOLE.items() if name not in names})
    with pytest.raises(ConfigError, match=f"--{absent}"):
        config.require()
