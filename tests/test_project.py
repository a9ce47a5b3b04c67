"""What the repository says of itself in several places agrees: version, dependencies, the locked set."""

import re
import tomllib

import yaml
from drivers import PACKAGE
from packaging.requirements import Requirement

import davir_ray

PROJECT = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["project"]
LOCKED = tomllib.loads((PACKAGE / "uv.lock").read_text())["package"]


def test_the_version_is_the_citations_and_the_newest_of_the_changelog() -> None:
    assert yaml.safe_load((PACKAGE / "CITATION.cff").read_text())["version"] == davir_ray.__version__
    heads = re.findall(r"^## (.+)$", (PACKAGE / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert next(head for head in heads if head != "Unreleased") == davir_ray.__version__


def test_the_lock_file_has_every_dependency_within_its_bounds() -> None:
    versions: dict[str, list[str]] = {}
    for package in LOCKED:
        versions.setdefault(package["name"], []).append(package.get("version", ""))
    wanted = [
        *PROJECT["dependencies"],
        *(text for extra in PROJECT["optional-dependencies"].values() for text in extra),
    ]
    for requirement in map(Requirement, wanted):
        name = requirement.name.lower().replace("_", "-")
        assert versions.get(name), f"run: uv lock (it lacks {name})"
        assert all(version in requirement.specifier for version in versions[name]), f"run: uv lock ({name})"
