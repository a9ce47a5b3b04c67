"""Every command, path and version that the files of cluster/ name exists: they cannot rot."""

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path

import click
import pytest
from deployment import CLUSTER, IN_BUCKET, IN_IMAGE, ROOT, TEXTS, bounds, check_ray_command, commands, project
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from davir_ray.cli import parse_as
from davir_ray.config.run import RunConfig
from davir_ray.errors import ConfigError

COMMANDS = [(path, words) for path in TEXTS for words in commands(path)]
JOBS = sorted({tuple(words) for _, words in COMMANDS if words[0] == "python"})
RAY = sorted({tuple(words) for _, words in COMMANDS if words[0] == "ray"})


def here(word: str) -> str:
    """A name in the image or in the bucket as a path of the repository."""
    if word == "RUN.yaml":
        return str(CLUSTER / "run.yaml")
    return word.replace(IN_IMAGE, f"{ROOT}/").replace(IN_BUCKET, f"{CLUSTER}/")


def parse_job(words: Sequence[str]) -> None:
    """Raise ConfigError if the job does not take these options."""
    script = Path(here(words[1]))
    if not script.is_absolute():
        script = ROOT / script
    assert script.is_file(), words
    options = [here(word) for word in words[2:]]
    if script.name in ("score.py", "finetune.py", "rank.py"):
        parse_as(RunConfig, options)
    elif script.name == "verify.py":
        spec = importlib.util.spec_from_file_location("verify", script)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.parser().parse_args(options)
    else:
        assert script.parent == CLUSTER, f"{script} is parsed by nothing here"


def test_the_commands_are_found() -> None:
    told = {(path.name, words[1]) for path, words in COMMANDS}
    assert ("rayjob.yaml", f"{IN_IMAGE}jobs/score.py") in told
    assert {("aws.yaml", "up"), ("aws.yaml", "start"), ("README.md", "jobs/score.py"), ("README.md", "job")} <= told
    assert len([words for path, words in COMMANDS if path.name == "aws.yaml" and words[1] == "start"]) == 2


@pytest.mark.parametrize("words", JOBS, ids=" ".join)
def test_a_job_takes_the_options(words: Sequence[str]) -> None:
    parse_job(words)


@pytest.mark.parametrize("words", RAY, ids=" ".join)
def test_ray_takes_the_options(words: Sequence[str]) -> None:
    check_ray_command(words)


def test_a_command_that_has_rotted_is_found() -> None:
    with pytest.raises(ConfigError, match="no_such"):
        parse_job(["python", f"{IN_IMAGE}jobs/score.py", "--config", f"{IN_BUCKET}run.yaml", "--no_such", "1"])
    with pytest.raises(AssertionError, match=r"jobs/gone\.py"):
        parse_job(["python", "jobs/gone.py"])
    with pytest.raises(click.NoSuchOption):
        check_ray_command(["ray", "job", "submit", "--no-such", "--", "python"])
    with pytest.raises(AssertionError, match="ray has no command"):
        check_ray_command(["ray", "upp", "cluster/aws.yaml"])


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_every_path_exists(path: Path) -> None:
    named = re.findall(r"(?<![\w./-])(?:cluster|jobs|davir_ray|tests)/[\w./-]*\w\.[a-z0-9]+", path.read_text())
    links = re.findall(r"\]\(([^)#:]+)\)", path.read_text()) if path.suffix == ".md" else []
    assert all((ROOT / name).exists() for name in named), named
    assert all((path.parent / link).exists() for link in links), links


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_versions_are_of_the_project(path: Path) -> None:
    text = path.read_text()
    for ray in re.findall(r"(?:rayVersion: \"|Ray |[(])(2\.\d+(?:\.\d+)?)\b", text):
        full = ray if ray.count(".") == 2 else f"{ray}.0"
        assert Version(full) in bounds("ray"), ray
    for python in re.findall(r"(?:FROM python:|Python )(3\.\d+)", text):
        assert python in SpecifierSet(project()["requires-python"]), python


def test_lines_are_short() -> None:
    for path in TEXTS:
        assert max(map(len, path.read_text().splitlines())) <= 120, path
