"""The files of cluster/, taken apart: objects, texts, the commands in them."""

import re
import shlex
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from ray.scripts.scripts import cli as ray_cli

import davir_ray

ROOT = Path(davir_ray.__file__).parent.parent
CLUSTER = ROOT / "cluster"
TEXTS = sorted(path for path in CLUSTER.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
YAMLS = [path for path in TEXTS if path.suffix == ".yaml"]

IN_IMAGE = "/home/ray/davir_ray/"
"""Where the image holds what lies in the repository."""

IN_BUCKET = "s3://my-bucket/davir_ray/"
"""Where the examples put what lies in cluster/."""

_COMMAND = re.compile(r"(?:python [\w/.]*(?:jobs|cluster)/\w+\.py|ray [a-z][a-z-]+)[^;|&]*")
_CODE = re.compile(r"`([^`\n]+)`|^(?:    |#   )\s*(.+)$", re.MULTILINE)
"""What a text shows as code: in backticks, or indented."""


def documents(path: Path) -> list[Any]:
    """Objects of a YAML file."""
    return list(yaml.safe_load_all(path.read_text()))


def walk(value: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Everything inside, with its place."""
    yield where, value
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from walk(inner, f"{where}.{key}")
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from walk(inner, f"{where}[{number}]")


def project() -> dict[str, Any]:
    """The project's table of pyproject.toml."""
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return table


def bounds(package: str) -> SpecifierSet:
    """Versions of a package that the project may be installed with."""
    (found,) = [need.specifier for need in map(Requirement, project()["dependencies"]) if need.name == package]
    return found


def commands(path: Path) -> list[list[str]]:
    """Command lines of a file, as words: of what its text shows as code, and of the values of a YAML file."""
    text = path.read_text().replace("\\\n", " ")
    if path.suffix == ".yaml":
        lines = [value for document in documents(path) for _, value in walk(document) if isinstance(value, str)]
        text = "\n".join(line.lstrip() for line in text.splitlines() if line.lstrip().startswith("#"))
    else:
        lines = []
    lines += [spanned or indented for spanned, indented in _CODE.findall(text)] if path.suffix != ".py" else []
    return [shlex.split(found, comments=True) for line in lines for found in _COMMAND.findall(line)]


def check_ray_command(words: Sequence[str]) -> None:
    """Raise click's error if Ray has no such command or option."""
    command: click.Command = ray_cli
    context = click.Context(command)
    words = words[1:]
    while isinstance(command, click.Group):
        found = command.get_command(context, words[0])
        assert found is not None, f"ray has no command {words[0]!r}"
        command, words = found, words[1:]
    command.make_parser(context).parse_args(list(words))
