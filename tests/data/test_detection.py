"""The format of data is found as a person would name it; what fits several, or would lose something, is refused."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from davir_ray.config.prepare import PrepareConfig
from davir_ray.config.sources import Source
from davir_ray.data.detection import with_format
from davir_ray.data.files import list_files
from davir_ray.data.formats import FORMATS
from davir_ray.errors import ConfigError, DataError

USER, ASSISTANT = {"role": "user", "content": "Two?"}, {"role": "assistant", "content": "2"}
HUMAN, GPT = {"from": "human", "value": "Two?"}, {"from": "gpt", "value": "2"}

ROWS: dict[str, list[dict[str, Any]]] = {
    "alpaca": [
        {"instruction": "Add.", "input": "1, 1", "output": "2"},
        {"instruction": "Add.", "output": "2", "text": "whole"},
        {"instruction": "Add.", "input": "", "output": ["2", "two"]},
        {"instruction": "Add.", "input": "1, 1", "output": "2", "kto_tag": True},
    ],
    "self_instruct": [{"id": "seed_1", "instruction": "Add.", "instances": [{"input": "1, 1", "output": "2"}]}],
    "dolly": [{"instruction": "Add.", "context": "1, 1", "response": "2", "category": "maths"}],
    "gsm8k": [{"question": "1 + 1?", "answer": "2"}],
    "prompt_response": [{"prompt": "1 + 1?", "response": "2"}, {"query": "1 + 1?", "response": "2"}],
    "flan": [{"inputs": "1 + 1?", "targets": "2", "task": "t"}, {"inputs": "1 + 1?", "targets": ["2"]}],
    "orca": [{"id": "flan.1", "system_prompt": "Be kind.", "question": "1 + 1?", "response": "2"}],
    "messages": [
        {"messages": [USER, ASSISTANT]},
        {"conversations": [USER, ASSISTANT]},
        {"messages": json.dumps([USER, ASSISTANT])},
        {"prompt": "Two?", "prompt_id": "p", "messages": [USER, ASSISTANT]},
        {"messages": [USER, ASSISTANT], "label": True},
    ],
    "sharegpt": [
        {"conversations": [HUMAN, GPT]},
        {"conversation": [HUMAN, GPT]},
        {"conversations": json.dumps([HUMAN, GPT])},
        {"conversations": [HUMAN, GPT], "system": "Be kind.", "tools": "[]"},
    ],
    "lima": [{"conversations": ["Two?", "2"], "source": "stackexchange"}],
    "prompt_completion": [
        {"prompt": "Two?", "completion": "2"},
        {"prompt": [USER], "completion": [ASSISTANT]},
        {"prompt": [USER], "completion": [ASSISTANT], "label": True},
    ],
    "preference": [
        {"prompt": "Two?", "chosen": "2", "rejected": "3"},
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
        {"prompt": "Two?", "chosen": [USER, ASSISTANT], "rejected": [USER, ASSISTANT], "score_chosen": 1.0},
    ],
    "alpaca_preference": [{"instruction": "Add.", "input": "1, 1", "chosen": "2", "rejected": "3"}],
    "sharegpt_preference": [
        {"conversations": [HUMAN], "chosen": GPT, "rejected": GPT},
        {"conversations": [USER], "chosen": ASSISTANT, "rejected": ASSISTANT},
    ],
    "swift_preference": [{"messages": [USER, ASSISTANT], "rejected_response": "3"}],
}
KNOWN = [(form, row) for form, rows in ROWS.items() for row in rows]


def write(folder: Path, rows: list[Any]) -> str:
    file = folder / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def found(folder: Path, rows: list[Any], pairs: bool = False, chat: bool = False, **options: Any) -> Source:
    source = Source(name="s", path=write(folder, rows), **options)
    return with_format(source, list_files(source), PrepareConfig(chat=chat), pairs=pairs)


def test_every_format_has_rows_here() -> None:
    assert ROWS.keys() == FORMATS.keys()


@pytest.mark.parametrize(("form", "row"), KNOWN)
def test_each_form_is_found(tmp_path: Path, form: str, row: dict[str, Any]) -> None:
    pairs = "preference" in form
    given: Any = {"ignore_columns": ["input", "context"]} if form == "prompt_response" else {}
    assert found(tmp_path, [row] * 3, pairs, **given).format == form
    assert found(tmp_path, [*[row] * 3, {"else": 1}, "no record"], pairs, chat=True, **given).format == form


def test_real_files_are_found(data_folder: Path) -> None:
    for name, form in (("alpaca_9k", "alpaca"), ("gsm8k_train", "gsm8k"), ("hh_harmless_pairs_1k", "preference")):
        source = Source(name="s", path=str(data_folder / f"{name}.jsonl.gz"))
        assert with_format(source, list_files(source), PrepareConfig(), pairs=form == "preference").format == form


def test_a_format_is_told_in_one_line_with_what_was_seen(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    system = {"from": "system", "value": "Be kind."}
    rows = [{"conversations": [HUMAN, GPT]}] * 39 + [{"conversations": [system, HUMAN, GPT]}]
    found(tmp_path, rows)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == (
        f"format of {tmp_path}/data.jsonl: sharegpt: conversations of from/value; of 40 rows 1 with a system turn"
    )
    caplog.clear()
    marked = {"messages": [USER, {**ASSISTANT, "weight": 0}, ASSISTANT], "label": False, "tools": [{"name": "f"}]}
    found(tmp_path, [marked, {"messages": [USER, ASSISTANT], "images": ["a.png"]}])
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.endswith(
        "messages: messages of role/content; of 2 rows 1 with tools, 1 marked bad, left out, 1 with marks of what is "
        "scored, 1 with images, audio or video (rejects)"
    )


@pytest.mark.parametrize(
    ("row", "candidates"),
    [
        ({"prompt": "a", "response": "b", "completion": "c"}, ["prompt_response", "prompt_completion"]),
        ({"question": "a", "answer": "b", "response": "c"}, ["gsm8k", "orca"]),
        ({"messages": [USER, ASSISTANT], "instruction": "a", "output": "b"}, ["alpaca", "messages"]),
    ],
)
def test_data_that_fit_several_are_refused_with_the_candidates(
    tmp_path: Path, row: dict[str, Any], candidates: list[str]
) -> None:
    with pytest.raises(DataError, match="ambiguous") as caught:
        found(tmp_path, [row])
    assert f"fit {' and '.join(candidates)}; give one of them" in str(caught.value)
    assert ", ".join(sorted(row)) in str(caught.value)
    for form in candidates:
        assert found(tmp_path, [row], format=form).format == form


def test_data_of_no_format_are_refused_with_what_each_needs(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no format fits .*columns text\. .*alpaca: instruction, output; .*--columns"):
        found(tmp_path, [{"text": "a"}])
    with pytest.raises(DataError, match="no record to find the format in"):
        found(tmp_path, ["no record"])


def test_pairs_are_not_for_the_main_job_and_others_not_for_alignment(tmp_path: Path) -> None:
    pair, alpaca = ROWS["preference"][0], ROWS["alpaca"][0]
    with pytest.raises(DataError, match=r"has the format preference, by its columns .* jobs/align\.py trains on pairs"):
        found(tmp_path, [pair])
    with pytest.raises(ConfigError, match=r"has the format preference; jobs/align\.py trains on pairs"):
        found(tmp_path, [pair], format="preference")
    with pytest.raises(DataError, match=r"has the format alpaca, by its columns .* jobs/align\.py needs pairs"):
        found(tmp_path, [alpaca], pairs=True)
    with pytest.raises(ConfigError, match=r"has the format alpaca; jobs/align\.py needs one of preference, "):
        found(tmp_path, [alpaca], pairs=True, format="alpaca")


def test_of_data_with_both_each_job_takes_its_own(tmp_path: Path) -> None:
    """As UltraFeedback has it."""
    row = {"prompt": "Two?", "messages": [USER, ASSISTANT], "chosen": [USER, ASSISTANT], "rejected": [USER, ASSISTANT]}
    assert found(tmp_path, [row]).format == "messages"
    assert found(tmp_path, [row], pairs=True).format == "preference"


def test_columns_of_other_names_are_found_by_their_names(tmp_path: Path) -> None:
    row = {"task": "Add.", "text": "1, 1", "reply": "2"}
    names = {"instruction": "task", "input": "text", "output": "reply"}
    assert found(tmp_path, [row], columns=names) == Source(
        name="s", path=str(tmp_path / "data.jsonl"), format="alpaca", columns=names
    )


@pytest.mark.parametrize("form", ["alpaca", "gsm8k", "messages"])
def test_a_column_that_the_format_does_not_read_is_refused(tmp_path: Path, form: Any) -> None:
    (row, *_) = ROWS[form]
    with pytest.raises(ConfigError, match=f"chosen_column of source 's' is 'mine', but the format {form} does not"):
        found(tmp_path, [row], format=form, chosen_column="mine")
    with pytest.raises(ConfigError, match="question_ in columns of source 's' is 'mine'"):
        found(tmp_path, [row], format=form, columns={"question_": "mine"})


@pytest.mark.parametrize(
    ("form", "more", "helps"),
    [
        ("alpaca", {"system": "Be kind."}, "chat"),
        ("alpaca", {"history": [["a", "b"]]}, "chat"),
        ("alpaca", {"context": "more"}, "ignore"),
        ("alpaca", {"documents": ["more"]}, "ignore"),
        ("gsm8k", {"input": "more"}, "ignore"),
        ("gsm8k", {"tools": '[{"name": "f"}]'}, "ignore"),
        ("prompt_response", {"system_prompt": "Be kind."}, "chat"),
        ("messages", {"documents": [{"text": "more"}]}, "ignore"),
        ("prompt_completion", {"tools": [{"name": "f"}]}, "chat"),
        ("dolly", {"system": "Be kind."}, "ignore"),
        ("sharegpt", {"chat_template_kwargs": {"enable_thinking": True}}, "ignore"),
    ],
)
@pytest.mark.parametrize("given", [True, False])
def test_what_changes_the_prompt_is_not_dropped(
    tmp_path: Path, form: Any, more: dict[str, Any], helps: str, given: bool
) -> None:
    row, (name,) = ROWS[form][0], more
    options: dict[str, Any] = {"format": form} if given else {}
    with pytest.raises(DataError, match=f"row 1: column '{name}' would change the prompt") as caught:
        found(tmp_path, [row, row | more], **options)
    assert f"--ignore_columns '[{name}]'" in str(caught.value)
    assert ("--prepare.chat true" in str(caught.value)) == (helps == "chat")
    found(tmp_path, [row | more], ignore_columns=[name], **options)
    if helps == "chat":
        found(tmp_path, [row | more], chat=True, **options)
    found(tmp_path, [row | {name: empty} for empty in (None, "", " ", [], {}, "[]")], **options)
