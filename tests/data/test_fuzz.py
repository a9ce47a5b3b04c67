"""Whatever a row holds and wherever it stands, it comes out once: as an example or as a reject with a reason."""

import gzip
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import hostile
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from davir_ray.config.sources import Source
from davir_ray.data.files import Slice, list_files
from davir_ray.data.reader import ExampleReader, ExampleRows
from davir_ray.data.records import Record, Reject
from davir_ray.data.tokens import Encoder
from davir_ray.schema import RejectReason

MAX_TOKENS = 200
ROWS_A_FILE = 60
NUM_FILES = 400
_ROWS: Counter[str] = Counter()


@pytest.fixture(scope="module", autouse=True)
def at_least_ten_thousand_rows() -> Iterator[None]:
    """The promise of this module."""
    yield
    assert _ROWS["read"] >= 10_000
    assert min(_ROWS["examples"], _ROWS["rejects"]) > 2_000


@pytest.fixture(scope="module")
def reader(tokenizer: PreTrainedTokenizerFast) -> ExampleReader:
    return ExampleReader(Encoder(tokenizer, MAX_TOKENS), None, keep_record=True)


def read(reader: ExampleReader, path: Path) -> list[ExampleRows | Reject]:
    source = Source(name="s", path=str(path), format="alpaca")
    return list(reader.read(source, [Slice(file) for file in list_files(source)], None))


def check(item: ExampleRows | Reject) -> None:
    """An example can be scored, a reject says why it is one."""
    if isinstance(item, Reject):
        assert item.reason in set(RejectReason)
        assert item.detail.encode()
        return
    (row,) = item
    assert 0 < len(row["input_ids"]) <= MAX_TOKENS
    assert row["response"].strip()
    (start, end), *more = zip(row["response_spans"][::2], row["response_spans"][1::2], strict=True)
    assert not more
    assert 0 < start < end == len(row["input_ids"])
    assert row["num_response_tokens"] == end - start
    for name in ("prompt", "response", "record"):
        assert row[name].encode()


@settings(max_examples=NUM_FILES, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**32), st.booleans())
def test_every_line_comes_out_once(reader: ExampleReader, tmp_path: Path, seed: int, packed: bool) -> None:
    content = hostile.lines(random.Random(seed), ROWS_A_FILE)
    path = tmp_path / f"rows.jsonl{'.gz' if packed else ''}"
    path.write_bytes(gzip.compress(content) if packed else content)
    items = read(reader, path)
    path.unlink()
    rows = [item.source_row if isinstance(item, Reject) else item[0]["source_row"] for item in items]
    wanted = [number for number, line in enumerate(content.split(b"\n")) if line.strip()]
    assert rows == (wanted or [0])
    for item in items:
        check(item)
    _ROWS["read"] += len(items)
    _ROWS["rejects"] += sum(isinstance(item, Reject) for item in items)
    _ROWS["examples"] += sum(not isinstance(item, Reject) for item in items)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=300)
@given(
    st.fixed_dictionaries(
        {}, optional={name: JSON | st.text(max_size=300) for name in ("instruction", "input", "output")}
    )
)
def test_any_record_is_an_example_or_a_reject(reader: ExampleReader, fields: dict[str, object]) -> None:
    source = Source(name="s", path="unused", format="alpaca")
    record = Record("f", 0, fields)
    (item,) = reader.convert(source, [record])
    check(item)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=400), st.sampled_from(["a.jsonl", "a.json", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"]))
def test_any_bytes_end_in_rows_and_rejects(reader: ExampleReader, tmp_path: Path, content: bytes, name: str) -> None:
    (tmp_path / name).write_bytes(content)
    for item in read(reader, tmp_path / name):
        check(item)
    (tmp_path / name).unlink()
