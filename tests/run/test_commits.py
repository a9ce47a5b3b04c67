"""What a later driver is told of committed shards is true, and it reads only what nobody could tell it."""

import json
import logging
import os
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from davir_ray.run import commits
from davir_ray.run.commits import CommitNotes, CommittedShard, ShardFolder
from davir_ray.run.files import FINGERPRINT_KEY
from davir_ray.run.location import Location

SCHEMA = pa.schema([("value", pa.int64()), ("status", pa.string())])


def folder_of(place: Location) -> ShardFolder:
    return ShardFolder(place=place / "scores", schema=SCHEMA, fingerprint=json.dumps({"base": "abc"}))


def table(rows: int) -> pa.Table:
    return pa.table({"status": ["ok"] * rows, "value": range(rows), "more": ["x"] * rows})


def commit(folder: ShardFolder, *names: str) -> dict[str, CommittedShard]:
    return {name: folder.commit(name, table(3), "{}") for name in names}


def test_a_shard_is_read_as_it_was_committed(place: Location) -> None:
    folder = folder_of(place)
    shard = commit(folder, "a.parquet")["a.parquet"]
    assert shard.statuses == {"ok": 3}
    assert folder.read("a.parquet", 3) == shard
    assert CommittedShard.from_json(shard.to_json(), folder.fingerprint) == shard
    assert folder.read("b.parquet", 3) is None
    assert folder.read("a.parquet", 4) is None


def test_a_damaged_footer_is_told_from_other_settings(place: Location) -> None:
    """A bit of the fingerprint's text would otherwise look like a shard of other settings."""
    folder = folder_of(place)
    found = commit(folder, "a.parquet")["a.parquet"]
    assert json.loads(found.fingerprint) == {"base": "abc"}
    file = folder.place / "a.parquet"
    assert FINGERPRINT_KEY in file.read_bytes()
    file.write_bytes(file.read_bytes().replace(b'"abc"', b'"abd"'))
    assert folder.read("a.parquet", 3) is None


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the shards that were read."""
    names: list[str] = []
    before = ShardFolder.read

    def noted(self: ShardFolder, name: str, num_rows: int | None) -> CommittedShard | None:
        names.append(name)
        return before(self, name, num_rows)

    monkeypatch.setattr(ShardFolder, "read", noted)
    return names


def test_only_what_is_not_noted_or_has_changed_is_read(local: Location, read: list[str]) -> None:
    folder, notes = folder_of(local), CommitNotes(local / "notes", folder_of(local).fingerprint)
    shards = commit(folder, *(f"{name}.parquet" for name in "abcde"))
    for name in "abcd":
        notes.add(shards[f"{name}.parquet"])
    notes.write()
    os.utime(f"{folder.place.path}/b.parquet", (1, 1))  # a copy
    file = Path(f"{folder.place.path}/c.parquet")
    file.write_bytes(file.read_bytes()[:-9])
    os.remove(f"{folder.place.path}/d.parquet")
    rows = dict.fromkeys(shards, 3)
    found = folder.committed(CommitNotes(local / "notes", "").read(), rows)
    assert sorted(read) == ["b.parquet", "c.parquet", "e.parquet"]
    assert found == [shards["a.parquet"], shards["b.parquet"], shards["e.parquet"]]
    notes.remove()
    assert CommitNotes(local / "notes", "").read() == {}


def test_notes_are_written_every_few_seconds_and_ever_more_rarely(
    local: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(commits.time, "monotonic", lambda: now)
    shard = commit(folder_of(local), "a.parquet")["a.parquet"]
    notes, written = CommitNotes(local / "notes", "{}"), []
    for second in range(10_000):
        now = float(second)
        notes.add(replace(shard, entry=replace(shard.entry, name=f"{second}.parquet")))
        if second in (500, 9_999):
            written.append(len((local / "notes").names()))
    notes.write()
    assert written[0] == 500 // 6
    # From 500 s on each note is a hundredth of the time later: ln(20) / ln(1.01) = 301 of them.
    assert written[1] - written[0] == pytest.approx(301, abs=15)
    assert len(notes.read()) == 10_000


def test_a_damaged_note_is_as_none(local: Location, caplog: pytest.LogCaptureFixture) -> None:
    folder = folder_of(local)
    shards, notes = commit(folder, "a.parquet", "b.parquet"), CommitNotes(local / "notes", folder.fingerprint)
    for shard in shards.values():
        notes.add(shard)
        notes.write()
    first, second = sorted(Path((local / "notes").path).iterdir())
    first.write_text(first.read_text().replace('\\"rows\\": 3', '\\"rows\\": 4'))
    second.write_text(second.read_text()[:-30])
    with caplog.at_level(logging.WARNING):
        assert notes.read() == {}
    assert caplog.text.count("is damaged") == 2
    assert folder.committed({}, {"a.parquet": 3, "b.parquet": 3}) == list(shards.values())
