"""Files of a run: whole or not there, identified by their content, and the same in memory as on a disk."""

import errno
import hashlib
import os
import pickle
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs
from botocore.exceptions import BotoCoreError

from davir_ray.errors import IntegrityError, OutputError, StorageError
from davir_ray.run import files
from davir_ray.run.files import (
    FINGERPRINT_KEY,
    FileEntry,
    committed_parquet,
    content_digest,
    digest,
    file_digest,
    parquet_rows,
    put_folder,
    read_parquet,
    write_parquet,
)
from davir_ray.run.location import TEMPORARY, Location, remove_leftovers
from davir_ray.run.storage_errors import user_errors

TABLE = pa.table({"a": [1, 2, 3], "b": ["x", "ü", None]})


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


def test_leftovers_are_removed_wherever_they_are_and_finished_files_are_not(place: Location) -> None:
    remove_leftovers(place)
    (place / "a.parquet").write_bytes(b"x")
    (place / "below" / "b.parquet").write_bytes(b"x")
    if place.is_local:
        (Path(place.path) / f"{TEMPORARY}file").write_bytes(b"x")
        (Path(place.path) / "below" / f"{TEMPORARY}folder" / f"{TEMPORARY}more").mkdir(parents=True)
    remove_leftovers(place)
    assert place.names() == ["a.parquet"]
    if place.is_local:
        files = sorted(path.name for path in Path(place.path).rglob("*"))
        assert files == ["a.parquet", "b.parquet", "below"]


def test_a_listed_link_is_the_file_that_it_points_to(local: Location, tmp_path: Path) -> None:
    target = tmp_path / "elsewhere"
    target.write_bytes(b"twelve bytes")
    os.utime(target, ns=(1, 1_000_000_000))
    folder = Path(local.path)
    folder.mkdir()
    (folder / "link").symlink_to(target)
    (folder / "gone").symlink_to("nowhere")
    (folder / "folder").symlink_to(tmp_path)
    found = pickle.loads(pickle.dumps(local)).listed()
    assert list(found) == ["link"]
    assert found["link"].bytes == os.stat(target).st_size
    assert found["link"].mark == str(os.stat(target).st_mtime)


@pytest.mark.parametrize("target", ["kept", "nowhere"])
def test_removing_and_replacing_a_link_leaves_what_it_points_to(local: Location, tmp_path: Path, target: str) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_bytes(b"x")
    folder = Path(local.path)
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path / target)
    put_folder(local / "link", tmp_path / "kept")
    assert not (folder / "link").is_symlink()
    (local / "link").remove()
    (folder / "link").symlink_to(tmp_path / target)
    (local / "link").remove()
    assert list(folder.iterdir()) == []
    assert (tmp_path / "kept" / "file").read_bytes() == b"x"


def test_leftovers_behind_links_stay_and_links_among_them_go(local: Location, tmp_path: Path) -> None:
    others = tmp_path / "others" / f"{TEMPORARY}written-by-another-run"
    others.mkdir(parents=True)
    folder = Path(local.path)
    folder.mkdir()
    (folder / "scores").symlink_to(tmp_path / "others")
    (folder / f"{TEMPORARY}link").symlink_to(tmp_path / "others")
    remove_leftovers(local)
    assert [path.name for path in folder.iterdir()] == ["scores"]
    assert others.exists()


def test_a_folder_that_cannot_be_listed_is_not_taken_for_empty(
    local: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    (local / "below" / "file").write_bytes(b"x")
    scan = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("below"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scan(path)

    (local / ".below" / "file").write_bytes(b"x")
    assert local.fs.find(local.path) == [f"{local.path}/.below/file", f"{local.path}/below/file"]
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError):
        local.fs.find(local.path)
    (Path(local.path) / "below").rename(f"{local.path}/other")
    assert local.fs.find(local.path) == [f"{local.path}/other/file"]  # hidden: nobody would read it


def test_only_one_of_many_creates_a_file(place: Location) -> None:
    place.fs.makedirs(place.path, exist_ok=True)
    with ThreadPoolExecutor(8) as pool:
        written = list(pool.map(lambda i: (place / "lease").create(b"%d" % i), range(8)))
    assert sum(written) == 1
    assert (place / "lease").read_bytes() == b"%d" % written.index(True)


def test_what_makes_a_folder_whole_is_put_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("a", "config.json", "z"):
        (source / name).write_text(name)
    place = Location.of(f"memory://{tmp_path.name}")
    order = []
    put_file = place.fs.put_file
    monkeypatch.setattr(place.fs, "put_file", lambda a, b: order.append(a) or put_file(a, b), raising=False)
    entries = put_folder(place, source, last=["config.json"])
    assert [Path(path).name for path in order] == ["a", "z", "config.json"]
    digests = {entry.name: entry.sha256 for entry in entries}
    assert digests == {name: hashlib.sha256(name.encode()).hexdigest() for name in ("a", "config.json", "z")}


def test_putting_a_folder_replaces_the_one_that_was_there(place: Location, tmp_path: Path) -> None:
    target = place / "reference"
    (target / "old").write_bytes(b"x")
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "a").write_bytes(b"1")
    (source / "sub" / "b").write_bytes(b"2")
    put_folder(target, source)
    assert target.names() == ["a"]
    assert (target / "sub" / "b").read_bytes() == b"2"
    assert not (target / "old").exists()


def test_putting_a_folder_where_no_folder_is_makes_it(place: Location, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "a").write_bytes(b"1")
    put_folder(place / "deep" / "reference", source)
    assert (place / "deep" / "reference" / "a").read_bytes() == b"1"


# --- Parquet ---------------------------------------------------------------------------------------------------------


def test_a_table_comes_back_with_its_entry_and_fingerprint(place: Location) -> None:
    entry = write_parquet(place / "a.parquet", TABLE, {FINGERPRINT_KEY: b"mark"})
    assert read_parquet(place / "a.parquet").equals(TABLE)
    assert read_parquet(place / "a.parquet", ["b"]).column_names == ["b"]
    content = (place / "a.parquet").read_bytes()
    assert entry == FileEntry(name="a.parquet", rows=3, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    again, table = committed_parquet(place / "a.parquet")
    assert again == entry
    assert table.equals(TABLE)
    assert table.schema.metadata[FINGERPRINT_KEY] == b"mark"


def test_a_table_keeps_the_metadata_it_had(place: Location) -> None:
    write_parquet(place / "a.parquet", TABLE.replace_schema_metadata({b"own": b"1"}), {b"more": b"2"})
    assert read_parquet(place / "a.parquet").schema.metadata == {b"own": b"1", b"more": b"2"}


def test_the_same_table_gives_the_same_bytes(place: Location) -> None:
    first, second = (write_parquet(place / name, TABLE) for name in ("a", "b"))
    assert first.sha256 == second.sha256


def test_a_flipped_bit_or_a_cut_is_found_or_changes_nothing_that_is_read(local: Location) -> None:
    """Wherever it strikes: in the data, the page headers or the footer."""
    table = pa.table({"number": list(range(300)), "text": [f"row {i % 7}" for i in range(300)]})
    place = local / "a.parquet"
    write_parquet(place, table)
    content = place.read_bytes()
    found = []
    for at in range(0, len(content), 3):
        damaged = bytearray(content)
        damaged[at] ^= 1 << (at % 8)
        (local / "b.parquet").write_bytes(bytes(damaged))
        try:
            read = read_parquet(local / "b.parquet", ["number", "text"])
        except IntegrityError as error:
            found.append(str(error))
        else:
            assert read.to_pydict() == table.to_pydict(), at
    assert len(found) > len(content) / 9
    assert all("b.parquet is damaged" in line for line in found)
    for kept in (0, 3, len(content) // 2, len(content) - 1):
        (local / "b.parquet").write_bytes(content[:kept])
        with pytest.raises(IntegrityError, match=r"b\.parquet is damaged"):
            read_parquet(local / "b.parquet")
        with pytest.raises(IntegrityError, match=r"b\.parquet is damaged"):
            committed_parquet(local / "b.parquet")


def test_a_flipped_bit_of_a_committed_file_changes_no_value_of_the_same_schema(local: Location) -> None:
    write_parquet(local / "a.parquet", TABLE, {FINGERPRINT_KEY: b"mark"})
    content = (local / "a.parquet").read_bytes()
    found = []
    for at in range(len(content)):
        damaged = bytearray(content)
        damaged[at] ^= 1 << (at % 8)
        (local / "b.parquet").write_bytes(bytes(damaged))
        try:
            _, table = committed_parquet(local / "b.parquet")
        except IntegrityError:
            found.append(at)
        else:
            same = [column.to_pylist() for column in table.columns] == [c.to_pylist() for c in TABLE.columns]
            assert same or not table.schema.equals(TABLE.schema), at
    assert len(found) > len(content) / 4


def test_storage_that_fails_is_not_taken_for_damage(place: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(place / "a", TABLE)

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EBUSY, "SlowDown")

    monkeypatch.setattr(pq.ParquetFile, "read", fail)
    with pytest.raises(StorageError, match="throttled"):
        read_parquet(place / "a")


# --- storage that fails ---------------------------------------------------------------------------------------------


CALLS: dict[str, Callable[[Location, Path], object]] = {
    "read_bytes": lambda place, _: place.read_bytes(),
    "write_bytes": lambda place, _: place.write_bytes(b"x"),
    "create": lambda place, _: place.create(b"x"),
    "listed": lambda place, _: place.listed(),
    "put_folder": lambda place, folder: put_folder(place, folder),
    "read_parquet": lambda place, _: read_parquet(place),
    "committed_parquet": lambda place, _: committed_parquet(place),
    "parquet_rows": lambda place, _: parquet_rows(place),
    "write_parquet": lambda place, _: write_parquet(place, TABLE),
    "file_digest": lambda place, _: file_digest(place),
    "content_digest": lambda place, _: content_digest(place),
    "exists": lambda place, _: place.exists(),
    "remove": lambda place, _: place.remove(),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder to be put somewhere."""
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a").write_bytes(b"x")
    return tmp_path / "source"


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch) -> Iterator[Location]:
    """A file in a store where nobody listens."""
    names = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    for name, value in {**names, "AWS_MAX_ATTEMPTS": "1"}.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    place = Location.of("s3://bucket/run/a")
    place.fs.retries = 1
    yield place
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize("call", CALLS)
def test_a_disk_that_fails_is_a_storage_error(call: str, local: Location, folder: Path) -> None:
    local.write_bytes(b"a file where a folder should be")
    if call in ("exists", "remove"):
        assert not CALLS[call](local / "a", folder)
        return
    with pytest.raises(StorageError, match=rf"{local}/a: .*(Not a dir|File ex).*The same command continues") as caught:
        CALLS[call](local / "a", folder)
    assert isinstance(caught.value.__cause__, NotADirectoryError | FileExistsError)


@pytest.mark.parametrize("call", CALLS)
def test_a_store_that_is_away_is_a_storage_error(call: str, unreachable: Location, folder: Path) -> None:
    with pytest.raises(StorageError, match=r"s3://bucket/run/a: unreachable: .*The same command continues") as caught:
        CALLS[call](unreachable, folder)
    assert isinstance(caught.value.__cause__, BotoCoreError)


def test_of_a_path_that_the_user_gave_it_is_the_users_mistake(unreachable: Location, local: Location) -> None:
    with pytest.raises(OutputError, match="x cannot be used: unreachable") as caught, user_errors("x", OutputError):
        unreachable.read_bytes()
    assert "The same command" not in str(caught.value)
    local.write_bytes(b"")
    with pytest.raises(OutputError, match="x cannot be used: NotADirectoryError"), user_errors("x", OutputError):
        (local / "a").read_bytes()
    with pytest.raises(OutputError, match="x cannot be used: it does not exist"), user_errors("x", OutputError):
        (local.parent / "nothing").read_bytes()


@pytest.mark.parametrize("call", ["read_bytes", "committed_parquet", "file_digest", "content_digest"])
def test_a_file_that_is_not_there_is_not_found(call: str, place: Location, folder: Path) -> None:
    place.write_bytes(b"x")
    with pytest.raises(FileNotFoundError):
        CALLS[call](place.parent / "nothing", folder)


def test_leftovers_in_a_store_that_is_away_stay(unreachable: Location, caplog: pytest.LogCaptureFixture) -> None:
    remove_leftovers(unreachable)
    assert "parts of incomplete uploads, if there are any, stay" in caplog.text


# --- digests ---------------------------------------------------------------------------------------------------------


def test_a_digest_depends_on_the_value_and_not_on_the_order_of_names() -> None:
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
    assert len({digest(value) for value in (1, "1", [1], {"1": 1}, None, 1.5, [1, None])}) == 7


def test_a_file_digest_changes_with_the_content(local: Location) -> None:
    (local / "a").write_bytes(b"content")
    assert file_digest(local / "a") == hashlib.sha256(b"content").hexdigest()


def test_a_large_file_is_read_once_for_all_processes(
    local: Location, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as neither it nor its times change, and not if it was changed a moment ago."""
    monkeypatch.setattr(files, "_KEPT_FROM_BYTES", 5)
    monkeypatch.setenv("DAVIR_RAY_CACHE", str(tmp_path / "cache"))
    read: list[str] = []
    compute = files.content_digest
    monkeypatch.setattr(files, "content_digest", lambda place: (read.append(place.path), compute(place))[1])
    place, settled = local / "a", files._SETTLED_NS

    def digest_in_a_new_process() -> str:
        files._KNOWN.clear()
        return file_digest(place)

    for content in (b"content", b"another"):
        place.write_bytes(content)
        monkeypatch.setattr(files, "_SETTLED_NS", settled)
        assert [digest_in_a_new_process() for _ in range(2)] == [hashlib.sha256(content).hexdigest()] * 2
        assert len(read) == 2  # it is too new
        monkeypatch.setattr(files, "_SETTLED_NS", -settled)
        assert [digest_in_a_new_process() for _ in range(3)] == [hashlib.sha256(content).hexdigest()] * 3
        assert len(read) == 3
        read.clear()
    for kept in (tmp_path / "cache" / "digests").iterdir():
        kept.write_text("torn")
    assert digest_in_a_new_process() == hashlib.sha256(b"another").hexdigest()
    monkeypatch.setenv("DAVIR_RAY_CACHE", str(local / "a"))  # not a folder
    assert digest_in_a_new_process() == hashlib.sha256(b"another").hexdigest()


def test_a_file_of_another_content_but_the_same_size_has_another_digest(local: Location) -> None:
    (local / "a").write_bytes(b"one")
    first = file_digest(local / "a")
    time.sleep(0.02)
    (local / "a").write_bytes(b"two")
    assert file_digest(local / "a") != first == hashlib.sha256(b"one").hexdigest()


def test_a_remote_file_digest_is_the_stores_etag(monkeypatch: pytest.MonkeyPatch) -> None:
    place = Location(fsspec.filesystem("memory"), "/bucket/key")
    for info, expected in [({"size": 3, "ETag": '"abc"'}, "3-abc"), ({"size": 3, "etag": "abd"}, "3-abd")]:
        monkeypatch.setattr(type(place.fs), "info", lambda _self, _path, info=info, **_: info)
        assert file_digest(place) == expected


def test_the_digest_is_of_the_file_that_a_link_points_to_now(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(name.encode())
        os.utime(tmp_path / name, ns=(0, 0))
    for name in ("a", "b"):
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to(tmp_path / name)
        assert file_digest(Location.of(tmp_path / "link")) == hashlib.sha256(name.encode()).hexdigest()
    with (tmp_path / "b").open("r+b") as file:  # in place, its time put back
        file.write(b"c")
    os.utime(tmp_path / "b", ns=(0, 0))
    assert file_digest(Location.of(tmp_path / "link")) == hashlib.sha256(b"c").hexdigest()


def test_a_missing_table_is_named(place: Location) -> None:
    with pytest.raises(IntegrityError, match=r"part-00000\.parquet is missing"):
        read_parquet(place / "part-00000.parquet")
