"""The shards that an unfinished stage has committed, each in a file of its own.

The file says all that a later driver needs to know of the shard. That driver need not read it, though: the one that
was told of the shard has noted its entry, and a listing tells whether the file is still the one that was written.
"""

import json
import logging
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import Self

import pyarrow as pa

from davir_ray.errors import IntegrityError
from davir_ray.run.files import FINGERPRINT_KEY, FileEntry, committed_parquet, digest, write_parquet
from davir_ray.run.location import FileInfo, Location, each
from davir_ray.text import one_line

log = logging.getLogger(__name__)

_NUMERICS_KEY = b"davir_numerics"
"""Key in the footer of a shard's file: the arithmetic that made it, as JSON."""

_SEAL_KEY = b"davir_seal"

_NOTED_EVERY_S = 5.0
"""Minimum of seconds between two notes; a later driver reads the shards that were committed since the last one."""

_NOTED_EVERY_SHARE = 0.01
"""Minimum of the time between two notes, as a share of the stage's time so far: under a thousand notes in a week."""


@dataclass(frozen=True, kw_only=True)
class CommittedShard:
    """A shard whose file is written; the last two are JSON."""

    entry: FileEntry
    statuses: dict[str, int]
    numerics: str
    fingerprint: str

    def to_json(self) -> str:
        """The shard as JSON, without the fingerprint, which is that of many."""
        return json.dumps({"entry": asdict(self.entry), "statuses": self.statuses, "numerics": self.numerics})

    @classmethod
    def from_json(cls, text: str, fingerprint: str) -> Self:
        """The shard of `to_json`."""
        fields = json.loads(text)
        return cls(**{**fields, "entry": FileEntry(**fields["entry"])}, fingerprint=fingerprint)


@dataclass(frozen=True, kw_only=True)
class ShardFolder:
    """The folder of a stage that makes one file of each shard."""

    place: Location
    schema: pa.Schema
    """Schema of the files; one of the columns is `status`."""
    fingerprint: str
    """What the content depends on, as JSON; it is in the footer of every file."""

    def commit(self, name: str, table: pa.Table, numerics: str) -> CommittedShard:
        """Write the file of a shard, atomically."""
        table = table.select(self.schema.names).cast(self.schema)
        footer = _sealed({FINGERPRINT_KEY: self.fingerprint.encode(), _NUMERICS_KEY: numerics.encode()})
        entry = write_parquet(self.place / name, table, footer)
        entry = replace(entry, mark=(self.place / name).info().mark)
        return CommittedShard(
            entry=entry, statuses=_count_statuses(table), numerics=numerics, fingerprint=self.fingerprint
        )

    def read(self, name: str, num_rows: int | None) -> CommittedShard | None:
        """The shard committed in a file; None if there is none, or if it is damaged or lacks rows.

        One that is damaged must be done again.
        """
        place = self.place / name
        try:
            entry, table = committed_parquet(place)
            metadata = table.schema.metadata or {}
            whole = table.schema.equals(self.schema) and num_rows in (None, table.num_rows)
            if not whole or _sealed(metadata) != metadata:
                raise IntegrityError(f"{table.num_rows} rows")
            return CommittedShard(
                entry=entry,
                statuses=_count_statuses(table),
                numerics=metadata[_NUMERICS_KEY].decode(),
                fingerprint=metadata[FINGERPRINT_KEY].decode(),
            )
        except FileNotFoundError:
            return None
        except (IntegrityError, KeyError, ValueError) as error:
            log.warning("%s is damaged (%s) and is done again", place, one_line(error))
            return None

    def committed(self, noted: dict[str, CommittedShard], rows: dict[str, int]) -> list[CommittedShard]:
        """All committed shards; only those are read that are not noted, or whose file is not the noted one any more."""
        there = self.place.listed()

        def shard_of(name: str) -> CommittedShard | None:
            shard = noted.get(name)
            if shard is not None and shard.entry.mark and FileInfo(shard.entry.bytes, shard.entry.mark) == there[name]:
                return shard
            return self.read(name, rows.get(name))

        found = each(shard_of, (name for name in there if name.endswith(".parquet")))
        return [shard for shard in found if shard is not None]


class CommitNotes:
    """Entries of committed shards, noted by the driver in files that are added to a folder as the stage goes on."""

    def __init__(self, folder: Location, fingerprint: str) -> None:
        self._folder = folder
        self._fingerprint = fingerprint
        self._pending: list[CommittedShard] = []
        self._started = self._last = time.monotonic()

    def read(self) -> dict[str, CommittedShard]:
        """The noted shards by name, without those of damaged notes."""
        notes = each(self._read_note, self._folder.names(".json"))
        return {shard.entry.name: shard for note in notes for shard in note}

    def add(self, shard: CommittedShard) -> None:
        """Note a shard, together with those that are added until the next note is due."""
        self._pending.append(shard)
        now = time.monotonic()
        if now - self._last > max(_NOTED_EVERY_S, _NOTED_EVERY_SHARE * (now - self._started)):
            self.write()

    def write(self) -> None:
        """Note now what was added."""
        if self._pending:
            body = {"fingerprint": self._fingerprint, "shards": [shard.to_json() for shard in self._pending]}
            name = f"{time.time_ns()}.json"  # unlike those of earlier drivers
            (self._folder / name).write_text(json.dumps({**body, "checksum": digest(body)}))
        self._pending, self._last = [], time.monotonic()

    def remove(self) -> None:
        """Remove all notes, of a stage that is complete."""
        self._folder.remove()

    def _read_note(self, name: str) -> list[CommittedShard]:
        try:
            body = json.loads((self._folder / name).read_bytes())
            checksum = body.pop("checksum")
            if digest(body) != checksum:
                raise ValueError("its checksum is another")
            return [CommittedShard.from_json(shard, body["fingerprint"]) for shard in body["shards"]]
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("%s is damaged (%s); the shards that it lists are read", self._folder / name, one_line(error))
            return []


def _sealed(footer: dict[bytes, bytes]) -> dict[bytes, bytes]:
    """Add a digest of a footer's entries to it, because page checksums do not cover the footer."""
    texts = [footer[key].decode(errors="replace") for key in (FINGERPRINT_KEY, _NUMERICS_KEY)]
    return {**footer, _SEAL_KEY: digest(texts).encode()}


def _count_statuses(table: pa.Table) -> dict[str, int]:
    """The number of rows of each status."""
    return dict(Counter(table["status"].to_pylist()))
