"""The forms of selected/ that a trainer reads: mixture/, repeated and shuffled, and jsonl/."""

from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from davir_ray.config.selection import SelectConfig
from davir_ray.engine.shards import Shards, read_columns
from davir_ray.engine.shuffle import Written, exchange, write_shards
from davir_ray.formulas.hashing import random_keys, seed_from
from davir_ray.run.files import FINGERPRINT_KEY, FileEntry, digest, total_rows, write_file, write_parquet
from davir_ray.run.folder import Run
from davir_ray.run.location import Location
from davir_ray.stages.select.plan import rows_with_text

BIN_ROWS = 50_000
"""Maximum number of rows with their text that one task shuffles and writes; about 100 MB."""


def write_mixture(
    run: Run, files: list[FileEntry], config: SelectConfig, schema: pa.Schema, fingerprint: dict[str, Any]
) -> list[FileEntry]:
    """Write mixture/: each selected row as often as its source's part says, in a random order; `schema` is selected/'s.

    A copy's place depends on (seed, example_id, number of the copy) alone, so the same mixture has the same bytes.
    """
    repeats = {part.source: part.repeat for part in config.mixture}
    num_bins = -(-total_rows(files) * max(repeats.values()) // rows_with_text(run, BIN_ROWS))
    return exchange(
        Shards(files, partial(read_columns, run / "selected", None)),
        partial(_repeat, repeats=repeats, seed=config.shuffle_seed, num_bins=num_bins),
        num_bins,
        partial(
            _write_bin,
            folder=run / "mixture",
            schema=schema,
            metadata={FINGERPRINT_KEY: digest(fingerprint).encode()},
        ),
    )


def _repeat(table: pa.Table, repeats: dict[str, int], seed: int, num_bins: int) -> pa.Table:
    """Every copy of every row, with its place in the random order and the bin of that place."""
    times = np.array([repeats[source] for source in table["source"].to_pylist()], dtype=np.int64)
    rows = np.repeat(np.arange(table.num_rows), times)
    copies = np.arange(len(rows)) - np.repeat(np.cumsum(times) - times, times)
    ids, places = np.asarray(table["example_id"])[rows], np.empty(len(rows), np.uint64)
    for copy in np.unique(copies):
        of_copy = copies == copy
        places[of_copy] = random_keys(ids[of_copy], seed_from("mixture", seed, int(copy)))
    numbers = np.minimum(places // np.uint64((2**64 - 1) // num_bins), np.uint64(num_bins - 1))
    table = table.take(pa.array(rows)).append_column("place", pa.array(places, pa.uint64()))
    return table.append_column("copy", pa.array(copies, pa.int64())).append_column("bin", pa.array(numbers, pa.int64()))


def _write_bin(
    number: int, rows: pa.Table, folder: Location, schema: pa.Schema, metadata: dict[bytes, bytes]
) -> FileEntry:
    # Two places are equal only by chance; then the id and the copy decide, in the same way in every run.
    by_place = np.lexsort(tuple(np.asarray(rows[name]) for name in ("copy", "example_id", "place")))
    table = rows.take(pa.array(by_place)).select(schema.names).cast(schema)
    return write_parquet(folder / f"part-{number:05d}.parquet", table, metadata)


def write_jsonl(run: Run, folder: str, files: list[FileEntry]) -> list[FileEntry]:
    """Write jsonl/: the source records of the rows of a folder, one a line, in the same order and file by file."""

    def write_lines(name: str, table: pa.Table) -> Written:
        content = "".join(f"{record}\n" for record in table["record"].to_pylist()).encode()
        return Written(write_file(run / "jsonl" / name.replace(".parquet", ".jsonl"), content, table.num_rows))

    records = Shards(files, partial(read_columns, run / folder, ["record"]))
    return [written.entry for written in write_shards(records, write_lines)]
