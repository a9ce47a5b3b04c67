"""A comparison's settings: what is misspelt, contradicts or is missing is told before anything runs."""

from typing import Any

import pytest

from davir_ray.cli import parse_as
from davir_ray.config.compare import CompareConfig
from davir_ray.config.sources import Source
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


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"recipe": {"epoch": 1}}, "'epoch', which is not a field of finetune"),
        ({"recipe": {"epochs": 0}}, "finetune.epochs is 0"),
        ({"recipe": {"epochs": "three"}}, "recipe is"),
        ({"recipe": {"seed": 1}}, "'seed', which the comparison sets itself"),
        ({"arms": []}, "arms is"),
        ({"arms": ["random", "random"]}, "without repetition"),
        ({"sizes": [0]}, "a size is 0"),
        ({"seeds": 0}, "seeds is 0"),
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
