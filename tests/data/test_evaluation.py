"""Rows that share words in a row with evaluation sets are those that a loop over all windows of all strings finds."""

import json
import random
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from davir_ray.data.evaluation import EvaluationWords, decontamination, list_evaluation_sets
from davir_ray.errors import DataError

QUESTION = "A farmer has seventeen sheep and all but nine of them run away, how many sheep are left?"  # 18 words
SHORT = "What is the tallest mountain of all Europe?"  # 8 words
TOO_SHORT = "What is the tallest mountain of Europe?"  # 7 words


def write(file: Path, records: list[Any]) -> str:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(file)


def words(*files: str) -> EvaluationWords:
    return EvaluationWords.read(list_evaluation_sets(files))


def found(evaluation: EvaluationWords, *rows: str | list[str]) -> list[int]:
    return list(evaluation.find([[row] if isinstance(row, str) else row for row in rows]))


def test_thirteen_words_are_shared_or_they_are_not(tmp_path: Path) -> None:
    evaluation = words(write(tmp_path / "e.jsonl", [{"id": 4, "question": QUESTION}]))
    split = QUESTION.split()
    assert found(
        evaluation,
        QUESTION,
        "x " + " ".join(split[2:15]) + " y",
        " ".join(split[2:14]) + " y",
        "X — " + " — ".join(split[4:]).upper() + "!",
        " ".join(split[:9]) + " x " + " ".join(split[9:]),
        [" ".join(split[:9]), " ".join(split[9:])],  # in two columns
        ["a", QUESTION],
    ) == [0, 1, 3, 6]
    match = evaluation.find([["no"], [f"I ask: {QUESTION}"]])[1]
    assert match.sets == [str(tmp_path / "e.jsonl")]
    assert match.detail == (
        f"13 words with e.jsonl row 0 of {tmp_path / 'e.jsonl'}: a farmer has seventeen sheep and all but nine of them "
        "run away"
    )


def test_a_string_of_eight_to_twelve_words_is_found_as_a_whole_and_a_shorter_one_is_counted(tmp_path: Path) -> None:
    records = [
        {"question": SHORT, "choices": ["Elbrus", "Mont Blanc"]},
        {"question": TOO_SHORT, "answer": "Elbrus"},
        {"messages": [{"role": "user", "content": "One two three four five six seven eight nine ten eleven twelve"}]},
    ]
    evaluation = words(write(tmp_path / "e.jsonl", records))
    assert found(
        evaluation, SHORT, TOO_SHORT, f"Hello. {SHORT.upper()} And so on.", SHORT.replace("all", "the"),
        "zero one two three four five six seven eight nine ten eleven twelve thirteen",
        "one two three four five six seven eight nine ten eleven",
    ) == [0, 2, 4]  # fmt: skip
    expected = {"records": 3, "too_short": 1, "only_common": 0, "ngrams": 2, "common": 0}
    assert evaluation.counts == {str(tmp_path / "e.jsonl"): expected}


def test_what_more_than_ten_records_have_is_the_frame_of_the_set(tmp_path: Path) -> None:
    frame = "Answer the following question and end with the letter of the right choice please:"  # 14 words
    records = [{"text": f"{frame} {QUESTION}"}, *({"text": frame + f" {number}"} for number in range(9))]
    ten = words(write(tmp_path / "ten.jsonl", records))
    assert found(ten, frame) == [0]
    eleven = words(write(tmp_path / "eleven.jsonl", [*records, {"text": frame + " z"}, {"text": frame}]))
    assert found(eleven, frame, QUESTION) == [1]
    counts = eleven.counts[str(tmp_path / "eleven.jsonl")]
    assert counts["common"] == 2
    assert counts["only_common"] == 1
    repeated = words(write(tmp_path / "repeated.jsonl", [{"text": f"{QUESTION} {QUESTION} " * 9}]))
    assert found(repeated, QUESTION) == [0], "many times in one record is not in many records"


def test_every_set_of_a_row_is_named_and_the_first_words_are_told(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", [{"q": "zz"}, {"q": SHORT}])
    pd.DataFrame({"q": [QUESTION, TOO_SHORT]}).to_parquet(tmp_path / "b.parquet")
    pd.DataFrame({"q": [SHORT, QUESTION]}).to_csv(tmp_path / "c.csv", index=False)
    (tmp_path / "d.json").write_text(json.dumps([{"q": SHORT + " Tell me, please, if you know it."}]))
    others = [str(tmp_path / name) for name in ("b.parquet", "c.csv", "d.json")]
    matches = words(first, *others).find([[f"{QUESTION} {SHORT}"], [SHORT], ["nothing"]])
    assert matches[0].sets == [first, *others[:2]]
    assert matches[0].detail.startswith("13 words with b.parquet row 0 of ")
    assert matches[1].sets == [first, others[1]]
    assert matches[1].detail.startswith(f"8 words with a.jsonl row 1 of {first}: what is the tallest")


def test_all_rows_are_those_of_a_loop(tmp_path: Path) -> None:
    draw = random.Random(0)

    def text(size: int) -> str:
        return " ".join(draw.choice("abc") for _ in range(size))

    files = [
        write(tmp_path / f"{name}.jsonl", [{"x": text(draw.randrange(5, 16)), "y": text(9)} for _ in range(40)])
        for name in "ab"
    ]
    rows = [[text(draw.randrange(30)) for _ in range(draw.randrange(3))] for _ in range(400)]
    wanted: dict[str, set[str]] = {}
    for file in files:
        records: dict[str, set[int]] = defaultdict(set)
        for number, line in enumerate(Path(file).read_text().splitlines()):
            for value in json.loads(line).values():
                split = value.split()
                pieces = [split[at : at + 13] for at in range(len(split) - 12)] or [split] * (len(split) >= 8)
                for piece in pieces:
                    records[" ".join(piece)].add(number)
        wanted[file] = {piece for piece, numbers in records.items() if len(numbers) <= 10}
    expected = {}
    for row, texts in enumerate(rows):
        if sets := [
            file for file in files if any(f" {piece} " in f" {one} " for one in texts for piece in wanted[file])
        ]:
            expected[row] = sets
    matches = words(*files).find(rows)
    assert {row: match.sets for row, match in matches.items()} == expected
    assert Counter(map(len, expected.values())).keys() == {1, 2}


def test_a_record_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "e.jsonl").write_text(json.dumps({"q": QUESTION}) + "\n{broken\n")
    with pytest.raises(DataError, match=r"e\.jsonl row 1 cannot be read \(broken_json: .*--decontaminate"):
        words(str(tmp_path / "e.jsonl"))


def test_a_changed_file_is_another_setting_and_no_file_is_none(tmp_path: Path) -> None:
    file = write(tmp_path / "e.jsonl", [{"q": QUESTION}])
    first = decontamination(list_evaluation_sets([file]))
    write(tmp_path / "e.jsonl", [{"q": QUESTION + "?"}])
    assert decontamination(list_evaluation_sets([file])) != first
    assert decontamination([]) == {}
