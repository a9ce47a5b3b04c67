"""Files → records: every row once, every bad row with its reason, whatever is in the files."""

import codecs
import csv
import errno
import gzip
import json
import logging
import os
import random
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from datetime import date
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import accumulate, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import fsspec
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from huggingface_hub import HfFileSystem
from hypothesis import example, given, settings
from hypothesis import strategies as st

from davir_ray.config.sources import Source
from davir_ray.data import files as sources
from davir_ray.data.files import (
    Slice,
    SourceFile,
    list_files,
    plan_tasks,
)
from davir_ray.data.records import Record, Reject, count_lines, read_records
from davir_ray.errors import DataError, StorageError
from davir_ray.schema import RejectReason

PACK: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}
ROWS = [{"instruction": f"say {i}", "output": "é" * i} for i in range(5)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def source(path: Any, split: str = "train") -> Source:
    return Source(name="s", path=path if isinstance(path, list) else str(path), format="alpaca", split=split)


def read_path(path: Any, **options: Any) -> list[Record | Reject]:
    return [row for file in list_files(source(path, **options)) for row in read_records(Slice(file))]


def fields(rows: list[Record | Reject]) -> list[dict[str, Any]]:
    assert all(isinstance(row, Record) for row in rows), rows
    return [row.fields for row in rows if isinstance(row, Record)]


def reasons(rows: Iterable[Record | Reject]) -> list[tuple[int, RejectReason]]:
    rejects = [row for row in rows if isinstance(row, Reject)]
    return [(row.source_row, row.reason) for row in rejects]


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def read_lines(tmp_path: Path, content: bytes) -> list[tuple[Any, ...]]:
    """(row, fields or reason) of a JSONL file."""
    rows = read_path(write(tmp_path / "a.jsonl", content))
    return [(row.source_row, row.fields if isinstance(row, Record) else row.reason) for row in rows]


# --- formats ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stem", ["a.jsonl", "a.ndjson", "a.json", "array.json", "A.JSONL"])
@pytest.mark.parametrize("extension", PACK)
def test_every_text_layout_gives_the_same_records(tmp_path: Path, stem: str, extension: str) -> None:
    content = json.dumps(ROWS, indent=1).encode() if stem.startswith("array") else LINES
    rows = read_path(write(tmp_path / (stem + extension), PACK[extension](content)))
    assert rows == [Record(stem + extension, index, row) for index, row in enumerate(ROWS)]


@pytest.mark.parametrize("extension", [".gz", ".zst"])
def test_concatenated_compressed_files_are_read_to_the_end(tmp_path: Path, extension: str) -> None:
    path = write(tmp_path / f"a.jsonl{extension}", PACK[extension](LINES) * 2)
    assert fields(read_path(path)) == ROWS + ROWS


def test_parquet_gives_plain_python_and_nulls(tmp_path: Path) -> None:
    rows = [
        {
            "text": "a",
            "n": 2**60,
            "tags": ["x", None],
            "chat": [{"role": "user", "content": "é"}],
            "day": date(2024, 1, 2),
        },
        {"text": None, "n": None, "tags": [], "chat": None, "day": None},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert fields(read_path(tmp_path)) == rows


def test_a_dataset_written_by_save_to_disk(tmp_path: Path) -> None:
    whole = datasets.Dataset.from_list(ROWS)
    whole.select([4, 0, 2]).save_to_disk(tmp_path / "one", num_shards=2)
    assert fields(read_path(tmp_path / "one")) == [ROWS[4], ROWS[0], ROWS[2]]
    many = datasets.DatasetDict(train=whole.select(range(3)), test=whole.select([4]))
    many.save_to_disk(tmp_path / "many")
    assert fields(read_path(tmp_path / "many")) == ROWS[:3]
    assert read_path(tmp_path / "many", split="test") == [Record("test/data-00000-of-00001.arrow", 0, ROWS[4])]
    with pytest.raises(DataError, match=r"no split 'dev'; set split to one of train, test"):
        read_path(tmp_path / "many", split="dev")
    with pytest.raises(DataError, match=r"split of source 's' is 'test', but .*one has no splits"):
        read_path(tmp_path / "one", split="test")


@pytest.mark.parametrize("name", ["a.jsonl", "", "*.jsonl"])
def test_a_split_of_files_that_have_none_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"n": 1}\n')
    assert len(read_path(tmp_path / name)) == 1
    with pytest.raises(DataError, match="split of source 's' is 'test', but"):
        read_path(tmp_path / name, split="test")


@pytest.mark.parametrize("extension", PACK)
@pytest.mark.parametrize("stem", ["a.jsonl", "array.json"])
def test_files_of_editors_with_a_mark_and_crlf_give_the_same_records(tmp_path: Path, stem: str, extension: str) -> None:
    rows = [*ROWS, {"instruction": "keep\r\n", "output": "\ufeffboth"}]
    content = json.dumps(rows, indent=1) if stem.startswith("array") else "\n".join(map(json.dumps, rows))
    saved = content.replace("\n", "\r\n").encode("utf-8-sig")
    assert fields(read_path(write(tmp_path / (stem + extension), PACK[extension](saved)))) == rows


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
def test_utf16_is_refused_by_name(tmp_path: Path, name: str, encoding: str) -> None:
    content = ("\ufeff" if encoding == "utf-16-be" else "") + LINES.decode()
    write(tmp_path / name, PACK[Path(name).suffix.replace(".jsonl", "").replace(".json", "")](content.encode(encoding)))
    with pytest.raises(DataError, match=rf"{name} is UTF-16; save it as UTF-8"):
        read_path(tmp_path)


TALKS = [
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hé😀 1.1"}]},
    {"messages": [
        {"role": "assistant", "content": "", "tool_calls": [{"name": "w", "arguments": {"city": "Oslo"}}]},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "s", "arguments": {"x": [1, "a"]}}]},
        {"role": "tool", "content": None, "arguments": {"x": 0.1, "deep": [{"y": None}, 2**53 + 1]}},
    ]},
]  # fmt: skip
"""Values of no one type, which `datasets` (5) keeps as JSON."""


def test_the_type_json_of_datasets_gives_the_records_of_the_source(tmp_path: Path) -> None:
    lines = write(tmp_path / "lines" / "a.jsonl", "".join(json.dumps(talk) + "\n" for talk in TALKS).encode())
    loaded = datasets.load_dataset("json", data_files=str(lines), split="train", cache_dir=str(tmp_path / "cache"))
    assert "Json" in str(loaded.features)
    loaded.save_to_disk(tmp_path / "saved")
    loaded.to_parquet(tmp_path / "table" / "a.parquet")
    assert TALKS == fields(read_path(lines)) == list(loaded)
    assert fields(read_path(tmp_path / "saved")) == fields(read_path(tmp_path / "table")) == TALKS


@settings(max_examples=50)
@given(
    rows=st.lists(
        st.none()
        | st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
            max_leaves=5,
        ),
        min_size=1,
    ),
    at=st.sampled_from(["column", "list", "struct", "large list", "list of structs", "map"]),
)
def test_json_is_decoded_wherever_it_stands(tmp_path_factory: pytest.TempPathFactory, rows: list[Any], at: str) -> None:
    """As the file holds it beside other values, which stay: a text that reads like JSON, too."""
    kinds: dict[str, tuple[Callable[[pa.DataType], pa.DataType], Callable[[Any], Any]]] = {
        "column": (lambda kind: kind, lambda value: value),
        "list": (pa.list_, lambda value: [value, None]),
        "large list": (lambda kind: pa.large_list(pa.list_(kind)), lambda value: [[value], None, []]),
        "struct": (lambda kind: pa.struct({"j": kind, "t": pa.string()}), lambda value: {"j": value, "t": "1"}),
        "list of structs": (lambda kind: pa.list_(pa.struct({"j": kind})), lambda value: [{"j": value}, None]),
        "map": (lambda kind: pa.map_(pa.string(), kind), lambda value: [("1", value)]),
    }
    kind_of, around = kinds[at]
    texts = [None if value is None else json.dumps(value) for value in rows]
    column = pa.array(map(around, texts), kind_of(pa.string())).cast(kind_of(pa.json_()))
    table = pa.table({"x": column, "text": ["[1]"] * len(rows)})
    path = tmp_path_factory.getbasetemp() / "any.parquet"
    pq.write_table(table, path)
    assert fields(read_path(path)) == [{"x": around(value), "text": "[1]"} for value in rows]


def test_what_is_no_json_there_costs_its_row_only(tmp_path: Path) -> None:
    texts = ['{"a": 1}', '{"a": ', '"\\ud800"', "[" * 100_000, "2"]
    pq.write_table(pa.table({"x": pa.array(texts, pa.json_())}), tmp_path / "a.parquet")
    rows = read_path(tmp_path)
    assert fields([rows[0], rows[4]]) == [{"x": {"a": 1}}, {"x": 2}]
    broken, text = RejectReason.BROKEN_JSON, RejectReason.INVALID_TEXT
    assert reasons(rows) == [(1, broken), (2, text), (3, broken)]


def test_arrow_files_in_several_batches_keep_the_row_index(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"i": list(range(2500))}).save_to_disk(tmp_path)
    rows = read_path(tmp_path)
    assert [row.source_row for row in rows] == [row["i"] for row in fields(rows)] == list(range(2500))


# --- bad rows --------------------------------------------------------------------------------------------------------


def test_each_bad_line_has_its_reason_and_the_rest_is_kept(tmp_path: Path) -> None:
    lines = [
        b'\xef\xbb\xbf{"a": 1}',  # a byte-order mark at the start of the file
        b"",
        b" \t\r",
        b'{"a": }',
        b'["a"]',
        b"3",
        b"null",
        b'{"a": "\xff"}',
        rb'{"a": "\ud83d"}',
        rb'{"\udc00": 1}',
        rb'{"a": [{"b": "\uD800"}]}',
        rb'{"a": "\ud83d\ude00"}',
        rb'{"a": "\\ud83d"}',
        b'{"a": NaN, "b": -Infinity}\r',
        b'{"a": 1, "a": 2}',
        b'{"a": 9007199254740993}',
        b'\xef\xbb\xbf{"a": 1}',
        b'{"a": ' + b"1" * 5000 + b"}",
        b"[" * 100_000,
        b'{"a": 1} {"a": 2}',
        b'{"last": "without a line end"}',
    ]
    seen = dict(read_lines(tmp_path, b"\n".join(lines)))
    broken, text, not_object = RejectReason.BROKEN_JSON, RejectReason.INVALID_TEXT, RejectReason.NOT_AN_OBJECT
    nan = seen.pop(13)
    assert nan["a"] != nan["a"] and nan["b"] == float("-inf")
    assert seen == {
        0: {"a": 1},
        3: broken,
        4: not_object,
        5: not_object,
        6: not_object,
        7: text,
        8: text,
        9: text,
        10: text,
        11: {"a": "😀"},
        12: {"a": "\\ud83d"},
        14: {"a": 2},
        15: {"a": 2**53 + 1},
        16: broken,
        17: broken,
        18: broken,
        19: broken,
        20: {"last": "without a line end"},
    }


def test_details_tell_the_particulars(tmp_path: Path) -> None:
    rows = read_path(write(tmp_path / "a.jsonl", b'{"a": }\n[]\n{"a": "\\ud800"}\n'))
    details = [row.detail for row in rows if isinstance(row, Reject)]
    assert "Expecting value: line 1 column 7" in details[0]
    assert "a list; expected an object" in details[1]
    assert "surrogates" in details[2]
    for detail in details:
        detail.encode()


@given(
    content=st.one_of(
        st.binary(), st.lists(st.sampled_from([b"{}", b"\n", b"\r", b" ", b"[]", b'{"a":1}', b"\xff"])).map(b"".join)
    )
)
def test_every_line_that_is_not_blank_ends_exactly_once(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = write(tmp_path_factory.getbasetemp() / "any.jsonl", content)
    rows = read_path(path)
    if not content:
        assert reasons(rows) == [(0, RejectReason.EMPTY_FILE)]
        return
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    assert [row.source_row for row in rows] == [index for index, line in enumerate(lines) if line.strip()]
    assert all(isinstance(row, Record) or row.reason in RejectReason for row in rows)


@given(
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(st.characters(codec=None)),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(codec=None)), inner),
    ),
    escaped=st.booleans(),
)
@example(value={"a": "\ud800"}, escaped=False).via("bytes that are not UTF-8")
def test_arrays_and_lines_judge_a_value_alike(
    tmp_path_factory: pytest.TempPathFactory, value: Any, escaped: bool
) -> None:
    text = json.dumps(value, ensure_ascii=escaped).encode(errors="surrogatepass")
    folder = tmp_path_factory.getbasetemp()
    (line,) = read_path(write(folder / "v.jsonl", text + b"\n"))
    first, element, last = read_path(write(folder / "v.json", b" [ {} ,\n" + text + b' , {"z": 1} ]\n'))
    assert (first.source_row, element.source_row, last.source_row) == (0, 1, 2)
    assert isinstance(first, Record) and isinstance(last, Record)
    kinds = [row.fields if isinstance(row, Record) else row.reason for row in (line, element)]
    assert kinds[0] == kinds[1]
    if isinstance(line, Record):
        assert line.fields == value


@pytest.mark.parametrize(
    ("content", "rows", "fault"),
    [
        (b"[]", 0, None),
        (b" [ ] ", 0, None),
        (b'[{"a": 1}', 1, "',' or ']'"),
        (b'[{"a": 1},', 1, "Expecting value"),
        (b'[{"a": 1}, {"a": tru}, {"a": 3}]', 1, "Expecting value"),
        (b'[{"a": 1} {"a": 2}]', 1, "',' or ']'"),
        (b'[{"a": 1}] []', 1, "nothing after"),
        (b"[", 0, "Expecting value"),
    ],
)
def test_a_broken_array_keeps_what_stands_before(tmp_path: Path, content: bytes, rows: int, fault: str | None) -> None:
    seen = read_path(write(tmp_path / "a.json", content))
    assert all(isinstance(row, Record) for row in seen[:rows])
    assert [row.source_row for row in seen] == list(range(len(seen)))
    if fault is None:
        assert len(seen) == rows
        return
    (reject,) = seen[rows:]
    assert isinstance(reject, Reject) and reject.reason is RejectReason.BROKEN_JSON and fault in reject.detail


def test_a_ten_megabyte_line(tmp_path: Path) -> None:
    long = "x" * 10_000_000
    assert fields(read_path(write(tmp_path / "a.jsonl", json.dumps({"a": long}).encode() + b"\n{}"))) == [
        {"a": long},
        {},
    ]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json", "a.parquet"])
def test_a_file_without_bytes_is_one_reject(tmp_path: Path, name: str) -> None:
    (row,) = read_path(write(tmp_path / name, b""))
    assert isinstance(row, Reject) and (row.source_file, row.source_row, row.reason) == (
        name,
        0,
        RejectReason.EMPTY_FILE,
    )


def test_an_archive_of_nothing_is_an_empty_file(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl.gz", gzip.compress(b""))
    write(tmp_path / "b.jsonl.zst", zstandard.compress(b""))
    assert reasons(read_path(tmp_path)) == [(0, RejectReason.EMPTY_FILE)] * 2


@pytest.mark.parametrize("extension", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["truncated", "garbage"])
def test_damaged_archives_keep_the_rows_before(
    tmp_path: Path, extension: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    noise = random.Random(0)
    lines = [json.dumps({"i": i, "noise": noise.random()}).encode() + b"\n" for i in range(50_000)]
    packed = PACK[extension](b"".join(lines))
    middle = len(packed) // 2
    content = packed[:middle] if damage == "truncated" else packed[:middle] + bytes(1000) + packed[middle + 1000 :]
    *kept, stop = read_path(write(tmp_path / f"a.jsonl{extension}", content))
    # Zeros in the middle may decode to nonsense for a while before the decoder notices.
    good = [row for row in kept if isinstance(row, Record) and row.fields == json.loads(lines[row.source_row])]
    assert len(good) > 10_000
    assert isinstance(stop, Reject) and stop.reason is RejectReason.UNREADABLE_FILE
    assert stop.source_row == kept[-1].source_row + 1
    assert f"stopped at row {stop.source_row}" in caplog.text


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.gz", "a.jsonl.zst", "a.json.gz"])
def test_what_is_not_the_format_at_all_is_one_reject(tmp_path: Path, name: str) -> None:
    (row,) = read_path(write(tmp_path / name, b"this is no such file " * 100))
    assert isinstance(row, Reject) and (row.source_file, row.source_row, row.reason) == (
        name,
        0,
        RejectReason.UNREADABLE_FILE,
    )


def test_a_damaged_parquet_page_keeps_the_row_groups_before(tmp_path: Path) -> None:
    table = pa.table({"i": list(range(3000)), "text": [str(random.Random(i).random()) for i in range(3000)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=1000, compression="zstd")
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    start = pq.ParquetFile(tmp_path / "a.parquet").metadata.row_group(2).column(0).dictionary_page_offset
    content[start : start + 3000] = b"\xff" * 3000
    *kept, stop = read_path(write(tmp_path / "a.parquet", bytes(content)))
    assert fields(kept) == table.slice(0, 2000).to_pylist()
    assert isinstance(stop, Reject) and (stop.source_row, stop.reason) == (2000, RejectReason.UNREADABLE_FILE)


def test_a_parquet_value_that_is_not_utf8_costs_its_row_only(tmp_path: Path) -> None:
    values = pa.array([b"ok", b"\xff", b"fine"])
    table = pa.table({"text": pa.StringArray.from_buffers(3, *values.buffers()[1:])})
    pq.write_table(table, tmp_path / "a.parquet")
    first, bad, last = read_path(tmp_path)
    assert fields([first, last]) == [{"text": "ok"}, {"text": "fine"}]
    assert isinstance(bad, Reject) and (bad.source_row, bad.reason) == (1, RejectReason.INVALID_TEXT)


def test_a_date_that_python_does_not_know_costs_its_row_only(tmp_path: Path) -> None:
    pq.write_table(pa.table({"when": pa.array([0, 2**62], pa.timestamp("ms"))}), tmp_path / "a.parquet")
    good, bad = read_path(tmp_path)
    assert isinstance(good, Record)
    assert isinstance(bad, Reject) and (bad.source_row, bad.reason) == (1, RejectReason.WRONG_TYPE)


# --- which files -----------------------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Two good files, and names that are not to be read."""
    for name in [
        "b.jsonl",
        "sub/a.jsonl.gz",
        ".hidden.jsonl",
        "_part.jsonl",
        "_temporary/0/c.jsonl",
        "sub/.git/d.json",
    ]:
        write(tmp_path / "root" / name, gzip.compress(LINES) if name.endswith("gz") else LINES)
    write(tmp_path / "root" / "notes.txt", b"x")
    write(tmp_path / "root" / "sub" / "table.xls", b"x")
    write(tmp_path / "root" / "README", b"x")
    return tmp_path / "root"


def names(path: Any) -> list[str]:
    return [file.relative_path for file in list_files(source(path))]


def test_a_folder_is_read_recursively_without_hidden_names(tree: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert names(tree) == names(f"{tree}/") == ["b.jsonl", "sub/a.jsonl.gz"]
    assert "skipped 3 files with other extensions (1 .txt, 1 .xls, 1 no extension)" in caplog.text
    assert list_files(source(tree))[0].num_bytes == len(LINES)


def test_paths_are_relative_to_the_root_and_stay_when_it_moves(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ways(root: Path) -> list[list[str]]:
        lists = [[f"{root}/sub", f"{root}/b.jsonl"], [f"{root}/b.jsonl"], [f"{root}/sub/*.gz", f"{root}/*.jsonl"]]
        return [
            names(path) for path in (root, f"{root}/b.jsonl", f"{root}/*/*", f"{root}/su?/a*", f"{root}/**", *lists)
        ]

    here = ways(tree)
    both, one = ["b.jsonl", "sub/a.jsonl.gz"], ["b.jsonl"]
    assert here == [both, one, ["sub/a.jsonl.gz"], ["sub/a.jsonl.gz"], both, both, one, both]
    moved = tree.parent / "else where" / "deeper"
    shutil.move(tree, moved)
    assert ways(moved) == here
    monkeypatch.chdir(moved)
    assert ways(Path(".")) == here
    assert names("../deeper/sub") == ["a.jsonl.gz"]


def test_a_list_does_not_change_its_root_when_files_are_added(tree: Path) -> None:
    write(tree / "more" / "deep" / "x.jsonl", LINES)
    parts = [f"{tree}/more", f"{tree}/more/deep"]
    assert names(parts) == ["deep/x.jsonl"]
    write(tree / "more" / "y.jsonl", LINES)
    assert names(parts) == ["deep/x.jsonl", "y.jsonl"]


def test_files_named_twice_are_read_once(tree: Path) -> None:
    assert names([str(tree), f"{tree}/sub", f"{tree}/b.jsonl", f"{tree}/*"]) == ["b.jsonl", "sub/a.jsonl.gz"]


def test_a_glob_that_names_a_folder_reads_it(tree: Path) -> None:
    assert names(f"{tree}/s*") == ["sub/a.jsonl.gz"]


def test_a_file_whose_name_looks_like_a_glob(tmp_path: Path) -> None:
    assert names(write(tmp_path / "a[1].jsonl", LINES)) == ["a[1].jsonl"]


# --- links -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """Files, links to files and to folders, whose targets have other names than the links."""
    write(tmp_path / "blobs" / "0", LINES)
    write(tmp_path / "blobs" / "deep" / "1.jsonl", LINES * 2)
    root = tmp_path / "data"
    write(root / "own.jsonl", LINES * 3)
    (root / "file.jsonl").symlink_to("../blobs/0")
    (root / "folder").symlink_to(tmp_path / "blobs")
    (root / "sub").mkdir()
    (root / "sub" / "twice").symlink_to("../folder/deep")
    (tmp_path / "root").symlink_to(root)
    return root


def seen_by_python(root: Path) -> list[tuple[str, int]]:
    """Every readable file, by the standard library's walk through links."""
    walk = os.walk(root, followlinks=True)
    files = [Path(folder, name) for folder, _, names in walk for name in names if name.endswith(".jsonl")]
    return sorted((file.relative_to(root).as_posix(), file.stat().st_size) for file in files)


def test_links_to_files_and_folders_are_read_under_their_own_paths(linked: Path) -> None:
    expected = seen_by_python(linked)
    assert len(expected) == 4
    for path in (linked, linked.parent / "root", f"{linked}/**", f"{linked}/*", f"file://{linked}"):
        assert [(file.relative_path, file.num_bytes) for file in list_files(source(path))] == expected
    assert names(f"{linked}/f*/deep/*") == ["folder/deep/1.jsonl"]
    assert names(f"{linked}/*/*/1.jsonl") == ["folder/deep/1.jsonl", "sub/twice/1.jsonl"]
    assert names([str(linked / "folder"), str(linked / "file.jsonl")]) == ["file.jsonl", "folder/deep/1.jsonl"]


def test_rows_of_a_link_have_the_names_and_ids_that_a_copy_would_have(linked: Path) -> None:
    copy = linked.parent / "copy"
    shutil.copytree(linked, copy, symlinks=False)
    assert read_path(linked) == read_path(copy)
    assert {row.source_file for row in read_path(linked)} == {name for name, _ in seen_by_python(copy)}


@pytest.mark.parametrize("target", ["nowhere", "gone.jsonl", "../blobs/0/below"])
@pytest.mark.parametrize("asked", ["", "gone.jsonl", "gone*", "*", "sub/../"])
def test_a_link_to_nothing_is_named(linked: Path, target: str, asked: str) -> None:
    (linked / "gone.jsonl").symlink_to(target)
    with pytest.raises(DataError, match=rf"gone\.jsonl is a link to {target}, which does not exist"):
        list_files(source(f"{linked}/{asked}"))


def test_a_link_to_a_folder_that_is_gone_is_named(linked: Path) -> None:
    shutil.rmtree(linked.parent / "blobs")
    with pytest.raises(DataError, match=r"file\.jsonl is a link to \.\./blobs/0, which does not exist"):
        list_files(source(linked))
    (linked / "file.jsonl").unlink()
    with pytest.raises(DataError, match=r"data/folder is a link to .*blobs, which does not exist"):
        list_files(source(linked))


def test_links_in_a_circle_end_and_are_named(linked: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = seen_by_python(linked)
    (linked / "self").symlink_to(".")
    (linked / "sub" / "above").symlink_to(linked.parent)
    (linked.parent / "blobs" / "deep" / "back").symlink_to(linked / "sub")
    for path in (linked, f"{linked}/**"):
        caplog.clear()
        assert [(file.relative_path, file.num_bytes) for file in list_files(source(path))] == expected
        for name in ("self", "sub/above", "folder/deep/back/twice", "sub/twice/back"):
            assert f"{linked}/{name} is a link to a folder that contains it" in caplog.text


def test_of_the_hubs_cache_one_revision_is_read(tmp_path: Path) -> None:
    cache = tmp_path / "datasets--org--data"
    blob = write(cache / "blobs" / "1f", LINES)
    write(cache / "refs" / "main", b"abc")
    for revision in ("abc", "def"):
        (cache / "snapshots" / revision / "data").mkdir(parents=True)
        (cache / "snapshots" / revision / "data" / "train.jsonl").symlink_to("../../../blobs/1f")
        if revision == "abc":
            assert names(cache) == ["snapshots/abc/data/train.jsonl"]
        assert names(cache / "snapshots" / revision) == ["data/train.jsonl"]
    for path in (cache, tmp_path, tmp_path / "datasets--*"):
        with pytest.raises(DataError, match=r"data has 2 revisions .abc, def.; give .*org--data/snapshots/REVISION"):
            list_files(source(path))
    blob.unlink()
    with pytest.raises(DataError, match=r"train\.jsonl is a link to \.\./\.\./\.\./blobs/1f, which does not exist"):
        list_files(source(cache / "snapshots" / "abc"))


def test_a_folder_of_datasets_may_be_links_and_names_what_is_missing(tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    linked = tmp_path / "linked"
    linked.mkdir()
    for file in (tmp_path / "saved").iterdir():
        (linked / file.name).symlink_to(file)
    assert fields(read_path(linked)) == ROWS
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    arrow.unlink()
    with pytest.raises(DataError, match=rf"{arrow.name} is a link to {arrow}, which does not exist"):
        list_files(source(linked))
    with pytest.raises(DataError, match=rf"{arrow.name} does not exist, but .*state\.json names it"):
        list_files(source(tmp_path / "saved"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.json", "a.jsonl.gz"])
def test_a_pointer_of_git_lfs_is_no_data(tmp_path: Path, name: str) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    with pytest.raises(DataError, match=rf"{name} is a Git LFS pointer, not data; run git lfs pull"):
        read_path(write(tmp_path / name, pointer))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent.jsonl", "absent.jsonl does not exist; give a file, a folder, a glob or a hub name"),
        ("*.nothing", "no data files in .*nothing.*give .parquet"),
        ("notes.txt", "notes.txt has an extension that is not supported; give .parquet"),
        ("empty", "no data files in .*empty .*give .parquet"),
        ("texts", r"no data files in .*texts \(found 1 .txt"),
    ],
)
def test_nothing_to_read_is_the_users_error(tree: Path, name: str, message: str) -> None:
    (tree / "empty").mkdir()
    write(tree / "texts" / "a.txt", b"x")
    with pytest.raises(DataError, match=message):
        list_files(source(tree / name))


def test_an_unknown_protocol_is_the_users_error() -> None:
    with pytest.raises(DataError, match=r"cannot be listed.*foo"):
        list_files(source("foo://bucket/x"))


def test_several_file_systems_in_one_list_are_refused(tree: Path) -> None:
    fsspec.filesystem("memory").pipe("/davir/a.jsonl", LINES)
    with pytest.raises(DataError, match="several file systems"):
        list_files(source([str(tree), "memory://davir"]))


def test_a_file_name_that_is_not_utf8_is_the_users_error(tmp_path: Path) -> None:
    with open(os.fsencode(tmp_path) + b"/\xff.jsonl", "wb") as file:
        file.write(LINES)
    with pytest.raises(DataError, match="not UTF-8"):
        list_files(source(tmp_path))


def test_uris_are_listed_and_read_like_local_paths() -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe({"/davir/u/sub/a.jsonl.gz": gzip.compress(LINES), "/davir/u/b.json": json.dumps(ROWS).encode()})
    files = list_files(source("memory://davir/u"))
    assert (
        [file.relative_path for file in files] == names("memory://davir/u/**/*.json*") == ["b.json", "sub/a.jsonl.gz"]
    )
    assert all(file.uri.startswith("memory://") for file in files)
    assert fields(read_path("memory://davir/u")) == ROWS * 2
    memory.pipe("/davir/u/c.jsonl", LINES)
    assert len(names("memory://davir/u")) == 3


class HubInMemory(MemoryFileSystem):  # type: ignore[misc]  # fsspec has no types
    """Serves what stands in memory under hf://."""

    protocol = "hf"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(MemoryFileSystem._strip_protocol(path.removeprefix("hf://")))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A hub with the data set org/talk of two splits."""
    fsspec.register_implementation("hf", HubInMemory, clobber=True)
    files = {
        "train": ["datasets/org/talk@1f/data/a.jsonl", "datasets/org/talk@1f/data/b.jsonl"],
        "test": ["x.xls"],
    }
    main = ["datasets/org/talk@2e/main/c.csv"]
    for path in files["train"]:
        HubInMemory().pipe("/" + path, LINES)
    HubInMemory().pipe("/x.xls", b"a,b")
    HubInMemory().pipe("/datasets/org/talk@2e/main/c.csv", b"instruction,output\nsay,x\n")

    def load_dataset_builder(path: str, name: str | None = None, *, revision: str | None = None) -> Any:
        if path != "org/talk":
            raise FileNotFoundError(f"Couldn't find {path}\nmore of it")
        asked = {"train": main} if (name, revision) == ("main", "refs/pr/2") else files
        uris = {datasets.Split(split): [f"hf://{path}" for path in paths] for split, paths in asked.items()}
        return SimpleNamespace(config=SimpleNamespace(data_files=uris))

    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    yield
    fsspec.register_implementation("hf", HfFileSystem, clobber=True)


@pytest.mark.usefixtures("hub")
def test_a_hub_name_streams_the_files_of_its_split() -> None:
    files = list_files(source("org/talk"))
    assert [(file.uri, file.relative_path, file.num_bytes) for file in files] == [
        ("hf://datasets/org/talk@1f/data/a.jsonl", "data/a.jsonl", len(LINES)),
        ("hf://datasets/org/talk@1f/data/b.jsonl", "data/b.jsonl", len(LINES)),
    ]
    assert fields(read_path("org/talk")) == ROWS * 2


@pytest.mark.usefixtures("hub")
def test_what_the_hub_does_not_have_is_the_users_error() -> None:
    with pytest.raises(
        DataError, match=r"^org/none neither exists here nor loads from the hub .*Couldn't find org/none\)"
    ):
        list_files(source("org/none"))
    with pytest.raises(DataError, match=r"configuration and a revision are given as org/none:CONFIG@REVISION"):
        list_files(source("org/none:main"))
    with pytest.raises(DataError, match="no split 'dev'; set split to one of: train, test"):
        list_files(source("org/talk", split="dev"))
    with pytest.raises(DataError, match=r"x\.xls, whose extension is not supported"):
        list_files(source("org/talk", split="test"))


@pytest.mark.usefixtures("hub")
def test_a_configuration_and_a_revision_are_part_of_a_hub_name() -> None:
    """They are the second argument and `revision` of datasets.load_dataset; the ids depend on neither."""
    (file,) = list_files(source("org/talk:main@refs/pr/2"))
    assert (file.uri, file.relative_path) == ("hf://datasets/org/talk@2e/main/c.csv", "main/c.csv")
    assert fields(read_path("org/talk:main@refs/pr/2")) == [{"instruction": "say", "output": "x"}]


# --- CSV, TSV and Arrow ----------------------------------------------------------------------------------------------

CELLS = st.text(st.characters(exclude_categories=["Cs"]))


@given(st.lists(st.tuples(CELLS, CELLS), min_size=1), st.sampled_from([",", "\t"]), st.sampled_from(["\n", "\r\n"]))
def test_csv_gives_what_the_csv_of_python_wrote(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], delimiter: str, end: str
) -> None:
    file = tmp_path_factory.mktemp("csv") / ("a.csv" if delimiter == "," else "a.tsv")
    with file.open("w", newline="", encoding="utf-8") as stream:
        # With \n as the line's end, csv.writer leaves a lone \r without quotes, which no reader can tell from an end.
        quoting = csv.QUOTE_ALL if end == "\n" else csv.QUOTE_MINIMAL
        writer = csv.writer(stream, delimiter=delimiter, lineterminator=end, quoting=quoting)
        writer.writerows([("instruction", "output"), *rows])
    assert fields(read_path(file)) == [{"instruction": one, "output": other} for one, other in rows]


@pytest.mark.parametrize("extension", PACK)
def test_csv_is_read_as_pandas_reads_it(tmp_path: Path, extension: str) -> None:
    content = '\ufeffinstruction,output\nsay é,"a ""quoted"", long\nanswer"\n\n007,\n'.encode()
    file = write(tmp_path / f"a.csv{extension}", PACK[extension](content))
    rows = read_path(file)
    theirs = pd.read_csv(file, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    assert fields(rows) == theirs.to_dict("records")
    assert [row.source_row for row in rows] == [0, 2], "a blank line counts in the row index"


def test_a_bad_row_of_csv_has_its_reason_and_the_rest_is_kept(tmp_path: Path) -> None:
    lines = [b"a,b", b"1,2", b"1", b"1,2,3", b'"x"y,2', b"\xff,2", b"a" * 200_000 + b",2", b"5,6", b'"open,7', b"8,9"]
    rows = read_path(write(tmp_path / "a.csv", b"\n".join(lines)))
    broken = RejectReason.BROKEN_ROW
    assert reasons(rows) == [(1, broken), (2, broken), (3, broken), (4, RejectReason.INVALID_TEXT), (7, broken)]
    assert [row.fields["a"][:3] for row in rows if isinstance(row, Record)] == ["1", "aaa", "5"]
    details = [row.detail for row in rows if isinstance(row, Reject)]
    assert details[0] == "1 fields (line 3), but the header has 2" and "unexpected end" in details[-1]


@pytest.mark.parametrize(
    ("head", "told"), [(b"a,b,a", "several columns named 'a'"), (b'"x"y,b', "no names of columns")]
)
def test_a_header_that_names_no_columns_is_the_users_error(tmp_path: Path, head: bytes, told: str) -> None:
    with pytest.raises(DataError, match=told):
        read_path(write(tmp_path / "a.csv", head + b"\n1,2,3\n"))


@pytest.mark.parametrize("kind", ["stream", "file"])
def test_arrow_files_of_both_kinds_give_the_same_records(tmp_path: Path, kind: str) -> None:
    table = pa.Table.from_pylist(ROWS)
    new = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
    with new(tmp_path / "a.arrow", table.schema) as sink:
        sink.write_table(table, max_chunksize=2)
    assert fields(read_path(tmp_path / "a.arrow")) == ROWS
    assert fields(read_path(tmp_path)) == ROWS


# --- tasks -----------------------------------------------------------------------------------------------------------


def some_file(name: str, num_bytes: int) -> SourceFile:
    return SourceFile(source="s", uri=f"/{name}", relative_path=name, layout="csv", num_bytes=num_bytes)


@given(st.lists(st.integers(0, 100)), st.integers(1, 200))
def test_tasks_hold_every_file_once_in_order_within_the_target(sizes: list[int], target: int) -> None:
    files = [some_file(f"{index}.csv", size) for index, size in enumerate(sizes)]
    tasks = plan_tasks(files, target)
    assert [piece for task in tasks for piece in task] == [Slice(file) for file in files]
    totals = [sum(piece.file.num_bytes for piece in task) for task in tasks]
    assert all(total <= target or len(task) == 1 for total, task in zip(totals, tasks, strict=True))
    assert all(total + task[0].file.num_bytes > target for total, task in zip(totals, tasks[1:], strict=False))


@pytest.mark.parametrize("target", [1, 3_000, 20_000, 10**9])
def test_row_groups_are_read_once_with_the_files_row_index(tmp_path: Path, target: int) -> None:
    rows = [{"i": i, "text": str(random.Random(i).random())} for i in range(1000)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=90)
    files = list_files(source(tmp_path))
    tasks = plan_tasks(files, target)
    assert tasks == plan_tasks(files, target)
    pieces = [piece for task in tasks for piece in task]
    assert len(pieces) == len(tasks) == {1: 12, 10**9: 1}.get(target, len(tasks))
    assert target in (1, 10**9) or 1 < len(tasks) < 12
    assert [row for piece in pieces for row in read_records(piece)] == [
        Record("a.parquet", i, row) for i, row in enumerate(rows)
    ]


def test_a_corrupt_footer_is_left_for_reading_to_tell(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", b"PAR1 not a footer PAR1")
    write(tmp_path / "b.parquet", b"")
    ((first,), (second,)) = plan_tasks(list_files(source(tmp_path)), 1)
    assert reasons(read_records(first)) == [(0, RejectReason.UNREADABLE_FILE)]
    assert reasons(read_records(second)) == [(0, RejectReason.EMPTY_FILE)]


MARK = codecs.BOM_UTF8
SOME_LINES: list[tuple[bytes, dict[str, Any] | RejectReason | None]] = [
    (b"", None), (b" \t", None), (b"\r", None), (b'{"a": 1}', {"a": 1}), (b"{}\r", {}),
    (('{"a": "' + "é" * 90 + '"}').encode(), {"a": "é" * 90}), (b"{", RejectReason.BROKEN_JSON),
    (b'{"a": "\xff"}', RejectReason.INVALID_TEXT), (b"[1]", RejectReason.NOT_AN_OBJECT),
    (MARK + b"{}", RejectReason.BROKEN_JSON),
]  # fmt: skip
"""Lines, and what each is: a record's fields, a reason, None for a blank line."""


def counted(pieces: list[Slice]) -> list[Slice]:
    """The slices of one file with their rows."""
    firsts = [0, *accumulate(map(count_lines, pieces))]
    return [piece._replace(rows=range(*rows)) for piece, rows in zip(pieces, pairwise(firsts), strict=True)]


@settings(max_examples=300)
@given(
    lines=st.lists(st.sampled_from(SOME_LINES), min_size=1),
    target=st.integers(1, 64),
    name=st.sampled_from(["a.jsonl", "a.ndjson", "a.json", "a.JSONL"]),
    mark=st.sampled_from([b"", MARK]),
    end=st.sampled_from([b"", b"\n"]),
)
@example(lines=[SOME_LINES[5]] * 3, target=1, name="a.json", mark=MARK, end=b"")
def test_a_cut_file_has_the_rows_of_its_lines(
    tmp_path_factory: pytest.TempPathFactory, lines: list[Any], target: int, name: str, mark: bytes, end: bytes
) -> None:
    if name == "a.json" or lines[0][0].startswith(MARK):  # it is an array if it begins with a bracket
        lines = [SOME_LINES[3], *lines]
    content = mark + b"\n".join(line for line, _ in lines) + end
    path = write(tmp_path_factory.getbasetemp() / "cut" / name, content)
    (file,) = list_files(source(path))
    pieces = [piece for task in plan_tasks([file], target) for piece in task]
    if len(content) > target:
        assert len(pieces) == -(-len(content) // target)
        starts = [0, *(at + 1 for at, byte in enumerate(content[:-1]) if byte == 10)]
        for number, piece in enumerate(pieces):
            assert count_lines(piece) == sum(at // target == number for at in starts)
        pieces = counted(pieces)
    read: list[int] = []
    rows = [row for piece in pieces for row in read_records(piece, read.append)]
    found = [(row.source_row, row.fields if isinstance(row, Record) else row.reason) for row in rows]
    expected = [(index, what) for index, (_, what) in enumerate(lines) if what is not None]
    assert found == expected or (not content and reasons(rows) == [(0, RejectReason.EMPTY_FILE)])
    assert {row.source_file for row in rows} <= {name}
    assert sum(read) == len(content)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES.decode().encode("utf-16")),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 99999\n"),
        ("a.json", b"\xef\xbb\xbf \n [{},\n{}]"),
        ("a.jsonl.gz", gzip.compress(LINES)),
        ("a.json.zst", zstandard.compress(LINES)),
        ("a.csv", b'a,b\n1,"x\ny"\n'),
        ("a.jsonl", b"{}\n{}"),
    ],
    ids=["UTF-16", "LFS", "array", "gzip", "zstd", "CSV", "small"],
)
def test_what_is_not_lines_or_is_small_is_not_cut(tmp_path: Path, name: str, content: bytes) -> None:
    (file,) = list_files(source(write(tmp_path / name, content)))
    assert plan_tasks([file], 5) == [[Slice(file)]]


def test_a_web_server_that_sends_files_only_whole_is_read_so(tmp_path: Path) -> None:
    class Handler(SimpleHTTPRequestHandler):
        def end_headers(self) -> None:
            self.send_header("Accept-Ranges", "none")
            super().end_headers()

    write(tmp_path / "a.jsonl", LINES)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        files = list_files(source(f"http://127.0.0.1:{server.server_port}/a.jsonl"))
        ((piece,),) = plan_tasks(files, 5)
        assert fields(list(read_records(piece))) == ROWS
        server.shutdown()


def test_a_file_that_changes_after_its_lines_were_counted_is_the_users_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b"{}\n" * 10)
    first, second = counted([piece for task in plan_tasks(list_files(source(path)), 15) for piece in task])
    write(path, b"{}\n" * 7 + b" {}{}{}\n\n")
    assert len(list(read_records(first))) == 5
    with pytest.raises(DataError, match=r"a.jsonl was changed while the run read it: 5 lines began in .* now 4 do"):
        list(read_records(second))


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_file_that_went_away_is_the_users_error(tmp_path: Path, name: str) -> None:
    pq.write_table(pa.table({"a": [1]}), tmp_path / name)
    files = list_files(source(tmp_path))
    (tmp_path / name).unlink()
    with pytest.raises(DataError, match=rf"{name} cannot be opened: .*restore"):
        list(read_records(Slice(files[0])))
    with pytest.raises(DataError, match=rf"{name} cannot be opened"):
        plan_tasks(files, 1)


class FailingAfter:
    """A file of a storage that fails after some bytes."""

    def __init__(self, file: Any, num_bytes: int) -> None:
        self.file, self.left = file, num_bytes

    def read(self, size: int) -> Any:
        if self.left <= 0:
            raise TimeoutError("the storage did not answer")
        self.left -= size
        return self.file.read(size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_a_failing_storage_never_looks_like_a_damaged_file(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = random.Random(0)
    rows = [{"noise": noise.random()} for _ in range(100_000)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if name == "a.parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name)
    else:
        write(tmp_path / name, PACK[Path(name).suffix.replace(".jsonl", "")](lines))
    monkeypatch.setattr(
        sources, "_Stored", lambda file, *rest, stored=sources._Stored: stored(FailingAfter(file, 300_000), *rest)
    )
    with pytest.raises(StorageError, match="the storage did not answer"):
        read_path(tmp_path)


# --- real data -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "num_rows"), [("alpaca_9k", 9229), ("gsm8k_train", 7473), ("gsm8k_test", 1319)])
def test_real_files_are_read_whole(
    data_folder: Path, name: str, num_rows: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    path = data_folder / f"{name}.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        expected = [json.loads(line) for line in lines]
    assert len(expected) == num_rows or "DAVIR_TEST_DATA" not in os.environ
    assert fields(read_path(path)) == expected
    assert not caplog.text


def test_storage_that_fails_when_a_file_is_opened_makes_no_reject(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("{}\n")
    (file,) = list_files(Source(name="s", path=str(path), format="alpaca"))

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(LocalFileSystem, "open", fail)
    with pytest.raises(StorageError, match="Input/output error"):
        list(read_records(Slice(file)))
