"""Conversations of every form become the text that transformers and TRL write; marks say what is scored."""

import json
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from trl.data_utils import apply_chat_template

from davir_ray.config.prepare import PrepareConfig
from davir_ray.config.sources import Format, Source
from davir_ray.data import formats
from davir_ray.data.chat import ChatTemplate
from davir_ray.data.conversation import Conversation, scored_of, tools_of, turns_of
from davir_ray.data.formats import render
from davir_ray.data.rendered import LeftOutError, Rendered, RowError
from davir_ray.schema import RejectReason

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{% for call in m.tool_calls or [] %}{{ call | tojson }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HUMAN, GPT = {"from": "human", "value": "Two?"}, {"from": "gpt", "value": "2"}
SYSTEM, USER, ASSISTANT = (
    {"role": role, "content": content}
    for role, content in (("system", "Be kind."), ("user", "Two?"), ("assistant", "2"))
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    tokens = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>")),
        eos_token="<|im_end|>",
        extra_special_tokens=["<|im_start|>"],
    )
    tokens.chat_template = TEMPLATE
    return tokens


@pytest.fixture
def chat(tokenizer: PreTrainedTokenizerFast) -> ChatTemplate:
    return ChatTemplate.from_tokenizer(tokenizer, None)


def rendered(
    fields: dict[str, Any], form: Format, template: ChatTemplate | None, **options: Any
) -> tuple[Rendered, ...]:
    return render(fields, Source(name="s", path="p", format=form), template, PrepareConfig(**options))


def whole(one: Rendered) -> str:
    return "".join(segment.text for segment in one.segments)


def refused(
    fields: dict[str, Any], form: Format, template: ChatTemplate | None, **options: Any
) -> tuple[RejectReason, str]:
    with pytest.raises(RowError) as caught:
        rendered(fields, form, template, **options)
    return caught.value.reason, caught.value.detail


MORE = [{"role": "user", "content": "And three?"}, {"role": "assistant", "content": "3"}]
SAME: list[tuple[Format, dict[str, Any], list[dict[str, str]]]] = [
    ("messages", {"messages": [USER, ASSISTANT]}, [USER, ASSISTANT]),
    ("messages", {"conversations": json.dumps([USER, ASSISTANT])}, [USER, ASSISTANT]),
    ("messages", {"messages": [USER, ASSISTANT], "system": "Be kind."}, [SYSTEM, USER, ASSISTANT]),
    ("messages", {"messages": [SYSTEM, USER, ASSISTANT], "system": " Be kind."}, [SYSTEM, USER, ASSISTANT]),
    ("sharegpt", {"conversations": [HUMAN, GPT], "system": ""}, [USER, ASSISTANT]),
    ("sharegpt", {"conversations": [{"from": "system", "value": "Be kind."}, HUMAN, GPT]}, [SYSTEM, USER, ASSISTANT]),
    ("sharegpt", {"conversations": json.dumps([HUMAN, GPT]), "system_prompt": "Be kind."}, [SYSTEM, USER, ASSISTANT]),
    ("lima", {"conversations": ["Two?", "2", "And three?", "3"]}, [USER, ASSISTANT, *MORE]),
    ("orca", {"system_prompt": "Be kind.", "question": "Two?", "response": "2"}, [SYSTEM, USER, ASSISTANT]),
    ("orca", {"system": "", "question": "Two?", "response": ["2"]}, [USER, ASSISTANT]),
]
WITH_CHAT: list[tuple[Format, dict[str, Any], list[dict[str, str]]]] = [
    ("prompt_response", {"prompt": "Two?", "response": "2"}, [USER, ASSISTANT]),
    ("prompt_completion", {"prompt": "Two?", "completion": "2", "system": "Be kind."}, [SYSTEM, USER, ASSISTANT]),
    ("flan", {"inputs": "Two?", "targets": ["2", "two"]}, [USER, ASSISTANT]),
    ("gsm8k", {"question": "Two?", "answer": "2"}, [USER, ASSISTANT]),
    ("self_instruct", {"instruction": "Two?", "instances": [{"input": "", "output": "2"}]}, [USER, ASSISTANT]),
    ("dolly", {"instruction": "And", "context": "three?", "response": "3"},
     [{"role": "user", "content": "And\n\nthree?"}, MORE[1]]),
    ("alpaca", {"instruction": "And three?", "input": "", "output": "3", "system": "Be kind.",
                "history": [["Two?", "2"]]}, [SYSTEM, USER, ASSISTANT, *MORE]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("form", "fields", "messages", "as_chat"),
    [*((*case, False) for case in SAME), *((*case, True) for case in SAME + WITH_CHAT)],
)
def test_every_form_becomes_the_text_of_its_messages(
    tokenizer: PreTrainedTokenizerFast, chat: ChatTemplate, form: Format, fields: Any, messages: Any, as_chat: bool
) -> None:
    (one,) = rendered(fields, form, chat, chat=as_chat)
    assert whole(one) + "\n" == tokenizer.apply_chat_template(messages, tokenize=False)
    assert [segment.text for segment in one.segments if segment.scored] == [
        f"{message['content']}<|im_end|>" for message in messages if message["role"] == "assistant"
    ]


PLAIN: list[tuple[Format, dict[str, Any], str, str]] = [
    ("flan", {"inputs": "Two? ", "targets": " 2"}, "Two? ", " 2"),
    ("flan", {"inputs": "Two?", "targets": ["2", "two"]}, "Two?", "2"),
    ("prompt_completion", {"prompt": "Two?", "completion": " 2"}, "Two?", " 2"),
    ("prompt_response", {"query": "Two?", "response": "2"}, "Two?", "2"),
    ("dolly", {"instruction": "Add.", "context": "1, 1", "response": "2"},
     formats.ALPACA_PROMPT_WITH_INPUT.format(instruction="Add.", input="1, 1"), "2"),
    ("self_instruct", {"instruction": "Add.", "instances": [{"input": "", "output": "2"}]},
     formats.ALPACA_PROMPT_WITHOUT_INPUT.format(instruction="Add."), "2"),
]  # fmt: skip


@pytest.mark.parametrize(("form", "fields", "prompt", "response"), PLAIN)
def test_forms_of_one_prompt_are_plain_text(form: Format, fields: Any, prompt: str, response: str) -> None:
    (one,) = rendered(fields, form, None)
    assert (one.prompt, one.response, whole(one), one.templated) == (prompt, response, prompt + response, False)


def test_prompt_and_completion_of_messages_are_split_as_trl_does(
    tokenizer: PreTrainedTokenizerFast, chat: ChatTemplate
) -> None:
    """Also where the prompt has a turn of the assistant's, which is not scored."""
    for prompt in ([USER], [SYSTEM, USER, ASSISTANT, MORE[0]]):
        example = {"prompt": prompt, "completion": [MORE[1]]}
        (one,) = rendered(example, "prompt_completion", chat)
        theirs = apply_chat_template(example, tokenizer)
        assert (one.prompt, whole(one) + "\n") == (theirs["prompt"], theirs["prompt"] + theirs["completion"])
        as_text = {name: json.dumps(value) for name, value in example.items()}
        assert rendered(as_text, "prompt_completion", chat) == (one,)
    reason, detail = refused(example, "prompt_completion", None)
    assert reason is RejectReason.BAD_CONVERSATION and "the base has no chat template" in detail


PAIRS: list[tuple[Format, dict[str, Any], dict[str, Any]]] = [
    ("preference", {"prompt": "Two?", "chosen": "2", "rejected": "3"}, {}),
    ("preference", {"prompt": "Two?", "chosen": [ASSISTANT], "rejected": [MORE[1]], "system": "Be kind."},
     {"prompt": [SYSTEM, USER]}),
    ("preference", {"chosen": json.dumps([USER, ASSISTANT]), "rejected": json.dumps([USER, MORE[1]])}, {}),
    ("alpaca_preference", {"instruction": "Two?", "input": "", "chosen": "2", "rejected": "3"}, {}),
    ("sharegpt_preference", {"conversations": [HUMAN], "chosen": GPT, "rejected": {"from": "gpt", "value": "3"}}, {}),
    ("sharegpt_preference", {"conversations": [USER], "chosen": ASSISTANT, "rejected": MORE[1]}, {}),
    ("swift_preference", {"messages": [USER, ASSISTANT], "rejected_response": "3"}, {}),
    ("swift_preference", {"messages": json.dumps([SYSTEM, USER, ASSISTANT]), "rejected_response": "3"},
     {"prompt": [SYSTEM, USER]}),
]  # fmt: skip


@pytest.mark.parametrize(("form", "fields", "changes"), PAIRS)
def test_every_form_of_a_pair_becomes_the_text_that_trl_writes(
    tokenizer: PreTrainedTokenizerFast, chat: ChatTemplate, form: Format, fields: Any, changes: dict[str, Any]
) -> None:
    example = {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [MORE[1]], **changes}
    theirs = apply_chat_template(example, tokenizer)
    chosen, rejected = rendered(fields, form, chat, chat=True)
    assert chosen.prompt == rejected.prompt == theirs["prompt"]
    assert [whole(one) + "\n" for one in (chosen, rejected)] == [
        theirs["prompt"] + theirs[role] for role in ("chosen", "rejected")
    ]


def test_pairs_of_strings_are_plain_text_without_prepare_chat() -> None:
    fields = {"instruction": "Add.", "input": "1, 1", "chosen": "2", "rejected": "3"}
    chosen, rejected = rendered(fields, "alpaca_preference", None)
    assert chosen.prompt == formats.ALPACA_PROMPT_WITH_INPUT.format(instruction="Add.", input="1, 1")
    assert (chosen.response, rejected.response, chosen.templated) == ("2", "3", False)


def test_a_dialogue_in_one_string_has_no_turns_for_the_template(chat: ChatTemplate) -> None:
    fields = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}
    reason, detail = refused(fields, "preference", chat, chat=True)
    assert reason is RejectReason.BAD_CONVERSATION and "leave out --prepare.chat" in detail


# --- roles and tools -------------------------------------------------------------------------------------------------


def test_the_roles_of_sharegpt_are_those_of_templates() -> None:
    names = ["human", "user", "gpt", "assistant", "bot", "system", "tool", "observation", "GPT"]
    turns = turns_of([{"from": name, "value": "x"} for name in names], "c")
    assert [turn["role"] for turn in turns] == [
        "user", "user", "assistant", "assistant", "assistant", "system", "tool", "tool", "assistant",
    ]  # fmt: skip


@pytest.mark.parametrize("arguments", [{"day": "today"}, '{"day": "today"}'])
def test_a_function_call_of_sharegpt_is_a_tool_call(
    tokenizer: PreTrainedTokenizerFast, chat: ChatTemplate, arguments: Any
) -> None:
    """As in the demo files of LLaMA-Factory, whose tools are JSON text."""
    call = {"from": "function_call", "value": json.dumps({"name": "weather", "arguments": arguments})}
    answer = {"from": "observation", "value": '{"sky": "blue"}'}
    (one,) = rendered({"conversations": [HUMAN, call, answer, GPT]}, "sharegpt", chat)
    calls = [{"type": "function", "function": {"name": "weather", "arguments": {"day": "today"}}}]
    messages = [
        USER,
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "content": answer["value"]},
        ASSISTANT,
    ]
    assert whole(one) + "\n" == tokenizer.apply_chat_template(messages, tokenize=False)


@pytest.mark.parametrize(
    ("turn", "reason", "part"),
    [
        ({"from": "function_call", "value": "weather()"}, RejectReason.BAD_CONVERSATION, "is not JSON with a name"),
        ({"from": "narrator", "value": "x"}, RejectReason.BAD_CONVERSATION, "'narrator', which is not a role"),
        ({"role": "user", "content": "x"}, RejectReason.WRONG_TYPE, "turn 2 of 'conversations' is role, content"),
        ({"from": "gpt", "value": [{"type": "image_url"}]}, RejectReason.NOT_TEXT, "a part of type image_url"),
        ("x", RejectReason.WRONG_TYPE, "is str; expected the fields from and value"),
    ],
)
def test_turns_of_another_shape_are_refused(chat: ChatTemplate, turn: Any, reason: RejectReason, part: str) -> None:
    seen, detail = refused({"conversations": [HUMAN, GPT, turn]}, "sharegpt", chat)
    assert seen is reason and part in detail, detail


TOOL = {"name": "weather", "parameters": {"type": "object", "properties": {}}}


@pytest.mark.parametrize("value", [TOOL, [TOOL], json.dumps([TOOL]), [{"type": "function", "function": TOOL}]])
def test_tools_are_schemas_as_templates_take_them(value: Any) -> None:
    assert tools_of(value, "tools") == [{"type": "function", "function": TOOL}]


@pytest.mark.parametrize("value", [None, "", "[]", []])
def test_no_tools_are_none(value: Any) -> None:
    assert tools_of(value, "tools") is None


@pytest.mark.parametrize("value", ["weather", ["weather"], 3])
def test_tools_that_are_no_schemas_are_a_reject(value: Any) -> None:
    with pytest.raises(RowError, match="expected a list of tools"):
        tools_of(value, "tools")


TOOLED: list[tuple[Format, dict[str, Any]]] = [
    ("messages", {"messages": [USER, ASSISTANT]}),
    ("sharegpt", {"conversations": [HUMAN, GPT]}),
    ("orca", {"question": "Two?", "response": "2"}),
    ("prompt_completion", {"prompt": [USER], "completion": [ASSISTANT]}),
    ("swift_preference", {"messages": [USER, ASSISTANT], "rejected_response": "3"}),
]


@pytest.mark.parametrize(("form", "fields"), TOOLED)
def test_tools_reach_the_conversation(
    monkeypatch: pytest.MonkeyPatch, chat: ChatTemplate, form: Format, fields: dict[str, Any]
) -> None:
    seen: list[Conversation] = []

    def note(conversation: Conversation, chat: ChatTemplate) -> Rendered:
        seen.append(conversation)
        return Rendered(prompt="", response=str(len(seen)), segments=())

    monkeypatch.setattr(formats, "render_conversation", note)
    monkeypatch.setattr("davir_ray.data.pairs.render_conversation", note)
    rendered({**fields, "tools": json.dumps([TOOL])}, form, chat)
    assert seen and all(one.tools == [{"type": "function", "function": TOOL}] for one in seen)


def test_a_message_that_calls_tools_needs_no_content(chat: ChatTemplate) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    (one,) = rendered({"messages": [USER, call, {"role": "tool", "content": "1"}, ASSISTANT]}, "messages", chat)
    assert one.response == '{"name": "f", "arguments": "{}"}\n\n2'


@pytest.mark.parametrize("name", formats.MEDIA_COLUMNS)
@pytest.mark.parametrize("form", ["messages", "alpaca"])
def test_rows_with_images_or_sound_are_rejects(chat: ChatTemplate, name: str, form: Format) -> None:
    fields = {"messages": [USER, ASSISTANT], "instruction": "<image> What?", "output": "A cat."}
    assert refused({**fields, name: ["a"]}, form, chat) == (
        RejectReason.NOT_TEXT, f"the row has {name}; only text can be scored",
    )  # fmt: skip
    assert rendered({**fields, name: []}, form, chat) == rendered({**fields, name: None}, form, chat)


def test_a_column_that_later_rows_fill_is_a_reject_with_its_name(chat: ChatTemplate) -> None:
    reason, detail = refused({"question": "a", "answer": "b", "context": "c"}, "gsm8k", chat)
    assert reason is RejectReason.UNREAD_COLUMN and "'context' would change the prompt" in detail


def test_of_two_columns_with_the_system_message_neither_is_dropped(chat: ChatTemplate) -> None:
    fields = {"question": "Two?", "response": "2", "system": "Be kind.", "system_prompt": "Be brief."}
    reason, detail = refused(fields, "orca", chat)
    assert reason is RejectReason.UNREAD_COLUMN and "'system_prompt'" in detail
    reason, detail = refused({"messages": [SYSTEM, USER, ASSISTANT], "system": "Be brief."}, "messages", chat)
    assert reason is RejectReason.BAD_CONVERSATION and "different system messages" in detail


@pytest.mark.parametrize("history", ["text", [["a"]], [["a", None]]])
def test_a_history_of_another_shape_is_a_reject(chat: ChatTemplate, history: Any) -> None:
    fields = {"instruction": "a", "output": "b", "history": history}
    reason, detail = refused(fields, "alpaca", chat, chat=True)
    assert reason is RejectReason.WRONG_TYPE and "not a list of [prompt, response]" in detail


# --- what is scored --------------------------------------------------------------------------------------------------

TALK = [USER, ASSISTANT, *MORE, {"role": "user", "content": "Four?"}, {"role": "assistant", "content": "4"}]


def marked(**marks: Any) -> list[dict[str, Any]]:
    """The talk with marks on its first reply."""
    return [TALK[0], TALK[1] | marks, *TALK[2:]]


@pytest.mark.parametrize(
    "marks", [{"weight": 0}, {"weight": 0.0}, {"loss": False}, {"train": False}, {"weight": 1, "loss": False}]
)
def test_a_reply_that_the_data_mark_is_not_scored(marks: dict[str, Any]) -> None:
    assert scored_of(marked(**marks), 0, "marked") == (False, False, False, True, False, True)
    assert scored_of(marked(**marks), 0, "all") is None
    assert scored_of(marked(**marks), 0, "last") == (False, False, False, False, False, True)


@pytest.mark.parametrize("marks", [{}, {"weight": 1}, {"loss": True}, {"train": True}, {"loss": None}])
def test_all_replies_are_scored_where_no_mark_says_otherwise(marks: dict[str, Any]) -> None:
    assert scored_of(marked(**marks), 0, "marked") is None
    assert scored_of([TALK[0] | {"train": False}, *TALK[1:]], 0, "marked") is None, "marks of other roles are not read"


def test_a_masked_history_leaves_the_last_reply() -> None:
    assert scored_of(TALK, 0, "marked", mask_history=True) == (False, False, False, False, False, True)
    assert scored_of(TALK, 0, "all", mask_history=True) is None
    assert scored_of(TALK[:2], 0, "marked", mask_history=True) is None


def test_the_given_messages_are_not_scored_whatever_their_marks() -> None:
    assert scored_of(marked(loss=False), 2, "marked") is None
    assert scored_of(TALK, 2, "last") == (False, False, False, False, False, True)


@pytest.mark.parametrize("mark", [0.5, "no", 2, [False]])
def test_a_mark_that_is_neither_is_a_reject(mark: Any) -> None:
    with pytest.raises(RowError, match="weight of message 1 is") as caught:
        scored_of(marked(weight=mark), 0, "marked")
    assert caught.value.reason is RejectReason.WRONG_TYPE


LEFT_OUT: list[tuple[Format, dict[str, Any]]] = [
    ("messages", {"messages": [USER, {**ASSISTANT, "weight": 0}]}),
    ("sharegpt", {"conversations": [HUMAN, {**GPT, "loss": False}]}),
    ("messages", {"messages": [USER, ASSISTANT], "label": False}),
    ("sharegpt", {"conversations": [HUMAN, GPT], "kto_tag": False}),
    ("prompt_completion", {"prompt": "a", "completion": "b", "label": False}),
    ("alpaca", {"instruction": "a", "output": "b", "label": "False"}),
]


@pytest.mark.parametrize(("form", "fields"), LEFT_OUT)
def test_rows_that_the_data_mark_are_left_out(chat: ChatTemplate, form: Format, fields: dict[str, Any]) -> None:
    with pytest.raises(LeftOutError):
        rendered(fields, form, chat)


@pytest.mark.parametrize("label", [True, None, 0, 1, "spam", "True"])
def test_a_label_that_is_not_false_leaves_nothing_out(chat: ChatTemplate, label: Any) -> None:
    rendered({"messages": [USER, ASSISTANT], "label": label}, "messages", chat)


def test_turns_that_are_not_scored_are_counted() -> None:
    marks = scored_of(marked(weight=0), 0, "marked")
    assert Conversation(messages=marked(weight=0), column="m", scored=marks).num_left_out == 1
    assert Conversation(messages=TALK, column="m", given=2).num_left_out == 0
