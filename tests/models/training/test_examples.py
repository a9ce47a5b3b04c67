"""The training data in files: what a worker maps is what the tables hold, and nobody holds all of it in memory."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from process_memory import anonymous_bytes

from davir_ray.errors import DataError
from davir_ray.models.training.examples import TrainingSet, write_examples
from davir_ray.run.location import each_in_turn

SCHEMA = pa.schema(
    [("example_id", pa.int64()), ("input_ids", pa.list_(pa.int32())), ("response_spans", pa.list_(pa.int32()))]
)


def test_what_is_mapped_is_what_the_tables_hold(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    rows = []
    for number in range(60):
        length = int(draw.integers(3, 40))
        spans = [[], [0, 2], [1, 3], [1, 2, length - 1, length]][number % 4 if length > 3 else 2]
        rows.append(
            {
                "example_id": number - 30,
                "input_ids": draw.integers(0, 2**31 - 1, length).tolist(),
                "response_spans": spans,
            }
        )
    tables = [pa.Table.from_pylist(rows[at:end], SCHEMA) for at, end in ((0, 7), (7, 7), (7, 8), (8, 60))]
    write_examples(tmp_path, tables)
    found = TrainingSet.mapped(tmp_path)
    for file in tmp_path.iterdir():  # as a worker's node does it
        file.unlink()
    kept = [row for row in rows if row["response_spans"][:1] > [0]]
    assert found.ids.tolist() == [row["example_id"] for row in kept]
    assert found.lengths.tolist() == [len(row["input_ids"]) for row in kept]
    assert len(kept) < len(rows)
    pack = found.pack(np.arange(len(kept))[::-1])
    assert pack.input_ids_T.tolist() == [token for row in reversed(kept) for token in row["input_ids"]]
    scored = []
    for row in reversed(kept):
        spans = row["response_spans"]
        for start, end in zip(spans[::2], spans[1::2], strict=True):
            scored += row["input_ids"][start:end]
    assert pack.targets_R.tolist() == scored
    assert found.weight(np.arange(len(kept))) == len(scored)


def test_no_example_is_told_by_name(tmp_path: Path) -> None:
    row = {"example_id": 1, "input_ids": [1, 2], "response_spans": [0, 2]}
    with pytest.raises(DataError, match="no example can be trained on"):
        write_examples(tmp_path, [pa.Table.from_pylist([row], SCHEMA)])


def test_a_training_set_is_in_no_memory_but_the_page_cache(tmp_path: Path) -> None:
    """A quarter of a gigabyte is written and read, and this process grows by a fraction."""
    num_shards, rows, length = 64, 1000, 1000
    grown = []

    def shards() -> Iterator[pa.Table]:
        for number in range(num_shards):
            tokens = pa.array(np.arange(number, number + rows * length, dtype=np.int32))
            edges = pa.array(np.arange(0, rows * length + 1, length, dtype=np.int32))
            spans = pa.ListArray.from_arrays(
                np.arange(0, 2 * rows + 1, 2, dtype=np.int32), pa.array([1, 9] * rows, pa.int32())
            )
            ids = pa.array(np.arange(number * rows, (number + 1) * rows))
            yield pa.table([ids, pa.ListArray.from_arrays(edges, tokens), spans], schema=SCHEMA)
            grown.append(anonymous_bytes() - before)

    before = anonymous_bytes()
    write_examples(tmp_path, shards())
    found = TrainingSet.mapped(tmp_path)
    draw = np.random.default_rng(0)
    for _ in range(100):
        found.pack(draw.integers(0, num_shards * rows, 8))
    assert found.tokens.nbytes == 4 * num_shards * rows * length == os.stat(tmp_path / "tokens").st_size
    assert max(*grown, anonymous_bytes() - before) < found.tokens.nbytes / 4


def test_results_come_in_turn_and_few_are_ahead() -> None:
    begun: list[int] = []
    found = each_in_turn(lambda item: (begun.append(item), item * item)[1], range(200))
    assert next(found) == 0
    assert len(begun) < 40
    assert list(found) == [item * item for item in range(1, 200)]
    assert sorted(begun) == list(range(200))
