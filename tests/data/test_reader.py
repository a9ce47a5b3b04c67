"""Rows of examples and rejects: stable ids, shards, books that balance."""

import base64
import hashlib
import json
import math
from collections import Counter
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import duckdb
import numpy as np
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from davir_ray.config.sources import Source
from davir_ray.data import reader, shards
from davir_ray.data.files import Slice, list_files
from davir_ray.data.reader import (
    BYTES,
    NOT_FINITE,
    ExampleReader,
    ExampleRow,
    record_text,
    stable_id,
)
from davir_ray.data.records import Record, Reject, read_records
from davir_ray.data.shards import ShardWriter
from davir_ray.data.task_report import COUNTED, TaskReport
from davir_ray.data.tokens import Encoder
from davir_ray.run.files import committed_parquet, read_parquet
from davir_ray.run.location import Location
from davir_ray.schema import EXAMPLES, REJECTS, RejectReason

PARTS = st.lists(
    st.one_of(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), st.integers(0, 99)), max_size=4
)


@given(PARTS)
def test_an_id_is_the_first_63_bits_of_sha256_of_the_json(parts: list[str | int]) -> None:
    digest = hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode()).hexdigest()
    assert stable_id(*parts) == int(digest[:16], 16) // 2
    assert 0 <= stable_id(*parts) < 2**63


@given(PARTS, PARTS)
def test_ids_are_equal_exactly_where_the_parts_are(first: list[str | int], second: list[str | int]) -> None:
    assert (stable_id(*first) == stable_id(*second)) == (json.dumps(first) == json.dumps(second))


def test_an_id_tells_where_a_part_ends_and_a_number_from_its_digits() -> None:
    likely_to_collide = [("ab", "c"), ("a", "bc"), ("abc",), ("abc", ""), ("a", 1), ("a", "1"), ("a1",), ("a", "1", "")]
    assert len({stable_id(*parts) for parts in likely_to_collide}) == len(likely_to_collide)


def test_an_id_is_the_same_in_every_version() -> None:
    assert stable_id() == 0x4F53CDA18C2BAA0C0354BB5F9A3ECBE5ED12AB4D8E11BA873C2F11161202B945 >> 193


def read_all(
    tokenizer: PreTrainedTokenizerFast, folder: Path, lines: list[str], limit: int | None = None, **options: Any
) -> list[ExampleRow | Reject]:
    folder.mkdir(exist_ok=True)
    (folder / "f.jsonl").write_text("\n".join(lines))
    source = Source(name="s", path=str(folder), format="prompt_response")
    reader = ExampleReader(Encoder(tokenizer, max_tokens=40), None, **{"keep_record": True, **options})
    items = reader.read(source, [Slice(file) for file in list_files(source)], limit)
    return [item if isinstance(item, Reject) else one(*item) for item in items]


def one(row: ExampleRow) -> ExampleRow:
    """The row of a record that is one example."""
    return row


def line_of(prompt: str, response: str, **more: Any) -> str:
    return json.dumps({"prompt": prompt, "response": response, **more}, ensure_ascii=False)


def test_every_line_is_an_example_or_a_reject_in_its_place(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    lines = [line_of("q", "a"), "{", line_of("q", " "), line_of("q" * 200, "a"), "[]", line_of("q", "b" * 200)]
    found = read_all(tokenizer, tmp_path, lines)
    reasons = [item.reason.value if isinstance(item, Reject) else None for item in found]
    assert reasons == [None, "broken_json", "empty_response", "prompt_too_long", "not_an_object", None]
    rows = [item.source_row if isinstance(item, Reject) else item["source_row"] for item in found]
    assert rows == list(range(6))
    first, last = found[0], found[-1]
    assert isinstance(first, dict)
    assert isinstance(last, dict)
    assert not first["truncated"]
    assert last["truncated"]
    assert len(last["input_ids"]) == 40


def test_a_row_has_exactly_the_columns_of_the_schema(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (row,) = read_all(tokenizer, tmp_path, [line_of("Frage?", "Bär", more=[1])])
    assert isinstance(row, dict)
    assert list(row) == EXAMPLES.names
    assert (row["source"], row["source_file"], row["prompt"], row["response"]) == ("s", "f.jsonl", "Frage?", "Bär")
    assert json.loads(row["record"]) == {"prompt": "Frage?", "response": "Bär", "more": [1]}
    start, end = row["response_spans"]
    assert (row["num_prompt_tokens"], row["num_response_tokens"]) == (start, end - start)
    assert tokenizer.decode(row["input_ids"]) == "<s>Frage?Bär</s>"


PLAIN = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.text()
OTHERS = (
    st.floats() | st.binary() | st.dates() | st.datetimes() | st.times() | st.uuids() | st.decimals(allow_nan=False)
)
VALUES = st.recursive(
    PLAIN | OTHERS,
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


def in_json(value: Any, seen: Counter[str]) -> Any:
    """What a reader of JSON finds in place of a value; `seen` counts those that it cannot find."""
    match value:
        case float():
            seen["numbers"] += not math.isfinite(value)
            return value if math.isfinite(value) else None
        case bytes():
            seen["bytes"] += 1
            return base64.standard_b64encode(value).decode("ascii")
        case datetime():
            return str(value).replace(" ", "T")
        case date() | time() | UUID() | Decimal():
            return str(value)
        case list() | tuple():
            return [in_json(item, seen) for item in value]
        case dict():
            return {name: in_json(item, seen) for name, item in value.items()}
        case _:
            return value


@settings(max_examples=50)
@given(st.dictionaries(st.text(), VALUES, max_size=4))
def test_a_record_is_json_that_strict_readers_take(fields: dict[str, Any]) -> None:
    replaced, seen = Counter[str](), Counter[str]()
    text = record_text(Record("f", 0, fields), replaced)
    assert json.loads(text, parse_constant=refuse) == in_json(fields, seen)
    assert (replaced[NOT_FINITE], replaced[BYTES]) == (seen["numbers"], seen["bytes"])
    assert replaced.keys() <= {NOT_FINITE, BYTES}


def test_each_value_is_counted_once() -> None:
    replaced = Counter[str]()
    assert record_text(Record("f", 0, {"a": b"a", "b": math.nan, "c": [b"b"]}), replaced) == (
        '{"a": "YQ==", "b": null, "c": ["Yg=="]}'
    )
    assert replaced == {BYTES: 2, NOT_FINITE: 1}


def test_records_of_arrow_are_read_back_by_other_readers(tmp_path: Path) -> None:
    """Every type of column that Parquet has, nested too."""
    moment = datetime(2024, 1, 2, 3, 4, 5, 678900)
    columns = {
        "half": pa.array(np.array([1.5, np.nan, np.inf], np.float16)),
        "single": pa.array([0.5, float("nan"), None], pa.float32()),
        "deep": pa.array([[{"x": float("-inf")}], [], None], pa.list_(pa.struct({"x": pa.float64()}))),
        "pairs": pa.array([[("a", b"\xff")], [], None], pa.map_(pa.string(), pa.binary())),
        "bytes": pa.array([b"", b"\x00\xff", None], pa.large_binary()),
        "fixed": pa.array([b"ab", b"cd", None], pa.binary(2)),
        "day": pa.array([date(2024, 1, 2)] * 3),
        "moment": pa.array([moment] * 3, pa.timestamp("us", "UTC")),
        "nanos": pa.array([1] * 3, pa.timestamp("ns")),
        "hour": pa.array([time(1, 2, 3)] * 3),
        "took": pa.array([timedelta(seconds=1)] * 3),
        "price": pa.array([Decimal("1.50")] * 3),
        "id": pa.array([bytes(16)] * 3, pa.uuid()),
        "large": pa.array([2**64 - 1] * 3, pa.uint64()),
        "word": pa.array(["é\u2028\x00", "b", "b"]).dictionary_encode(),
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    source, replaced = Source(name="s", path=str(tmp_path), format="alpaca"), Counter[str]()
    records = [record for file in list_files(source) for record in read_records(Slice(file))]
    texts = [record_text(record, replaced) for record in records if isinstance(record, Record)]
    assert replaced == {NOT_FINITE: 4, BYTES: 5}
    (tmp_path / "a.jsonl").write_text("\n".join(texts), encoding="utf-8")
    by_json = [json.loads(text, parse_constant=refuse) for text in texts]
    by_polars = polars.read_ndjson(tmp_path / "a.jsonl", infer_schema_length=None)
    by_duckdb = duckdb.sql(f"SELECT * FROM read_json('{tmp_path / 'a.jsonl'}', format='newline_delimited')").fetchall()
    assert by_polars.columns == list(columns) and len(by_duckdb) == len(by_json) == by_polars.height == 3
    assert by_polars["half"].to_list() == [row[0] for row in by_duckdb] == [1.5, None, None]
    assert [row["bytes"] and base64.b64decode(row["bytes"]) for row in by_json] == ["", b"\x00\xff", None]
    first = by_json[0]
    assert datetime.fromisoformat(first["moment"]).timestamp() == moment.replace(tzinfo=UTC).timestamp()
    assert (first["deep"], first["pairs"], first["day"], first["price"]) == (
        [{"x": None}], [["a", "/w=="]], "2024-01-02", "1.50",
    )  # fmt: skip
    assert (first["large"], first["word"], first["id"]) == (2**64 - 1, "é\u2028\x00", str(UUID(int=0)))


def test_numbers_that_json_lacks_are_null_in_the_record(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Python's reader takes them, and numbers too large to be finite."""
    (row,) = read_all(tokenizer, tmp_path, ['{"prompt": "q", "response": "NaN", "more": [NaN, -Infinity, 1e999, 1.5]}'])
    assert isinstance(row, dict)
    assert json.loads(row["record"], parse_constant=refuse) == {
        "prompt": "q", "response": "NaN", "more": [None, None, None, 1.5],
    }  # fmt: skip


def test_the_record_is_kept_only_if_wanted(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (row,) = read_all(tokenizer, tmp_path, [line_of("q", "a")], keep_record=False)
    assert isinstance(row, dict)
    assert row["record"] is None


@pytest.mark.parametrize("limit", [0, 1, 3, None])
def test_a_limit_counts_rejects_too(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, limit: int | None) -> None:
    lines = ["{", line_of("q", "a"), line_of("q", ""), line_of("q", "b")]
    whole = read_all(tokenizer, tmp_path, lines)
    found = read_all(tokenizer, tmp_path, lines, limit=limit)
    assert len(found) == (len(lines) if limit is None else limit)
    assert [isinstance(item, Reject) for item in found] == [isinstance(item, Reject) for item in whole[: len(found)]]


def test_rows_stay_in_step_over_many_batches(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [line_of(f"q{n}", f"a{n}") if n % 3 else "{" for n in range(40)]
    expected = read_all(tokenizer, tmp_path, lines)
    monkeypatch.setattr(reader, "BATCH_ROWS", 7)
    found = read_all(tokenizer, tmp_path, lines)
    for number, (item, other) in enumerate(zip(found, expected, strict=True)):
        if number % 3:
            assert isinstance(item, dict)
            assert isinstance(other, dict)
            assert tokenizer.decode(item["input_ids"]) == f"<s>q{number}a{number}</s>"
            assert item["example_id"] == other["example_id"] == stable_id("s", "f.jsonl", number)
        else:
            assert item == other


def test_an_id_says_where_a_row_stands_and_a_hash_what_it_says(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    here = read_all(tokenizer, tmp_path / "here", [line_of("q", "a"), line_of("q", "a"), line_of("q", "b")])
    moved = read_all(tokenizer, tmp_path / "there", [line_of("q", "a", more=1)])
    rows = [item for item in (*here, *moved) if isinstance(item, dict)]
    ids, hashes = ([row[name] for row in rows] for name in ("example_id", "content_hash"))
    digest = hashlib.sha256(json.dumps([rows[0]["prompt"], rows[0]["response"]]).encode()).hexdigest()
    assert rows[0]["prompt"] and hashes[0] == int(digest[:16], 16) // 2, "of both texts, as the schema says"
    assert len(set(ids[:3])) == 3
    assert ids[3] == ids[0]
    assert hashes[0] == hashes[1] == hashes[3] != hashes[2]


def test_a_hash_tells_where_the_response_begins(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    first, second = read_all(tokenizer, tmp_path, [line_of("ab", "c"), line_of("a", "bc")])
    assert isinstance(first, dict)
    assert isinstance(second, dict)
    assert first["content_hash"] != second["content_hash"]


# --- shards ----------------------------------------------------------------------------------------------------------


def row_of(number: int) -> ExampleRow:
    return {
        "example_id": number,
        "content_hash": 5,
        "source": "s",
        "source_file": "f.jsonl",
        "source_row": number,
        "prompt": "q",
        "response": "a",
        "record": None,
        "input_ids": np.arange(3 + number, dtype=np.int32),
        "response_spans": [2, 3 + number],
        "num_prompt_tokens": 2,
        "num_response_tokens": 1 + number,
        "truncated": number % 2 == 1,
    }


def rejects() -> list[Reject]:
    reasons = [RejectReason.BROKEN_JSON, RejectReason.EMPTY_RESPONSE, RejectReason.BROKEN_JSON]
    return [
        Reject(source_file="f.jsonl", source_row=100 + at, reason=reason, detail=f"detail {at}")
        for at, reason in enumerate(reasons)
    ]


def write(
    run: Location, num_rows: int, shard_rows: int = 4, bad: list[Reject] | None = None, **limits: int
) -> TaskReport:
    writer = ShardWriter(run, task=7, source="s", shard_rows=shard_rows, **limits)
    for number in range(num_rows):
        writer.write((row_of(number),))
    for reject in bad or []:
        writer.write(reject)
    return writer.finish()


@pytest.mark.parametrize("num_rows", [0, 1, 4, 9])
def test_every_row_lies_in_one_shard_and_the_books_say_so(tmp_path: Path, num_rows: int) -> None:
    run = Location.of(tmp_path)
    report = write(run, num_rows, bad=rejects())
    *shards, rejected = report.files
    assert report.num_read == num_rows + 3
    assert [entry.name for entry in shards] == [
        f"examples/part-00007-{shard:05d}.parquet" for shard in range(-(-num_rows // 4))
    ]
    tables = [read_parquet(run / entry.name) for entry in shards]
    assert all(table.schema.equals(EXAMPLES) for table in tables)
    assert [row for table in tables for row in table["source_row"].to_pylist()] == list(range(num_rows))
    for column in COUNTED:
        assert report.sums[column] == sum(row_of(number)[column] for number in range(num_rows))
    for entry in report.files:
        described, _ = committed_parquet(run / entry.name)
        assert (described.rows, described.bytes, described.sha256) == (entry.rows, entry.bytes, entry.sha256)
    assert rejected.name == "rejects/part-00007-00000.parquet"


def test_rejects_are_kept_and_counted_by_reason(tmp_path: Path) -> None:
    run = Location.of(tmp_path)
    report = write(run, 0, bad=rejects())
    table = read_parquet(run / "rejects/part-00007-00000.parquet")
    assert table.schema.equals(REJECTS)
    assert table.to_pylist() == [{"source": "s", **vars(r), "reason": r.reason.value} for r in rejects()]
    assert report.reasons == {"broken_json": 2, "empty_response": 1}
    assert report.first_reject == "f.jsonl row 100: broken_json (detail 0)"


def test_a_task_without_rows_writes_nothing(tmp_path: Path) -> None:
    assert write(Location.of(tmp_path), 0).files == []
    assert list(tmp_path.iterdir()) == []


def test_a_shard_of_long_rows_is_cut_before_its_number_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_tokens = write(Location.of(tmp_path / "tokens"), 9, shard_rows=1000, shard_tokens=30)
    assert [entry.rows for entry in by_tokens.files] == [6, 3]
    monkeypatch.setattr(shards, "_SHARD_CHARACTERS", 6)
    by_characters = write(Location.of(tmp_path / "characters"), 9, shard_rows=1000)
    assert [entry.rows for entry in by_characters.files] == [3, 3, 3]


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = (write(Location.of(tmp_path / name), 9, bad=rejects()) for name in ("a", "b"))
    assert first.files == second.files


def test_reports_add_up_and_survive_their_text(tmp_path: Path) -> None:
    first = write(Location.of(tmp_path / "a"), 5, bad=rejects()[:1])
    second = write(Location.of(tmp_path / "b"), 3, bad=rejects()[1:])
    assert TaskReport.from_json(first.to_json()) == first
    total = TaskReport()
    total += first
    total += TaskReport.from_json(second.to_json())
    assert total.num_read == 6 + 5
    assert total.reasons == {"broken_json": 2, "empty_response": 1}
    assert sum(entry.rows for entry in total.files if entry.name.startswith("examples/")) == 8
    assert total.sums["num_response_tokens"] == first.sums["num_response_tokens"] + second.sums["num_response_tokens"]
    assert total.first_reject == first.first_reject
    assert total.sums["text_bytes"] == first.sums["text_bytes"] + second.sums["text_bytes"] > 0


@pytest.mark.parametrize("many", [3, 100])
def test_the_text_of_a_row_is_the_mean_of_a_shard_that_is_not_small(
    tmp_path: Path, many: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "_MANY_ROWS", many)
    report = write(Location.of(tmp_path), 9, shard_rows=5)
    tables = [read_parquet(Location.of(tmp_path) / entry.name) for entry in report.files]
    sizes = [sum(table[name].nbytes for name in ("prompt", "response", "record")) for table in tables]
    assert report.sums["text_bytes"] == pytest.approx(sum(sizes), rel=0.3)
    assert (report.text_bytes_per_row > 0) == (many == 3)
