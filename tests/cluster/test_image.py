"""The Dockerfile: what it copies is there and is enough, and what it installs is the project's."""

import re
import shutil
import subprocess
import sys
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pytest
from deployment import CLUSTER, IN_IMAGE, ROOT, YAMLS, documents, project, walk
from packaging.specifiers import SpecifierSet

from davir_ray import __version__

DOCKERFILE = CLUSTER / "Dockerfile"
KNOWN = {"FROM", "RUN", "COPY", "WORKDIR", "ENV", "USER"}


def instructions() -> list[tuple[str, str]]:
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in joined.splitlines() if line.strip()]


def arguments(name: str) -> list[str]:
    return [argument for instruction, argument in instructions() if instruction == name]


def sources() -> list[str]:
    return [word for argument in arguments("COPY") for word in argument.split()[:-1]]


def sent_to_the_builder(name: str) -> bool:
    """Whether .dockerignore lets a path of the repository's root through: its last line that fits decides."""
    sent = True
    for line in (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines():
        if line and not line.startswith("#") and fnmatch(name, line.removeprefix("!").removeprefix("**/")):
            sent = line.startswith("!")
    return sent


def test_its_instructions() -> None:
    assert {name for name, _ in instructions()} == KNOWN
    assert instructions()[0][0] == "FROM"
    assert len(arguments("FROM")) == 1


def test_what_it_copies_is_there_and_reaches_the_builder() -> None:
    assert set(sources()) == {"pyproject.toml", "README.md", "LICENSE", "davir_ray", "jobs"}
    for name in sources():
        assert (ROOT / name).exists()
        assert sent_to_the_builder(name)
    assert not any(map(sent_to_the_builder, [".git", ".env", "runs", "tests", "cluster", "__pycache__"]))


def test_its_python_is_the_projects() -> None:
    (base,) = arguments("FROM")
    found = re.fullmatch(r"python:(\d+\.\d+)-slim-\w+", base)
    assert found
    assert found[1] in SpecifierSet(project()["requires-python"])


def test_it_installs_the_project_with_an_extra_that_there_is() -> None:
    (installed,) = [
        re.findall(r"pip install \S+ \"(.+?)\"", argument) for argument in arguments("RUN") if "pip" in argument
    ]
    assert installed == [".[cluster]"]
    extras = project()["optional-dependencies"]
    (ray,) = [need for need in project()["dependencies"] if need.startswith("ray[")]
    (server,) = [need for need in extras["cluster"] if need.startswith("ray[default]")]
    assert server.split("]")[1] == ray.split("]")[1]
    assert set(extras["cluster"]) <= set(extras["test"]), "what the image holds is tested"


def test_it_ends_as_a_user_without_rights_where_the_entry_point_looks() -> None:
    assert arguments("USER") == ["ray"]
    assert any("--uid 1000" in argument for argument in arguments("RUN"))
    assert arguments("WORKDIR")[-1] == IN_IMAGE.rstrip("/")
    assert arguments("COPY")[-1] == "jobs jobs"
    assert "RAY_AUTH_MODE=token" in arguments("ENV")


def test_every_file_names_the_image_of_this_version() -> None:
    text = DOCKERFILE.read_text() + "".join(path.read_text() for path in CLUSTER.rglob("*.md"))
    named = re.findall(r"registry\.example\.com/davir_ray:[\w.]+", text)
    for path in YAMLS:
        named += [value for doc in documents(path) for where, value in walk(doc) if where.endswith("image")]
    assert len(named) >= 6
    assert set(named) == {f"registry.example.com/davir_ray:{__version__}"}


@pytest.mark.slow
def test_what_it_copies_before_it_installs_is_the_whole_package(tmp_path: Path) -> None:
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "davir_ray", tmp_path / "davir_ray", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", "wheels", "."]
    subprocess.run(command, cwd=tmp_path, check=True)
    (wheel,) = (tmp_path / "wheels").glob(f"davir_ray-{__version__}-*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("davir_ray/")}
    wanted = {str(path.relative_to(tmp_path)) for path in (tmp_path / "davir_ray").rglob("*") if path.is_file()}
    assert {name for name in wanted if not name.endswith(".md")} <= held
