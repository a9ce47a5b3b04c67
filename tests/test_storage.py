"""Files of a run: whole or not there, identified by their content, and the same in memory as on a disk."""

import hashlib
import itertools
import json
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pytest

from davir_ray.errors import IntegrityError, OutputError
from davir_ray.storage import (
    FINGERPRINT_KEY,
    TEMPORARY,
    FileEntry,
    Location,
    Manifest,
    committed_files,
    describe_parquet,
    differences,
    digest,
    file_digest,
    read_parquet,
    remove_leftovers,
    total_rows,
    write_parquet,
)

TABLE = pa.table({"a": [1, 2, 3], "b": ["x", "ü", None]})
_NUMBERS = itertools.count()


@pytest.fixture(params=["local", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Location]:
    """An empty folder, which does not exist yet."""
    if request.param == "local":
        yield Location.of(tmp_path / "run")
        return
    name = f"memory://storage-test-{next(_NUMBERS)}"
    yield Location.of(name)
    Location.of(name).remove()


@pytest.fixture
def local(tmp_path: Path) -> Location:
    return Location.of(tmp_path / "run")


def manifest(**changes: Any) -> Manifest:
    values: dict[str, Any] = {
        "stage": "score",
        "fingerprint": {"base": {"sha": "ä"}, "settings": [1, 2.5, None]},
        "counts": {"rows": 3},
        "files": [FileEntry("a.parquet", 3, 100, "aa"), FileEntry("b.parquet", 4, 200, "bb")],
        "details": {"curve": [[1, 0.5]]},
        "seconds": 1.5,
    }
    return Manifest(**(values | changes))


# --- locations -------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read(place: Location) -> None:
    file = place / "deep" / "er" / "name"
    assert not file.exists()
    file.write_bytes(b"\x00content")
    assert file.exists()
    assert file.read_bytes() == b"\x00content"
    file.write_text("größer")
    assert file.read_bytes().decode() == "größer"


def test_names_are_the_sorted_files_of_the_folder_only(place: Location) -> None:
    assert place.names() == []
    for name in ("b.parquet", "a.parquet", "c.json", "below/d.parquet", f"{TEMPORARY}e.parquet"):
        (place / name).write_bytes(b"x")
    assert place.names() == ["a.parquet", "b.parquet", "c.json"]
    assert place.names(".parquet") == ["a.parquet", "b.parquet"]


def test_a_missing_file_is_not_found(place: Location) -> None:
    with pytest.raises(FileNotFoundError):
        (place / "nothing").read_bytes()


def test_removing_takes_files_and_folders_and_minds_nothing_missing(place: Location) -> None:
    (place / "a").write_bytes(b"x")
    (place / "b" / "c").write_bytes(b"x")
    for name in ("a", "b", "nothing"):
        (place / name).remove()
        assert not (place / name).exists()


def test_a_location_survives_pickling_and_names_itself(place: Location) -> None:
    (place / "a").write_bytes(b"x")
    again = pickle.loads(pickle.dumps(place))
    assert (again / "a").read_bytes() == b"x"
    assert str(again) == str(place)
    assert Location.of(str(place / "a")).read_bytes() == b"x"
    assert (place / "x" / "y").name == "y"
    assert place.is_local == ("://" not in str(place))


def test_a_trailing_slash_changes_nothing(tmp_path: Path) -> None:
    assert Location.of(f"{tmp_path}/").path == Location.of(tmp_path).path == str(tmp_path)


# --- atomic writes ---------------------------------------------------------------------------------------------------


class CrashError(Exception):
    """Stands for a process that dies."""


@pytest.fixture
def crashing(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: object) -> None:
        raise CrashError

    monkeypatch.setattr(Path, "replace", crash)


@pytest.mark.usefixtures("crashing")
def test_a_crash_before_the_rename_leaves_no_file_that_a_reader_sees(local: Location) -> None:
    with pytest.raises(CrashError):
        write_parquet(local / "a.parquet", TABLE)
    assert not (local / "a.parquet").exists()
    assert local.names() == []
    assert [path.name.startswith(TEMPORARY) for path in Path(local.path).iterdir()] == [True]
    remove_leftovers(local)
    assert list(Path(local.path).iterdir()) == []


def test_a_crash_leaves_the_file_that_was_there(local: Location, request: pytest.FixtureRequest) -> None:
    (local / "a").write_bytes(b"old")
    request.getfixturevalue("crashing")
    with pytest.raises(CrashError):
        (local / "a").write_bytes(b"new and longer")
    assert (local / "a").read_bytes() == b"old"


def test_leftovers_are_removed_and_finished_files_are_not(place: Location) -> None:
    remove_leftovers(place)
    (place / "a.parquet").write_bytes(b"x")
    if place.is_local:
        (Path(place.path) / f"{TEMPORARY}file").write_bytes(b"x")
        (Path(place.path) / f"{TEMPORARY}folder" / "below").mkdir(parents=True)
    remove_leftovers(place)
    assert place.names() == ["a.parquet"]
    if place.is_local:
        assert [path.name for path in Path(place.path).iterdir()] == ["a.parquet"]


def test_putting_a_folder_replaces_the_one_that_was_there(place: Location, tmp_path: Path) -> None:
    target = place / "reference"
    (target / "old").write_bytes(b"x")
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "a").write_bytes(b"1")
    (source / "sub" / "b").write_bytes(b"2")
    target.put_folder(source)
    assert target.names() == ["a"]
    assert (target / "sub" / "b").read_bytes() == b"2"
    assert not (target / "old").exists()


def test_putting_a_folder_where_no_folder_is_makes_it(place: Location, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "a").write_bytes(b"1")
    (place / "deep" / "reference").put_folder(source)
    assert (place / "deep" / "reference" / "a").read_bytes() == b"1"


# --- Parquet ---------------------------------------------------------------------------------------------------------


def test_a_table_comes_back_with_its_entry_and_fingerprint(place: Location) -> None:
    entry = write_parquet(place / "a.parquet", TABLE, {FINGERPRINT_KEY: b"mark"})
    assert read_parquet(place / "a.parquet").equals(TABLE)
    assert read_parquet(place / "a.parquet", ["b"]).column_names == ["b"]
    content = (place / "a.parquet").read_bytes()
    assert entry == FileEntry("a.parquet", 3, len(content), hashlib.sha256(content).hexdigest())
    assert describe_parquet(place / "a.parquet") == (entry, "mark")


def test_a_table_keeps_the_metadata_it_had(place: Location) -> None:
    write_parquet(place / "a.parquet", TABLE.replace_schema_metadata({b"own": b"1"}), {b"more": b"2"})
    assert read_parquet(place / "a.parquet").schema.metadata == {b"own": b"1", b"more": b"2"}


def test_the_same_table_gives_the_same_bytes(place: Location) -> None:
    first, second = (write_parquet(place / name, TABLE) for name in ("a", "b"))
    assert first.sha256 == second.sha256


def test_committed_files_are_those_of_the_same_fingerprint(place: Location) -> None:
    assert committed_files(place, "mark") == []
    entries = [write_parquet(place / f"{name}.parquet", TABLE, {FINGERPRINT_KEY: b"mark"}) for name in "ab"]
    assert committed_files(place, "mark") == entries
    assert total_rows(entries) == 6


@pytest.mark.parametrize("extra", [{FINGERPRINT_KEY: b"other"}, {}])
def test_a_file_of_another_fingerprint_is_refused(place: Location, extra: dict[bytes, bytes]) -> None:
    write_parquet(place / "a.parquet", TABLE, {FINGERPRINT_KEY: b"mark"})
    write_parquet(place / "b.parquet", TABLE, extra)
    with pytest.raises(OutputError, match=r"b\.parquet.*--overwrite"):
        committed_files(place, "mark")


# --- manifests -------------------------------------------------------------------------------------------------------


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


# --- digests ---------------------------------------------------------------------------------------------------------


def test_a_digest_depends_on_the_value_and_not_on_the_order_of_names() -> None:
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
    assert len({digest(value) for value in (1, "1", [1], {"1": 1}, None, 1.5, [1, None])}) == 7


def test_a_file_digest_changes_with_the_content(local: Location) -> None:
    (local / "a").write_bytes(b"content")
    assert file_digest(local / "a") == hashlib.sha256(b"content").hexdigest()


def test_a_remote_file_digest_is_the_stores_etag(monkeypatch: pytest.MonkeyPatch) -> None:
    place = Location(fsspec.filesystem("memory"), "/bucket/key")
    for info, expected in [({"size": 3, "ETag": '"abc"'}, "3-abc"), ({"size": 3, "etag": "abd"}, "3-abd")]:
        monkeypatch.setattr(type(place.fs), "info", lambda _self, _path, info=info, **_: info)
        assert file_digest(place) == expected
