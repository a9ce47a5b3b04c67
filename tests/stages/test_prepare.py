"""Whatever is in the files, each row is an example or a reject with file, row and reason; the sums say so."""

import json
import logging
import os
import re
import subprocess
import sys
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray import cloudpickle

from davir_ray.config.prepare import PrepareConfig
from davir_ray.config.sources import Format, Source
from davir_ray.data.detection import with_format
from davir_ray.data.files import list_files
from davir_ray.data.shards import shard_tokens
from davir_ray.data.task_report import TaskReport
from davir_ray.engine.tasks import each_in_tasks
from davir_ray.errors import DataError, IntegrityError, ModelError, OutputError, StorageError
from davir_ray.models.checkpoint import Checkpoint
from davir_ray.models.tokenizer import class_name
from davir_ray.run import files as run_files
from davir_ray.run import manifest as manifests
from davir_ray.run.files import FileEntry, read_parquet, write_parquet
from davir_ray.run.folder import Run
from davir_ray.run.manifest import Manifest
from davir_ray.run.progress import Progress
from davir_ray.schema import REJECTS, RejectReason
from davir_ray.stages import lines as counting
from davir_ray.stages import prepare as module
from davir_ray.stages import sources as sources_module
from davir_ray.stages.dry_run import preview
from davir_ray.stages.prepare import TASKS, Preparation, prepare
from davir_ray.stages.select.mixture import write_jsonl

pytestmark = pytest.mark.usefixtures("ray_session")

MAX_TOKENS = 64
CHAT = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
GOOD = {"instruction": "Say x", "input": "", "output": "x"}
LINES: list[tuple[bytes, RejectReason | None]] = [
    (json.dumps(GOOD).encode(), None),
    (json.dumps(GOOD | {"output": "  "}).encode(), RejectReason.EMPTY_RESPONSE),
    (b'{"instruction": "no output"}', RejectReason.MISSING_COLUMN),
    (b'{"instruction": "broken", "outp', RejectReason.BROKEN_JSON),
    (json.dumps(GOOD | {"output": 7}).encode(), RejectReason.WRONG_TYPE),
    (b'{"instruction": "\xff\xfe", "output": "x"}', RejectReason.INVALID_TEXT),
    (b"[1, 2]", RejectReason.NOT_AN_OBJECT),
    (json.dumps(GOOD | {"instruction": "long " * 200}).encode(), RejectReason.PROMPT_TOO_LONG),
    (json.dumps(GOOD | {"output": "é" * 500}).encode(), None),
]


def settings(base_folder: Path, **options: Any) -> Preparation:
    config = PrepareConfig(max_tokens=options.pop("max_tokens", MAX_TOKENS), shard_rows=options.pop("shard_rows", 2))
    return Preparation(base=Checkpoint.find(str(base_folder)), config=config, **options)


def source(path: Path, form: Format = "alpaca", name: str = "s") -> Source:
    return Source(name=name, path=str(path), format=form)


def table_of(run: Path, folder: str) -> pd.DataFrame:
    place = Run.at(run / folder)
    return pa.concat_tables([read_parquet(place / name) for name in place.folder.names(".parquet")]).to_pandas()


def check_books(run: Path, manifest: Manifest, num_read: int) -> None:
    examples, rejects = (table_of(run, folder) if (run / folder).exists() else [] for folder in ("examples", "rejects"))
    assert manifest.counts["read"] == num_read
    assert (manifest.counts["prepared"], manifest.counts["rejected"]) == (len(examples), len(rejects))
    places = Counter(
        (row.source, row.source_file, row.source_row) for t in (examples, rejects) if len(t) for row in t.itertuples()
    )
    assert set(places.values()) == {1}
    assert places.total() == num_read


def test_every_bad_row_is_rejected_with_file_row_and_reason(base_folder: Path, tmp_path: Path) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    (data / "deep").mkdir(parents=True)
    (data / "a.jsonl").write_bytes(b"\n".join(line for line, _ in LINES) + b"\n")
    (data / "deep" / "b.jsonl").write_bytes(b"\n\n" + LINES[3][0] + b"\n" + LINES[0][0])
    (data / "empty.jsonl").write_bytes(b"")
    chat = data.parent / "chat.jsonl"
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    chat.write_text(json.dumps({"messages": talk}) + "\n" + json.dumps({"messages": talk[:1]}) + "\n")
    sources = [source(data), source(chat, "messages", "chat")]
    manifest = prepare(
        Run.at(run), sources, settings(base_folder, chat_template=CHAT, max_tokens=110), max_bad_fraction=1
    )
    expected = {("s", "a.jsonl", row): reason for row, (_, reason) in enumerate(LINES) if reason}
    expected |= {
        ("s", "deep/b.jsonl", 2): RejectReason.BROKEN_JSON,
        ("s", "empty.jsonl", 0): RejectReason.EMPTY_FILE,
        ("chat", "chat.jsonl", 1): RejectReason.BAD_CONVERSATION,
    }
    rejects = table_of(run, "rejects")
    found = {(row.source, row.source_file, row.source_row): row.reason for row in rejects.itertuples()}
    assert found == expected
    assert rejects["detail"].str.len().min() > 0
    assert list(rejects.columns) == REJECTS.names
    check_books(run, manifest, len(expected) + 4)
    assert {name: manifest.counts[name] for name in set(expected.values())} == Counter(expected.values())

    examples = table_of(run, "examples").set_index(["source_file", "source_row"])
    assert examples.loc[("chat.jsonl", 0), "response"] == "Ho"
    assert examples.loc[("deep/b.jsonl", 3), "response"] == "x"
    cut = examples.loc[("a.jsonl", 8)]
    assert cut["truncated"]
    assert len(cut["input_ids"]) == 110
    assert manifest.counts["truncated"] == examples["truncated"].sum() == 1
    for name in ("num_prompt_tokens", "num_response_tokens"):
        assert manifest.counts[name] == examples[name].sum()


def test_too_many_bad_rows_stop_the_run_with_reasons_counted(base_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes((LINES[0][0] + b"\n") * 8 + b"{broken\n" + LINES[1][0])
    run = Run.at(tmp_path / "run")
    with pytest.raises(
        DataError, match=r"2 of 10 rows are bad \(.*broken_json 1.*empty_response 1|empty_response 1.*broken_json 1"
    ) as told:
        prepare(run, [source(tmp_path / "a.jsonl")], settings(base_folder, max_tokens=200), max_bad_fraction=0.19)
    assert "a.jsonl row 8" in str(told.value)
    assert run.manifest("prepare") is None
    assert len(table_of(tmp_path / "run", "rejects")) == 2
    manifest = prepare(run, [source(tmp_path / "a.jsonl")], settings(base_folder, max_tokens=200), max_bad_fraction=0.2)
    check_books(tmp_path / "run", manifest, 10)


def test_nothing_prepared_is_the_users_to_know(base_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"")
    with pytest.raises(DataError, match=r"no example could be prepared .*empty_file 1"):
        prepare(Run.at(tmp_path / "run"), [source(tmp_path / "a.jsonl")], settings(base_folder), max_bad_fraction=1)


def test_ids_survive_another_cut_and_other_company(base_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(GOOD | {"output": f"x{i}"}) + "\n" for i in range(30)))
    (tmp_path / "b.jsonl").write_text(json.dumps(GOOD) + "\n")
    found = []
    for number, (shard_rows, names) in enumerate([(4096, "a"), (7, "ab")]):
        run = tmp_path / f"run{number}"
        sources = [source(tmp_path / f"{name}.jsonl", name=name) for name in names]
        prepare(Run.at(run), sources, settings(base_folder, max_tokens=200, shard_rows=shard_rows), max_bad_fraction=0)
        table = table_of(run, "examples")
        found.append(table[table["source"] == "a"].sort_values("source_row"))
    for column in ("example_id", "content_hash", "prompt", "response"):
        assert found[0][column].tolist() == found[1][column].tolist()
    assert found[0]["example_id"].is_unique
    assert len(list((tmp_path / "run1" / "examples").iterdir())) == 6


@pytest.mark.parametrize(
    ("corpus_tokens", "expected"),
    [
        (10_000, 65_536),
        (6_500_000, 101_562),  # Alpaca's 52,002 rows: 64 shards, eight for each of eight GPUs
        (200_000_000, 3_125_000),
        (10**12, 4_194_304),
    ],
)
def test_a_shard_has_a_64th_of_the_corpus_within_bounds(corpus_tokens: int, expected: int) -> None:
    assert shard_tokens(4 * corpus_tokens) == expected


def test_without_a_number_of_rows_shards_follow_the_tokens_of_the_corpus(
    data_folder: Path, base_folder: Path, tmp_path: Path
) -> None:
    sources = [source(data_folder / "alpaca_9k.jsonl.gz")]
    run = Run.at(tmp_path / "run")
    preparation = settings(base_folder, max_tokens=1024, shard_rows=None, limit=1500)
    prepare(run, sources, preparation, max_bad_fraction=1)
    sizes = [
        sum(map(len, read_parquet(run / "examples" / name)["input_ids"].to_pylist()))
        for name in (run / "examples").names()
    ]
    assert len(sizes) > 1
    assert all(65_536 <= size < 65_536 + 1024 for size in sizes[:-1])


def test_a_limit_reads_the_first_records_of_each_source(base_folder: Path, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text((json.dumps(GOOD) + "\n") * 9)
    sources = [source(tmp_path / f"{name}.jsonl", name=name) for name in "ab"]
    run = tmp_path / "run"
    manifest = prepare(Run.at(run), sources, settings(base_folder, max_tokens=200, limit=5), max_bad_fraction=0)
    check_books(run, manifest, 10)
    assert Counter(zip(table_of(run, "examples")["source"], table_of(run, "examples")["source_row"], strict=True)) == {
        (name, row): 1 for name in "ab" for row in range(5)
    }


def test_a_changed_file_is_another_run(base_folder: Path, tmp_path: Path) -> None:
    file, run = tmp_path / "a.jsonl", Run.at(tmp_path / "run")
    file.write_text(json.dumps(GOOD) + "\n")
    options = settings(base_folder, max_tokens=200)
    prepare(run, [source(file)], options, max_bad_fraction=0)
    file.write_text(json.dumps(GOOD | {"output": "y"}) + "\n")
    with pytest.raises(OutputError, match=r"sources\.s\.files\.a\.jsonl"):
        prepare(run, [source(file)], options, max_bad_fraction=0)
    prepare(replace(run, overwrite=True), [source(file)], options, max_bad_fraction=0)
    assert table_of(tmp_path / "run", "examples")["response"].tolist() == ["y"]


def test_an_output_among_the_data_is_no_data_and_a_second_start_finds_nothing_new(
    base_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor is the cache of the base's losses; what JSON lacks is replaced in the records, counted and told once."""
    caplog.set_level(logging.INFO)
    run, cache, options = (
        Run.at(tmp_path / "run"),
        Run.at(tmp_path / "cache"),
        settings(base_folder, max_tokens=200),
    )
    rows = [GOOD | {"weight": float("nan"), "blob": b"\xff", "why": [float("inf"), 1.0]}, GOOD | {"weight": 1.0}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text(json.dumps(GOOD | {"weight": float("nan")}))
    (run / "lease.json").write_text("{}")
    manifest = prepare(run, [source(tmp_path)], options, max_bad_fraction=0, written=[cache.folder])
    check_books(tmp_path / "run", manifest, 3)
    assert (manifest.counts["not_finite_to_null"], manifest.counts["bytes_to_base64"]) == (3, 1)
    assert "3 numbers became null and 1 values of bytes became base64 text" in caplog.text

    (lines,) = write_jsonl(run, "examples", manifest.files_in("examples"))[:1]
    found = duckdb.sql(
        f"SELECT weight, blob, why FROM read_json('{tmp_path / 'run' / 'jsonl' / lines.name}')"
    ).fetchall()
    assert found == [(None, "/w==", [None, 1.0]), (1.0, None, None)]

    write_parquet(cache / "digest" / "shard.parquet", pa.table({"token_nll": [[1.0]]}))
    caplog.clear()
    prepare(run, [source(tmp_path)], options, max_bad_fraction=0, written=[cache.folder])
    assert "prepare: complete, skipped" in caplog.text and "left out" not in caplog.text
    assert "3 of the first 3 records" in preview([source(tmp_path)], options, written=[run.folder, cache.folder])[0][0]
    with pytest.raises(DataError, match=r"examples is in .*run, which this job writes"):
        prepare(run, [source(tmp_path / "run" / "examples")], options, max_bad_fraction=0)


def test_a_preview_names_bad_rows_and_marks_scored_tokens(base_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(line for line, _ in LINES[:4]))
    text = "\n".join(preview([source(tmp_path / "a.jsonl")], settings(base_folder, max_tokens=200))[0])
    assert "1 of the first 4 records" in text
    assert "a.jsonl row 1: empty_response" in text
    assert "### Response:⟦x</s>⟧" in text


def test_messages_without_a_chat_template_are_refused_as_a_model_error(base_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}\n")
    with pytest.raises(ModelError, match="no chat template"):
        prepare(
            Run.at(tmp_path / "run"),
            [source(tmp_path / "a.jsonl", "messages")],
            settings(base_folder),
            max_bad_fraction=1,
        )


def test_another_template_is_refused_by_name(base_folder: Path, tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    run = Run.at(tmp_path / "run")
    chat = source(tmp_path / "a.jsonl", "messages")
    prepare(run, [chat], settings(base_folder, chat_template=CHAT), max_bad_fraction=0)
    with pytest.raises(OutputError, match=r"encoding\.chat_template.*--overwrite.*another --output"):
        prepare(run, [chat], settings(base_folder, chat_template=CHAT + " "), max_bad_fraction=0)


class CrashError(Exception):
    """Stands for a driver that dies."""


def test_what_an_attempt_has_prepared_is_not_read_again(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(4):
        rows = [GOOD | {"input": f"{number} {row}"} for row in range(5)]
        (folder / f"{number}.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n{")
    monkeypatch.setattr(module, "_TASK_BYTES", (folder / "0.jsonl").stat().st_size)  # a file is a task

    def run_prepare(name: str) -> Manifest:
        run = Run.at(tmp_path / name)
        return prepare(run, [source(folder)], settings(base_folder, max_tokens=200), max_bad_fraction=1)

    undisturbed = run_prepare("undisturbed")

    def crash(*_: object) -> None:
        raise CrashError

    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "commit", crash)
        with pytest.raises(CrashError):
            run_prepare("run")
    run = tmp_path / "run"
    (reports,) = (path for path in (run / TASKS).iterdir() if path.is_dir())
    assert len(list(reports.iterdir())) == 4
    # One task had not finished, of another a file was lost, of a third one was damaged.
    (reports / "00001.json").unlink()
    (run / "examples" / "part-00002-00000.parquet").unlink()
    damaged = run / "examples" / "part-00003-00001.parquet"
    damaged.write_bytes(damaged.read_bytes().replace(b"PAR1", b"PAR2"))
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.parquet")}
    again = run_prepare("run")
    assert (again.counts, again.files) == (undisturbed.counts, undisturbed.files)
    rewritten = {path.name for path, time in before.items() if path.stat().st_mtime_ns != time}
    assert rewritten
    assert not [name for name in rewritten if name.startswith("part-00000")]
    assert not (run / TASKS).exists()


def lines_to_cut(path: Path) -> Path:
    """A file of JSON lines with the faults of LINES, blank lines, CRLF, a mark, and lines of many times 300 bytes."""
    content = [line for line, _ in LINES] + [b"", json.dumps(GOOD | {"output": "x" * 2000}).encode(), b" "]
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(content * 3) + b"\n" + LINES[0][0])
    return path


def in_order(run: Path, folder: str) -> pd.DataFrame:
    return table_of(run, folder).sort_values(["source_file", "source_row"], ignore_index=True)


def test_a_cut_file_of_lines_has_the_rows_and_ids_of_an_uncut_one(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, preparation = tmp_path / "data", settings(base_folder, max_tokens=200)
    data.mkdir()
    content = lines_to_cut(data / "a.jsonl").read_bytes()
    (data / "b.json").write_bytes(content.removeprefix(b"\xef\xbb\xbf"))
    (data / "c.json").write_text(json.dumps([GOOD] * 20, indent=1))
    for name, task_bytes in (("uncut", 2**20), ("cut", 300)):
        monkeypatch.setattr(module, "_TASK_BYTES", task_bytes)
        manifest = prepare(Run.at(tmp_path / name), [source(data)], preparation, max_bad_fraction=1)
        num_rows = sum(bool(line.strip()) for line in content.split(b"\n"))
        check_books(tmp_path / name, manifest, 2 * num_rows + 20)
        tasks = {path.name.split("-")[1] for path in (tmp_path / name).rglob("part-*")}
        assert len(tasks) > 20 if name == "cut" else tasks == {"00000"}
    for folder in ("examples", "rejects"):
        pd.testing.assert_frame_equal(in_order(tmp_path / "cut", folder), in_order(tmp_path / "uncut", folder))
    done = Progress.read(Run.at(tmp_path / "cut").folder)
    assert done is not None
    assert done.done == done.total == sum(path.stat().st_size for path in data.iterdir())


@pytest.mark.slow
def test_the_lines_of_an_attempt_are_counted_once(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(module, "_TASK_BYTES", 300)
    data, preparation = lines_to_cut(tmp_path / "a.jsonl"), settings(base_folder, max_tokens=200)

    def run_prepare(name: str) -> Manifest:
        return prepare(Run.at(tmp_path / name), [source(data)], preparation, max_bad_fraction=1)

    undisturbed = run_prepare("undisturbed")
    assert "counting the lines of 1 files" in caplog.text and "parts counted (100%)" in caplog.text

    def crash(*_: object) -> None:
        raise CrashError

    for broken in ((module, "_run"), (Manifest, "commit")):
        with monkeypatch.context() as patch:
            patch.setattr(*broken, crash)
            with pytest.raises(CrashError):
                run_prepare("run")
        monkeypatch.setattr(counting, "_counts", crash)
    again = run_prepare("run")
    assert (again.counts, again.files) == (undisturbed.counts, undisturbed.files)
    assert not (tmp_path / "run" / TASKS).exists()


@pytest.mark.slow
def test_an_attempt_with_another_plan_is_not_continued(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as that of a version that cut no lines: its tasks have the same numbers, and other rows."""
    data, preparation = lines_to_cut(tmp_path / "a.jsonl"), settings(base_folder, max_tokens=200)
    run = Run.at(tmp_path / "run")

    def crash(*_: object) -> None:
        raise CrashError

    plans = {}
    for task_bytes in (2**20, 301, 300):
        monkeypatch.setattr(module, "_TASK_BYTES", task_bytes)
        if plans:
            with pytest.raises(OutputError, match=r"unfinished prepare .*\(plan: .* → \"\d+ tasks, .*--overwrite"):
                prepare(run, [source(data)], preparation, max_bad_fraction=1)
        with monkeypatch.context() as patch:
            patch.setattr(Manifest, "commit", crash)
            with pytest.raises(CrashError):
                prepare(replace(run, overwrite=True), [source(data)], preparation, max_bad_fraction=1)
        noted = json.loads((run / TASKS / "attempt.json").read_bytes())
        plans[task_bytes] = noted["fingerprint"].pop("plan", None)
    assert plans[2**20] is None and plans[300] != plans[301]
    assert plans[300].split(",")[0] == plans[301].split(",")[0], "as many tasks, with other rows"
    manifest = prepare(run, [source(data)], preparation, max_bad_fraction=1)
    assert manifest.fingerprint == noted["fingerprint"], "without the plan: a complete run stays complete"
    check_books(tmp_path / "run", manifest, sum(bool(line.strip()) for line in data.read_bytes().split(b"\n")))
    monkeypatch.setattr(module, "_TASK_BYTES", 2**20)
    assert prepare(run, [source(data)], preparation, max_bad_fraction=1) == manifest


@pytest.mark.parametrize(("given", "expected"), [(None, "false"), ("true", "true")])
def test_a_worker_tokenises_in_one_thread_unless_the_user_says_otherwise(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str | None, expected: str
) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(GOOD))
    prepare_task = module._prepare_task

    def watched(work: bytes, numbered: tuple[int, Any]) -> str:
        with pytest.MonkeyPatch.context() as patch:  # the worker serves other tests
            patch.setenv("TOKENIZERS_PARALLELISM", given or "")
            if given is None:
                patch.delenv("TOKENIZERS_PARALLELISM")
            done: str = prepare_task(work, numbered)
            (tmp_path / "seen").write_text(os.environ.get("TOKENIZERS_PARALLELISM", "not set"))
        return done

    monkeypatch.setattr(module, "_prepare_task", watched)
    options = settings(base_folder, max_tokens=200)
    prepare(Run.at(tmp_path / "run"), [source(tmp_path / "a.jsonl")], options, max_bad_fraction=0)
    assert (tmp_path / "seen").read_text() == expected


def test_an_unfinished_prepare_of_other_settings_is_refused(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(GOOD | {"input": str(row)}) for row in range(9)))
    run = Run.at(tmp_path / "run")

    def crash(*_: object) -> None:
        raise CrashError

    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "commit", crash)
        with pytest.raises(CrashError):
            prepare(run, [source(tmp_path / "a.jsonl")], settings(base_folder, max_tokens=200), max_bad_fraction=0)
    other = settings(base_folder, max_tokens=190)
    with pytest.raises(OutputError, match=r"unfinished prepare .*encoding.max_tokens: 200 → 190.*--overwrite"):
        prepare(run, [source(tmp_path / "a.jsonl")], other, max_bad_fraction=0)
    overwriting = replace(run, overwrite=True)
    manifest = prepare(overwriting, [source(tmp_path / "a.jsonl")], other, max_bad_fraction=0)
    check_books(tmp_path / "run", manifest, 9)


def test_other_settings_start_anew(base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(GOOD | {"input": str(row)}) for row in range(9)))
    run = Run.at(tmp_path / "run")
    with pytest.raises(DataError):
        prepare(run, [source(tmp_path / "a.jsonl")], settings(base_folder, max_tokens=2), max_bad_fraction=0)
    manifest = prepare(run, [source(tmp_path / "a.jsonl")], settings(base_folder, max_tokens=200), max_bad_fraction=0)
    check_books(tmp_path / "run", manifest, 9)
    assert not (tmp_path / "run" / "rejects").exists()


@pytest.mark.parametrize(("rows_per_record", "right"), [(1, 4), (2, 8)])
def test_records_that_are_neither_prepared_nor_rejected_are_noticed(rows_per_record: int, right: int) -> None:
    rejects = FileEntry(name="rejects/a.parquet", rows=2, bytes=1, sha256="")
    for prepared in (right - 1, right, right + 1):
        examples = replace(rejects, name="examples/a.parquet", rows=prepared)
        report = TaskReport(num_read=9, num_left_out=3, files=[examples, rejects], reasons=Counter(broken_json=2))
        told = pytest.raises(IntegrityError, match=f"9 read, {prepared} prepared, 3 left out, 2 rejected")
        with nullcontext() if prepared == right else told:
            assert module._checked_counts(report, 1.0, rows_per_record)["prepared"] == right


def test_what_the_data_leave_out_is_counted(base_folder: Path, tmp_path: Path) -> None:
    user, reply = {"role": "user", "content": "Two?"}, {"role": "assistant", "content": "2"}
    rows: list[Any] = [{"messages": [user, reply], "label": True}] * 3
    rows += [{"messages": [user, reply], "label": False}] * 4
    rows += [{"messages": [user, {**reply, "weight": 0}]}, {"messages": [user, reply], "images": ["a.png"]}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    auto = Source(name="s", path=str(tmp_path / "a.jsonl"))
    preparation = settings(base_folder, chat_template=CHAT)
    found = with_format(auto, list_files(auto), preparation.config)
    run = Run.at(str(tmp_path / "run"))
    manifest = prepare(run, [found], preparation, max_bad_fraction=0.2)
    counted = ("read", "prepared", "left_out", "rejected", "not_text")
    assert [manifest.counts[name] for name in counted] == [9, 3, 5, 1, 1]
    given = source(tmp_path / "a.jsonl", "messages")
    assert prepare(run, [given], preparation, max_bad_fraction=0.2) == manifest, "the run of the format given goes on"


def test_how_each_source_was_understood_is_recorded(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    rows = [GOOD | {"input": "", "topic": "letters"}, GOOD | {"input": "y", "topic": None}, GOOD | {"output": "z" * 99}]
    for name in ("1", "2"):
        (tmp_path / "a" / f"{name}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in [*rows, {"input": "i"}])
        )
    monkeypatch.setattr(module, "_TASK_BYTES", (tmp_path / "a" / "1.jsonl").stat().st_size)  # a file is a task
    talk = [{"role": role, "content": text} for role, text in (("user", "Hi"), ("assistant", "Ho"))]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": talk}) + "\n")
    sources = [source(tmp_path / "a"), source(tmp_path / "chat.jsonl", "messages", "chat")]
    preparation = settings(base_folder, chat_template=CHAT, max_tokens=120)
    run = Run.at(tmp_path / "run")
    manifest = prepare(run, sources, preparation, max_bad_fraction=0.5)
    plain, chat = (manifest.details["by_source"][one.name] for one in sources)
    examples = table_of(tmp_path / "run", "examples")
    assert (
        [one["prepared"] for one in (plain, chat)] == [6, 1] == [sum(examples.source == name) for name in ("s", "chat")]
    )
    assert (plain["read"], plain["rejected"], plain["chat"], chat["chat"]) == (8, 2, "never", "always")
    assert plain["columns_used"] == {"instruction": 6, "output": 6, "input": 4}
    assert plain["columns_not_used"] == {"topic": 2}
    assert plain["truncated"] == examples.truncated.sum() == 2
    of_source = examples[examples.source == "s"]
    assert plain["sampled"] == 6
    assert plain["role_tokens"] == {
        "prompt": of_source.num_prompt_tokens.sum(), "scored": of_source.num_response_tokens.sum()
    }  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(module, "_SHOWN_SOURCES", 1)
        few = prepare(Run.at(tmp_path / "few"), sources, preparation, max_bad_fraction=0.5).details["by_source"]
    assert [few[one.name]["shown"] for one in sources] == [plain["shown"], []]
    assert [(one["source_file"], one["source_row"], one["truncated"]) for one in plain["shown"]] == [
        ("1.jsonl", 0, False), ("1.jsonl", 1, False), ("1.jsonl", 2, True)
    ]  # fmt: skip
    tokenizer = preparation.base.tokenizer()
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    assert chat["shown"][0]["pieces"] == [[f"{bos}[user]Hi[assistant]", False], [f"Ho{eos}", True]]


@pytest.mark.slow
@pytest.mark.parametrize("num_files", [1, 40])
def test_a_hopeless_corpus_stops_before_its_end(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_files: int
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    lines = [json.dumps({"question": "q" * 1000, "answer": "no such column"})] * (40_000 // num_files)
    for number in range(num_files):
        (folder / f"{number:02d}.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr(module, "_TASK_BYTES", (folder / "00.jsonl").stat().st_size)  # a file is a task
    run = Run.at(tmp_path / "run")
    with pytest.raises(
        DataError, match=r"the first \d+% of the data, missing_column \d+\), more than .*rejects/"
    ) as told:
        prepare(run, [source(folder)], settings(base_folder), max_bad_fraction=0.1)
    (read,) = re.findall(r"of (\d+) rows are bad", str(told.value))
    assert 10_000 < int(read) < 36_000
    assert len(table_of(tmp_path / "run", "rejects")) >= int(read) / 2


@pytest.mark.slow
def test_a_bad_beginning_does_not_stop_a_good_corpus(base_folder: Path, tmp_path: Path) -> None:
    bad, good = json.dumps({"answer": "x" * 1000}), json.dumps(GOOD | {"input": "y" * 900})
    (tmp_path / "a.jsonl").write_text("\n".join([bad] * 1200 + [good] * 20_000))
    run = Run.at(tmp_path / "run")
    preparation = settings(base_folder, max_tokens=1024, shard_rows=4096)
    manifest = prepare(run, [source(tmp_path / "a.jsonl")], preparation, max_bad_fraction=0.06)
    assert manifest.counts["rejected"] == 1200


WORKER = """
import sys
from pathlib import Path
from ray import cloudpickle
preparation, source = cloudpickle.loads(Path(sys.argv[1]).read_bytes())
reader = preparation.reader([source])
heavy = {"torch", "ray.train", "matplotlib", "scipy", "transformers.models.auto"} & sys.modules.keys()
assert not heavy, heavy
print(reader._encoder.tokenizer.encode("Say x."))
"""


def test_a_worker_loads_a_fast_tokenizer_without_torch(base_folder: Path, tmp_path: Path) -> None:
    preparation = settings(base_folder)
    preparation = replace(preparation, tokenizer_class=class_name(preparation.base.tokenizer()))
    (tmp_path / "work").write_bytes(cloudpickle.dumps((preparation, source(tmp_path / "rows.jsonl"))))
    done = subprocess.run(
        [sys.executable, "-c", WORKER, str(tmp_path / "work")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == preparation.base.tokenizer().encode("Say x.")


def test_files_that_are_given_are_not_listed_again(base_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for number in range(3):
        (tmp_path / "data" / f"{number}.jsonl").write_text(json.dumps(GOOD | {"input": str(number)}))
    data = source(tmp_path / "data")
    files = list_files(data)
    (tmp_path / "data" / "later.jsonl").write_text(json.dumps(GOOD | {"input": "later"}))
    options = settings(base_folder, max_tokens=200)
    manifest = prepare(Run.at(tmp_path / "run"), [data], options, max_bad_fraction=0, files=[files])
    check_books(tmp_path / "run", manifest, 3)


@pytest.mark.parametrize("is_kept", [True, False])
def test_many_bytes_and_many_files_are_looked_into_in_tasks(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_kept: bool
) -> None:
    """With the result of a driver that looks into them itself."""
    (tmp_path / "data").mkdir()
    rows = [GOOD | {"input": str(number)} for number in range(30)]
    for number in range(5):
        table = pa.Table.from_pylist(rows[6 * number : 6 * number + 6])
        pq.write_table(table, tmp_path / "data" / f"{number}.parquet", row_group_size=2)
    data, options = source(tmp_path / "data"), settings(base_folder, max_tokens=200)
    monkeypatch.setattr(module, "_TASK_BYTES", 2000)
    monkeypatch.setattr(run_files, "_KEPT_FROM_BYTES", 1)
    here = prepare(Run.at(tmp_path / "here"), [data], options, max_bad_fraction=0)
    monkeypatch.setenv("DAVIR_RAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sources_module, "_HASHED_HERE", 0)
    monkeypatch.setattr(sources_module, "_CUT_PER_TASK", 2)
    run_files._KNOWN.clear()
    used: list[int] = []

    def noted(work: Any, items: Any, **how: Any) -> list[Any]:
        used.append(len(items))
        return each_in_tasks(work, items, **how)

    monkeypatch.setattr(sources_module, "each_in_tasks", noted)
    monkeypatch.setattr(run_files, "content_digest", lambda place: pytest.fail(f"the driver reads {place}"))
    if not is_kept:  # then it is remembered all the same
        (tmp_path / "cache").write_text("not a folder")
    there = prepare(Run.at(tmp_path / "there"), [data], options, max_bad_fraction=0)
    assert used == [5, 5], "the digests, then the footers"
    assert there.fingerprint == here.fingerprint
    assert there.content == here.content
    assert len(there.files) > 5


def test_data_that_the_nodes_cannot_read_is_read_by_the_driver(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A complete stage needs no node that sees its data."""
    (tmp_path / "a.jsonl").write_text(json.dumps(GOOD))
    data, options, run = source(tmp_path / "a.jsonl"), settings(base_folder, max_tokens=200), Run.at(tmp_path / "run")
    complete = prepare(run, [data], options, max_bad_fraction=0)
    monkeypatch.setattr(run_files, "_KEPT_FROM_BYTES", 1)
    monkeypatch.setattr(sources_module, "_HASHED_HERE", 0)
    monkeypatch.setenv("DAVIR_RAY_CACHE", str(tmp_path / "cache"))
    run_files._KNOWN.clear()

    def unseen(place: Any) -> Any:
        raise StorageError(f"{place}: it does not exist")

    monkeypatch.setattr(sources_module, "read_digest", unseen)
    assert prepare(run, [data], options, max_bad_fraction=0) == complete
    assert "the driver does" in caplog.text


def test_a_file_that_grows_after_it_was_listed_is_refused(base_folder: Path, tmp_path: Path) -> None:
    """Its parts would end where the listing says."""
    (tmp_path / "a.jsonl").write_text(json.dumps(GOOD) + "\n")
    data, options = source(tmp_path / "a.jsonl"), settings(base_folder, max_tokens=200)
    files = list_files(data)
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write(json.dumps(GOOD | {"input": "later"}) + "\n")
    with pytest.raises(DataError, match="was changed while the run read it"):
        prepare(Run.at(tmp_path / "run"), [data], options, max_bad_fraction=0, files=[files])


def test_what_an_attempt_has_written_is_read_only_where_it_was_changed(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [GOOD | {"input": str(number)} for number in range(12)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(module, "_TASK_BYTES", 300)
    run, data, options = Run.at(tmp_path / "run"), source(tmp_path / "a.jsonl"), settings(base_folder, max_tokens=200)

    def crash(*_: object) -> None:
        raise CrashError

    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "commit", crash)
        with pytest.raises(CrashError):
            prepare(run, [data], options, max_bad_fraction=0)
    shards = sorted((tmp_path / "run" / "examples").iterdir())
    assert len(shards) > 2
    os.utime(shards[1], (1, 1))  # as a copy would
    read: list[str] = []
    compute = manifests.content_digest

    def noted(place: Any) -> str:
        read.append(place.name)
        return compute(place)

    monkeypatch.setattr(manifests, "content_digest", noted)
    prepare(run, [data], options, max_bad_fraction=0)
    assert read == [shards[1].name]
