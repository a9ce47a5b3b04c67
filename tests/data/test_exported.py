"""A scored row in the form of each trainer; what has no place in it is refused by name."""

from typing import Any

import pytest

from davir_ray.config.export import Trainer
from davir_ray.config.prepare import PrepareConfig
from davir_ray.config.sources import Format, Source
from davir_ray.data.exported import Form, exported_text, form_of
from davir_ray.data.rendered import RowError

ALPACA = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": [{"type": "text", "text": "Hello"}]},
]
SHAREGPT = [
    {"from": "system", "value": "Be brief."}, {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"},
]  # fmt: skip
CHAT = [TURNS[0], TURNS[1], {"role": "assistant", "content": "Hello"}]
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}


def text(form: Form, record: dict[str, Any], format: Format = "messages", **columns: str) -> dict[str, Any]:
    source = Source(name="s", path="p", format=format, columns=columns)
    return exported_text(form, "the prompt", "the response", record, source)


@pytest.mark.parametrize(
    ("trainer", "formats", "form"),
    [
        ("parquet", ["messages"], None),
        ("trl", ["alpaca", "gsm8k", "prompt_response"], "completion"),
        ("trl", ["alpaca", "messages"], "messages"),
        ("axolotl", ["alpaca"], "alpaca"),
        ("axolotl", ["alpaca", "gsm8k"], "messages"),
        ("llamafactory", ["alpaca"], "alpaca"),
        ("llamafactory", ["messages"], "alternating"),
        ("messages", ["alpaca"], "messages"),
        ("sharegpt", ["gsm8k"], "sharegpt"),
    ],
)
def test_the_form_follows_from_the_trainer_and_the_sources(
    trainer: Trainer, formats: list[Format], form: Form | None
) -> None:
    sources = [Source(name=name, path="p", format=name) for name in formats]
    assert form_of(trainer, sources, PrepareConfig()) == form
    if form in ("completion", "alpaca"):
        assert form_of(trainer, sources, PrepareConfig(chat=True)) in ("messages", "alternating")


@pytest.mark.parametrize(
    ("record", "format"),
    [
        ({"messages": TURNS}, "messages"),
        ({"conversations": SHAREGPT}, "sharegpt"),
        ({"system_prompt": "Be brief.", "question": "Hi", "response": "Hello"}, "orca"),
        ({"prompt": TURNS[:2], "completion": TURNS[2:]}, "prompt_completion"),
        ({"instruction": "Hi", "input": "", "output": "Hello", "system": "Be brief."}, "alpaca"),
    ],
)
def test_the_turns_of_a_record_are_kept_in_every_form_of_a_conversation(record: dict[str, Any], format: Format) -> None:
    assert text("messages", record, format) == {"messages": CHAT} == text("alternating", record, format)
    assert text("sharegpt", record, format) == {"conversations": SHAREGPT}


def test_plain_text_becomes_a_question_and_an_answer() -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert text("messages", {"question": "q", "answer": "a"}, "gsm8k") == {"messages": turns}
    assert text("messages", {"inputs": "q", "targets": ["a", "b"]}, "flan") == {"messages": turns}
    assert text("messages", {"conversations": ["q", "a"]}, "lima") == {"messages": turns}
    assert text("completion", ALPACA, "alpaca") == {"prompt": "the prompt", "completion": "the response"}
    assert text("messages", ALPACA, "alpaca")["messages"][0]["content"] == "Add.\n\n1 and 2"
    assert text("messages", {**ALPACA, "input": ""}, "alpaca")["messages"][0]["content"] == "Add."
    assert text("alpaca", {**ALPACA, "input": None, "id": 7}, "alpaca") == {**ALPACA, "input": ""}
    assert text("alpaca", {"task": "Add.", "output": "3"}, "alpaca", instruction="task")["instruction"] == "Add."


def test_tools_and_calls_are_kept_where_the_form_has_a_place_for_them() -> None:
    tools = [{"type": "function", "function": {"name": "add"}}]
    record = {"messages": [TURNS[1], CALL], "tools": tools}
    assert text("messages", record) == record
    for form in ("sharegpt", "alternating"):
        with pytest.raises(RowError, match="tools"):
            text(form, record)
        with pytest.raises(RowError, match="message 1 has tool_calls"):
            text(form, {"messages": record["messages"]})


@pytest.mark.parametrize(
    ("form", "turns", "message"),
    [
        ("alternating", [TURNS[1], TURNS[1], TURNS[2]], "the turns are user, user, assistant"),
        ("alternating", [TURNS[0], TURNS[2]], "the turns are assistant"),
        ("alternating", [TURNS[0], TURNS[1]], "the turns are user"),
        ("sharegpt", [{"role": "tool", "content": "3"}], "message 0 is of the role 'tool'"),
        ("messages", [{"role": "assistant"}], "message 0 of 'messages' has the fields role"),
        ("messages", [{"role": "user", "content": 3}], "is of type int"),
    ],
)
def test_what_has_no_place_in_the_form_is_named(form: Form, turns: list[Any], message: str) -> None:
    with pytest.raises(RowError, match=message):
        text(form, {"messages": turns})
