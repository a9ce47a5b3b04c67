"""A scored row in the form of each trainer; what has no place in it is refused by name."""

import json
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
    assert text("messages", record, format) == {"messages": CHAT}
    assert text("sharegpt", record, format) == {"conversations": SHAREGPT}
    assert text("alternating", record, format) == {"conversations": SHAREGPT, "tools": ""}


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


def test_tools_calls_and_results_are_kept() -> None:
    """In ShareGPT's form as in LLaMA-Factory's glaive_toolcall demo."""
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    result = {"role": "tool", "content": "1", "tool_call_id": "7"}
    turns = [TURNS[1], CALL, result, {"role": "assistant", "content": "One."}]
    assert text("messages", {"messages": turns, "tools": tools}) == {"messages": turns, "tools": tools}
    found = text("sharegpt", {"messages": turns, "tools": tools})
    assert found == text("alternating", {"messages": turns, "tools": tools})
    assert [turn["from"] for turn in found["conversations"]] == ["human", "function_call", "observation", "gpt"]
    assert json.loads(found["conversations"][1]["value"]) == {"name": "add", "arguments": {"a": 1}}
    assert json.loads(found["tools"]) == [tools[0]["function"]]
    as_text = {**CALL, "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 1}'}}] * 2}
    value = text("sharegpt", {"messages": [TURNS[1], as_text]})["conversations"][1]["value"]
    assert json.loads(value) == [{"name": "add", "arguments": {"a": 1}}] * 2
    with pytest.raises(RowError, match="message 1 has text beside its tool calls"):
        text("sharegpt", {"messages": [TURNS[1], {**CALL, "content": "Let me add."}]})


@pytest.mark.parametrize(
    ("form", "turns", "message"),
    [
        ("alternating", [TURNS[1], TURNS[1], TURNS[2]], "the turns are user, user, assistant"),
        ("alternating", [TURNS[0], TURNS[2]], "the turns are assistant"),
        ("alternating", [TURNS[0], TURNS[1]], "the turns are user"),
        ("sharegpt", [TURNS[1], TURNS[2] | {"weight": 1}], "message 1 has weight"),
        ("sharegpt", [TURNS[1], {"role": "critic", "content": "no"}, TURNS[2]], "message 1 is of the role 'critic'"),
        ("messages", [{"role": "assistant"}], "message 0 of 'messages' has the fields role"),
        ("messages", [{"role": "user", "content": 3}], "is of type int"),
    ],
)
def test_what_has_no_place_in_the_form_is_named(form: Form, turns: list[Any], message: str) -> None:
    with pytest.raises(RowError, match=message):
        text(form, {"messages": turns})
