"""What is said in a record is the same in every format and rendering of it."""

import json
from typing import Any

import pytest

from davir_ray.config.sources import Format, Source
from davir_ray.data.formats import ALPACA_PROMPT_WITH_INPUT, ALPACA_PROMPT_WITHOUT_INPUT, render
from davir_ray.data.own_text import OwnText, own_text, texts_of, without_frame
from davir_ray.data.rendered import RowError

QUESTION, ANSWER = "How many {apples} are left?\nCount them.", "Two are left."
TURNS = [("user", QUESTION), ("assistant", ANSWER), ("user", "And now?"), ("assistant", "One.")]
MESSAGES = [{"role": role, "content": text} for role, text in TURNS]
SHAREGPT = [{"from": {"user": "human", "assistant": "gpt"}[role], "value": text} for role, text in TURNS]

ONE_TURN: list[tuple[Format, dict[str, Any]]] = [
    ("alpaca", {"instruction": QUESTION, "input": "", "output": ANSWER}),
    ("dolly", {"instruction": QUESTION, "context": None, "response": ANSWER}),
    ("gsm8k", {"question": QUESTION, "answer": ANSWER}),
    ("prompt_response", {"prompt": QUESTION, "response": ANSWER}),
    ("prompt_response", {"prompt": ALPACA_PROMPT_WITHOUT_INPUT.format(instruction=QUESTION), "response": ANSWER}),
    ("prompt_completion", {"prompt": QUESTION, "completion": ANSWER}),
    ("prompt_completion", {"prompt": MESSAGES[:1], "completion": MESSAGES[1:2]}),
    ("flan", {"inputs": QUESTION, "targets": ANSWER}),
    ("orca", {"system_prompt": "You are a helpful assistant.", "question": QUESTION, "response": ANSWER}),
    ("messages", {"messages": MESSAGES[:2]}),
    ("messages", {"messages": json.dumps(MESSAGES[:2]), "system": "Be brief."}),
    ("messages", {"messages": [{"role": "system", "content": "Be brief."}, *MESSAGES[:2]]}),
    ("sharegpt", {"conversations": SHAREGPT[:2]}),
    ("lima", {"conversations": [QUESTION, ANSWER]}),
]  # fmt: skip


@pytest.mark.parametrize(("form", "fields"), ONE_TURN)
def test_one_question_is_the_same_in_every_format(form: Format, fields: dict[str, Any]) -> None:
    assert own_text(fields, Source(name="s", path="p", format=form)) == (QUESTION, ANSWER)


@pytest.mark.parametrize(
    ("form", "fields"), [("messages", {"messages": MESSAGES}), ("sharegpt", {"conversations": SHAREGPT})]
)
def test_of_several_turns_the_whole_of_each_side_is_taken(form: Format, fields: dict[str, Any]) -> None:
    expected = OwnText(f"{QUESTION}\nAnd now?", f"{ANSWER}\nOne.")
    assert own_text(fields, Source(name="s", path="p", format=form)) == expected


def test_turns_without_a_user_have_an_empty_prompt_and_a_renamed_column_is_read() -> None:
    talk = [{"role": "system", "content": "Be brief."}, {"role": "assistant", "content": ANSWER}]
    assert own_text({"messages": talk}, Source(name="s", path="p", format="messages")) == ("", ANSWER)
    source = Source(name="s", path="p", format="prompt_response", columns={"prompt": "ask"})
    assert own_text({"ask": QUESTION, "response": ANSWER}, source) == (QUESTION, ANSWER)
    with pytest.raises(RowError):
        own_text({"prompt": QUESTION, "response": ANSWER}, source)


@pytest.mark.parametrize("form", ["alpaca", "dolly", "gsm8k"])
def test_the_frame_of_rendered_plain_text_is_taken_off(form: Format) -> None:
    fields = {
        "instruction": QUESTION, "output": ANSWER, "response": ANSWER,
        "question": QUESTION, "answer": ANSWER,
    }  # fmt: skip
    (rendered,) = render(fields, Source(name="s", path="p", format=form), None)
    assert rendered.prompt != QUESTION
    assert without_frame(rendered.prompt) == QUESTION
    framed = ALPACA_PROMPT_WITH_INPUT.format(instruction=QUESTION, input="Five.\n")
    assert without_frame(f" {framed}\n").split() == [*QUESTION.split(), "Five."]
    assert without_frame(f"Please: {framed}") == f"Please: {framed}"


def test_every_string_is_found_and_json_is_looked_into() -> None:
    value = {
        "a": "x",
        "b": [1, None, {"c": "[y"}],
        "d": json.dumps([{"e": "z", "n": 4}]),
        "f": '{"g": ["w"]}',
        "h": "{k",
    }
    assert list(texts_of(value)) == ["x", "[y", "z", "w", "{k"]
