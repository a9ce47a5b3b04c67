"""Manifests: read as they were written, damage to them and to the files they name is found and named."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from davir_ray.errors import IntegrityError
from davir_ray.run.files import FileEntry, in_folder, write_parquet
from davir_ray.run.location import Location
from davir_ray.run.manifest import Manifest, differences


def manifest(**changes: Any) -> Manifest:
    values: dict[str, Any] = {
        "stage": "score",
        "fingerprint": {"base": {"sha": "ä"}, "settings": [1, 2.5, None]},
        "counts": {"rows": 3},
        "files": [
            FileEntry(name="a.parquet", rows=3, bytes=100, sha256="aa"),
            FileEntry(name="b.parquet", rows=4, bytes=200, sha256="bb"),
        ],
        "details": {"curve": [[1, 0.5]]},
        "seconds": 1.5,
    }
    return Manifest(**(values | changes))


def test_a_manifest_comes_back_as_it_was(place: Location) -> None:
    assert Manifest.read(place, "score") is None
    manifest().write(place)
    assert Manifest.read(place, "score") == manifest()
    assert Manifest.read(place, "rank") is None


def test_a_flipped_byte_anywhere_in_a_manifest_is_detected(local: Location) -> None:
    manifest().write(local)
    file = local / "manifests" / "score.json"
    content = file.read_bytes()
    values = json.loads(content)
    for at in range(0, len(content), 7):
        changed = bytearray(content)
        changed[at] ^= 1
        Path(file.path).write_bytes(changed)
        if _says_the_same(bytes(changed), values):
            continue
        with pytest.raises(IntegrityError, match=r"score\.json"):
            Manifest.read(local, "score")


def _says_the_same(content: bytes, values: dict[str, Any]) -> bool:
    """White space may differ."""
    try:
        return bool(json.loads(content) == values)
    except ValueError:
        return False


@pytest.mark.parametrize("kept", [0, 1, 100, -3])
def test_a_truncated_manifest_is_detected(place: Location, kept: int) -> None:
    manifest().write(place)
    file = place / "manifests" / "score.json"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(IntegrityError, match=r"score\.json"):
        Manifest.read(place, "score")


@pytest.mark.parametrize("content", ["null", "[]", "3", "{}"])
def test_json_that_is_no_manifest_is_detected(place: Location, content: str) -> None:
    (place / "manifests" / "score.json").write_text(content)
    with pytest.raises(IntegrityError, match=r"score\.json"):
        Manifest.read(place, "score")


def test_the_content_of_a_manifest_is_that_of_its_files_only() -> None:
    content = manifest().content
    assert manifest(seconds=9.0, details={}, counts={}, fingerprint={}).content == content
    first, second = manifest().files
    assert manifest(files=[first]).content != content
    assert manifest(files=[first, replace(second, sha256="bc")]).content != content


def test_differences_name_what_differs_and_nothing_else() -> None:
    old = {"same": 1, "base": {"sha": "a", "more": {"x": [1]}}, "gone": None, "left": 2}
    new = {"same": 1, "base": {"sha": "b", "more": {"x": [2]}}, "new": "ü"}
    assert differences(old, old) == []
    assert differences(old, new) == [
        "base.more.x: [1] → [2]",
        'base.sha: "a" → "b"',
        "left: 2 → null",
        'new: null → "ü"',
    ]


def test_long_values_are_shortened_in_differences() -> None:
    (line,) = differences({"x": "a" * 1000}, {"x": "b" * 1000})
    assert len(line) < 140


@pytest.fixture
def committed(place: Location) -> Manifest:
    """A stage of two files, complete."""
    files = [write_parquet(place / "scores" / f"{name}.parquet", pa.table({"a": [name] * 50})) for name in "ab"]
    return manifest(files=in_folder("scores", files)).commit(place)


def test_a_committed_stage_is_sound(place: Location, committed: Manifest) -> None:
    assert Manifest.read(place, "score") == committed
    assert committed.damage(place) == []
    assert all(entry.mark is not None for entry in committed.files) or not place.is_local


def test_a_stage_is_not_committed_without_its_files(place: Location) -> None:
    files = in_folder("scores", [write_parquet(place / "scores" / "a.parquet", pa.table({"a": [1]}))])
    for broken in (replace(files[0], bytes=1), replace(files[0], name="scores/b.parquet")):
        with pytest.raises(IntegrityError, match=broken.name):
            manifest(files=[*files, broken]).commit(place)
        assert Manifest.read(place, "score") is None


def test_damaged_files_are_named(place: Location, committed: Manifest) -> None:
    content = bytearray((place / "scores" / "a.parquet").read_bytes())
    content[len(content) // 2] ^= 1
    (place / "scores" / "a.parquet").write_bytes(bytes(content))
    (line,) = committed.damage(place)
    assert line.startswith("scores/a.parquet: sha256 ")
    (place / "scores" / "b.parquet").write_bytes(bytes(content[:-1]))
    assert [line.split(":")[0] for line in committed.damage(place)] == ["scores/a.parquet", "scores/b.parquet"]
    (place / "scores" / "b.parquet").remove()
    assert "missing" in committed.damage(place)[1]


def test_a_copy_with_new_times_is_sound(local: Location, tmp_path: Path) -> None:
    files = [write_parquet(local / "scores" / "a.parquet", pa.table({"a": [1]}))]
    committed = manifest(files=in_folder("scores", files)).commit(local)
    shutil.copytree(local.path, tmp_path / "copy")
    os.utime(tmp_path / "copy" / "scores" / "a.parquet", (1, 1))
    assert committed.damage(Location.of(tmp_path / "copy")) == []
