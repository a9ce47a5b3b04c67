"""Whatever is in the files, each row is an example or a reject with file, row and reason; the sums say so."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest

from davir_ray.config import Format, PrepareConfig, Source
from davir_ray.errors import DataError, ModelError, OutputError
from davir_ray.models.checkpoint import Checkpoint
from davir_ray.schema import REJECTS, RejectReason
from davir_ray.stages.prepare import Preparation, prepare, preview
from davir_ray.storage import Location, Manifest, read_parquet

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
    return Preparation(Checkpoint.find(str(base_folder)), config, **options)


def source(path: Path, form: Format = "alpaca", name: str = "s") -> Source:
    return Source(name, str(path), form)


def table_of(run: Path, folder: str) -> pd.DataFrame:
    place = Location.of(run / folder)
    return pa.concat_tables([read_parquet(place / name) for name in place.names(".parquet")]).to_pandas()


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
        Location.of(run), sources, settings(base_folder, chat_template=CHAT, max_tokens=110), max_bad_fraction=1
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
    run = Location.of(tmp_path / "run")
    with pytest.raises(
        DataError, match=r"2 of 10 rows are bad \(.*broken_json 1.*empty_response 1|empty_response 1.*broken_json 1"
    ) as told:
        prepare(run, [source(tmp_path / "a.jsonl")], settings(base_folder, max_tokens=200), max_bad_fraction=0.19)
    assert "a.jsonl row 8" in str(told.value)
    assert Manifest.read(run, "prepare") is None
    assert len(table_of(tmp_path / "run", "rejects")) == 2
    manifest = prepare(run, [source(tmp_path / "a.jsonl")], settings(base_folder, max_tokens=200), max_bad_fraction=0.2)
    check_books(tmp_path / "run", manifest, 10)


def test_nothing_prepared_is_the_users_to_know(base_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"")
    with pytest.raises(DataError, match=r"no example could be prepared .*empty_file 1"):
        prepare(
            Location.of(tmp_path / "run"), [source(tmp_path / "a.jsonl")], settings(base_folder), max_bad_fraction=1
        )


def test_ids_survive_another_cut_and_other_company(base_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(GOOD | {"output": f"x{i}"}) + "\n" for i in range(30)))
    (tmp_path / "b.jsonl").write_text(json.dumps(GOOD) + "\n")
    found = []
    for number, (shard_rows, names) in enumerate([(4096, "a"), (7, "ab")]):
        run = tmp_path / f"run{number}"
        sources = [source(tmp_path / f"{name}.jsonl", name=name) for name in names]
        prepare(
            Location.of(run), sources, settings(base_folder, max_tokens=200, shard_rows=shard_rows), max_bad_fraction=0
        )
        table = table_of(run, "examples")
        found.append(table[table["source"] == "a"].sort_values("source_row"))
    for column in ("example_id", "content_hash", "prompt", "response"):
        assert found[0][column].tolist() == found[1][column].tolist()
    assert found[0]["example_id"].is_unique
    assert len(list((tmp_path / "run1" / "examples").iterdir())) == 6


def test_a_limit_reads_the_first_records_of_each_source(base_folder: Path, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text((json.dumps(GOOD) + "\n") * 9)
    sources = [source(tmp_path / f"{name}.jsonl", name=name) for name in "ab"]
    run = tmp_path / "run"
    manifest = prepare(Location.of(run), sources, settings(base_folder, max_tokens=200, limit=5), max_bad_fraction=0)
    check_books(run, manifest, 10)
    assert Counter(zip(table_of(run, "examples")["source"], table_of(run, "examples")["source_row"], strict=True)) == {
        (name, row): 1 for name in "ab" for row in range(5)
    }


def test_a_changed_file_is_another_run(base_folder: Path, tmp_path: Path) -> None:
    file, run = tmp_path / "a.jsonl", Location.of(tmp_path / "run")
    file.write_text(json.dumps(GOOD) + "\n")
    options = settings(base_folder, max_tokens=200)
    prepare(run, [source(file)], options, max_bad_fraction=0)
    file.write_text(json.dumps(GOOD | {"output": "y"}) + "\n")
    with pytest.raises(OutputError, match=r"sources\.s\.files\.a\.jsonl"):
        prepare(run, [source(file)], options, max_bad_fraction=0)
    prepare(run, [source(file)], options, max_bad_fraction=0, overwrite=True)
    assert table_of(tmp_path / "run", "examples")["response"].tolist() == ["y"]


def test_a_preview_names_bad_rows_and_marks_scored_tokens(base_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(line for line, _ in LINES[:4]))
    text = "\n".join(preview([source(tmp_path / "a.jsonl")], settings(base_folder, max_tokens=200)))
    assert "1 of the first 4 records" in text
    assert "a.jsonl row 1: empty_response" in text
    assert "### Response:⟦x</s>⟧" in text


def test_messages_without_a_chat_template_are_refused_as_a_model_error(base_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}\n")
    with pytest.raises(ModelError, match="no chat template"):
        prepare(
            Location.of(tmp_path / "run"),
            [source(tmp_path / "a.jsonl", "messages")],
            settings(base_folder),
            max_bad_fraction=1,
        )
