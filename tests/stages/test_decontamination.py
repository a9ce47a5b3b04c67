"""prepare leaves out what shares words in a row with an evaluation set, counts it by set, and calls none of it bad."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from davir_ray.config.prepare import PrepareConfig
from davir_ray.config.sources import Format, Source
from davir_ray.errors import DataError, OutputError
from davir_ray.models.checkpoint import Checkpoint
from davir_ray.run.files import read_parquet
from davir_ray.run.folder import Run
from davir_ray.schema import RejectReason
from davir_ray.stages.dry_run import preview
from davir_ray.stages.prepare import EVALUATION_SETS, Preparation, prepare

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session")]

LEAKED = "A farmer has seventeen sheep and all but nine of them run away, how many sheep are left?"
OTHER = "Three painters paint three walls in three hours; how many walls do nine painters paint in nine?"
CLEAN = "Write a line about the sea, in which no word has more than five letters, please, and no comma at all."


def write(file: Path, records: list[Any]) -> str:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(file)


def rows(run: Run, folder: str) -> list[dict[str, Any]]:
    place = run / folder
    return pa.concat_tables([read_parquet(place / name) for name in place.names(".parquet")]).to_pylist()


@pytest.fixture
def preparation(base_folder: Path, tmp_path: Path) -> Preparation:
    """Two evaluation sets, of which the second repeats a record of the first."""
    sets = (
        write(tmp_path / "first.jsonl", [{"question": LEAKED, "answer": "9"}, {"question": "Why?"}]),
        write(tmp_path / "second.jsonl", [{"q": LEAKED.upper()}, {"q": OTHER}]),
    )
    return Preparation(
        base=Checkpoint.find(str(base_folder)), config=PrepareConfig(max_tokens=512), evaluation_sets=sets
    )


def test_rows_of_evaluation_sets_are_rejects_that_are_not_bad(preparation: Preparation, tmp_path: Path) -> None:
    records = [
        {"instruction": CLEAN, "output": "x"},
        {"instruction": f"Solve this. {LEAKED}", "output": "Nine."},
        {"instruction": "Say it.", "input": CLEAN, "output": f"{CLEAN} {OTHER.lower()}"},
        {"instruction": CLEAN, "output": " "},
        {"instruction": LEAKED, "output": ""},
    ]
    data = write(tmp_path / "data.jsonl", records)
    source = Source(name="s", path=data, format="alpaca")
    run = Run.at(tmp_path / "run")
    with pytest.raises(DataError, match=r"2 of 5 rows are bad .*0\.39; the first: data\.jsonl row 3: empty_response"):
        prepare(run, [source], preparation, max_bad_fraction=0.39)
    manifest = prepare(run, [source], preparation, max_bad_fraction=0.4)
    assert [row["source_row"] for row in rows(run, "examples")] == [0]
    found = {row["source_row"]: (row["reason"], row["detail"]) for row in rows(run, "rejects")}
    first, second = preparation.evaluation_sets
    words = "a farmer has seventeen sheep and all but nine of them run away"
    others = "three painters paint three walls in three hours how many walls do nine"
    assert found[1] == (RejectReason.IN_EVALUATION_SET, f"13 words with first.jsonl row 0 of {first}: {words}")
    assert found[2] == (RejectReason.IN_EVALUATION_SET, f"13 words with second.jsonl row 1 of {second}: {others}")
    assert {row: reason for row, (reason, _) in found.items() if row > 2} == dict.fromkeys((3, 4), "empty_response")
    counts = {name: manifest.counts[name] for name in ("read", "prepared", "rejected", "in_evaluation_set")}
    assert counts == {"read": 5, "prepared": 1, "rejected": 4, "in_evaluation_set": 2}
    sets = manifest.details[EVALUATION_SETS]
    assert {name: (of_set["rows"], of_set["records"], of_set["too_short"]) for name, of_set in sets.items()} == {
        first: (1, 2, 1), second: (2, 2, 0),
    }  # fmt: skip

    lines, size = preview([source], preparation)
    assert size.num_examples == 1
    assert any(f"row 1: in_evaluation_set (13 words with first.jsonl row 0 of {first}" in line for line in lines)
    assert any(line.startswith(f"evaluation set {first}: 2 records, 6 n-grams") for line in lines)


def test_a_run_depends_on_its_evaluation_sets_and_one_without_any_on_none(
    preparation: Preparation, tmp_path: Path
) -> None:
    source = Source(
        name="s", path=write(tmp_path / "d.jsonl", [{"prompt": CLEAN, "response": "x"}]), format="prompt_response"
    )
    without = prepare(Run.at(tmp_path / "old"), [source], replace(preparation, evaluation_sets=()), max_bad_fraction=0)
    assert "decontaminate" not in without.fingerprint
    assert EVALUATION_SETS not in without.details
    run = Run.at(tmp_path / "run")
    manifest = prepare(run, [source], preparation, max_bad_fraction=0)
    assert prepare(run, [source], preparation, max_bad_fraction=0).checksum == manifest.checksum
    assert {**manifest.fingerprint, "decontaminate": None} == {**without.fingerprint, "decontaminate": None}
    write(tmp_path / "second.jsonl", [{"q": CLEAN}])
    for changed in (preparation, replace(preparation, evaluation_sets=preparation.evaluation_sets[:1])):
        with pytest.raises(OutputError, match="decontaminate"):
            prepare(run, [source], changed, max_bad_fraction=0)
    with pytest.raises(DataError, match=r"no example could be prepared from 1 records \(in_evaluation_set 1\)"):
        prepare(replace(run, overwrite=True), [source], preparation, max_bad_fraction=0)


@pytest.mark.parametrize(
    ("form", "fields"),
    [
        ("preference", {"prompt": CLEAN, "chosen": f"So: {LEAKED}", "rejected": "No."}),
        ("preference", {"prompt": CLEAN, "chosen": "Yes.", "rejected": f"So: {LEAKED}"}),
        ("prompt_completion", {"prompt": CLEAN, "completion": LEAKED}),
    ],
)
def test_every_column_that_is_read_is_looked_at_and_no_other(
    form: Format, fields: dict[str, str], preparation: Preparation, tmp_path: Path
) -> None:
    clean = {name: "A word." if value == fields["prompt"] else f"{name}." for name, value in fields.items()}
    data = write(tmp_path / "d.jsonl", [fields, {**clean, "note": LEAKED}])
    manifest = prepare(
        Run.at(tmp_path / "run"), [Source(name="s", path=data, format=form)], preparation, max_bad_fraction=0
    )
    assert manifest.counts["in_evaluation_set"] == 1
    assert {row["source_row"] for row in rows(Run.at(tmp_path / "run"), "examples")} == {1}
