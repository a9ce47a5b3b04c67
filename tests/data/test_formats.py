"""Record → text: what is scored and what is not, and a reason for every record that cannot be rendered."""

import gzip
import json
import pickle
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from davir_ray.config.sources import Format, FormatOption, Source
from davir_ray.data.chat import ChatTemplate
from davir_ray.data.conversation import Conversation
from davir_ray.data.formats import (
    ALPACA_PROMPT_WITH_INPUT,
    ALPACA_PROMPT_WITHOUT_INPUT,
    FORMATS,
    columns,
    render,
    rendering,
)
from davir_ray.data.rendered import Rendered, RowError, Segment
from davir_ray.errors import ModelError
from davir_ray.schema import RejectReason

ALPACA = Source(name="s", path="p", format="alpaca")
GSM8K = Source(name="s", path="p", format="gsm8k")
COLUMNS = Source(name="s", path="p", format="prompt_response", prompt_column="q", response_column="a")
MESSAGES = Source(name="s", path="p", format="messages")

CHATML = ChatTemplate(
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    {"eos_token": "<|im_end|>"},
    ("<|im_start|>", "<|im_end|>"),
)
LLAMA3 = ChatTemplate(
    "{{- bos_token }}"
    "{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date_string + '<|eot_id|>' }}"
    "{%- for m in messages %}"
    "{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}",
    {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    ("<|start_header_id|>", "<|end_header_id|>"),
)
MARKED = ChatTemplate(
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "A: {% generation %}{{ m['content'] + eos_token }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ 'U: ' + m['content'] + '\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}A: {% endif %}",
    {"eos_token": "</s>"},
)
LAST_TURN_ENDED = ChatTemplate(
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}"
    "{{ eos_token if loop.last and not add_generation_prompt else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
    {"eos_token": "</s>"},
)
UNSTABLE = ChatTemplate(
    "{{ messages | length }} messages\n{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
)
TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "2, or\n more"},
]


def one(rendered: Rendered) -> Rendered:
    """The text of a record that is one example."""
    return rendered


def plain(prompt: str, response: str) -> Rendered:
    return Rendered(prompt=prompt, response=response, segments=(Segment(prompt, False), Segment(response, True)))


def needed(source: Source) -> list[str]:
    return [name for name, is_needed in columns(source).items() if is_needed]


def chat(messages: Any, template: ChatTemplate = CHATML) -> Rendered:
    return one(*render({"messages": messages}, MESSAGES, template))


def refused(fields: Any, source: Source, template: ChatTemplate | None = None) -> tuple[RejectReason, str]:
    with pytest.raises(RowError) as caught:
        render(fields, source, template)
    return caught.value.reason, caught.value.detail


def scored(rendered: Rendered) -> list[str]:
    return [segment.text for segment in rendered.segments if segment.scored]


def whole(rendered: Rendered) -> str:
    return "".join(segment.text for segment in rendered.segments)


# --- the table of formats ---------------------------------------------------------------------------------------------


def test_every_format_of_the_options_is_in_the_table_with_its_columns() -> None:
    assert FORMATS.keys() == set(get_args(Format))
    assert set(get_args(FormatOption)) == {"auto", *FORMATS}


def test_what_the_text_depends_on_is_as_in_the_runs_that_there_are() -> None:
    """It is part of their fingerprints."""
    today = "2024-07-26T00:00:00"
    before: tuple[Format, ...] = ("alpaca", "gsm8k", "prompt_response", "messages", "preference")
    found = {name: rendering(Source(name="s", path="x", format=name)) for name in before}
    assert found == {
        "alpaca": [ALPACA_PROMPT_WITH_INPUT, ALPACA_PROMPT_WITHOUT_INPUT],
        "gsm8k": ["Question: {question}\nAnswer:\n"],
        "prompt_response": ["prompt", "response"],
        "messages": ["messages", today],
        "preference": ["prompt", "chosen", "rejected", today],
    }
    assert rendering(COLUMNS) == ["q", "a"]


def test_the_columns_that_are_read_are_known() -> None:
    assert needed(ALPACA) == ["instruction", "output"] and columns(ALPACA)["input"] is False
    assert needed(COLUMNS) == ["q", "a"]
    pairs = Source(name="s", path="x", format="preference", chosen_column="good")
    assert needed(pairs) == ["good", "rejected"] and columns(pairs)["prompt"] is False


# --- plain formats ---------------------------------------------------------------------------------------------------


def test_alpaca_is_stanfords_text() -> None:
    fields = {"instruction": "Add {x}.", "input": "1, 2", "output": " 3 "}
    prompt = (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd {x}.\n\n### Input:\n1, 2\n\n"
        "### Response:"
    )
    assert one(*render(fields, ALPACA, None)) == plain(prompt, " 3 ")


@pytest.mark.parametrize("fields", [{}, {"input": None}, {"input": ""}])
def test_alpaca_without_an_input(fields: dict[str, Any]) -> None:
    prompt = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nGo.\n\n### Response:"
    )
    assert one(*render({"instruction": "Go.", "output": "Gone."} | fields, ALPACA, None)).prompt == prompt


def test_gsm8k() -> None:
    assert one(*render({"question": "1+1?", "answer": "2"}, GSM8K, None)) == plain("Question: 1+1?\nAnswer:\n", "2")


def test_prompt_response_takes_the_columns_as_they_stand() -> None:
    assert one(*render({"q": " Q\n", "a": "A "}, COLUMNS, None)) == plain(" Q\n", "A ")
    assert one(*render({"q": "", "a": "A"}, COLUMNS, None)).segments == (Segment("", False), Segment("A", True))


@given(st.text(), st.text(), st.text())
def test_prompt_and_response_join_to_the_text_whatever_they_hold(instruction: str, context: str, output: str) -> None:
    fields = {"instruction": instruction, "input": context, "output": output}
    if not output.strip():
        assert refused(fields, ALPACA)[0] is RejectReason.EMPTY_RESPONSE
        return
    rendered = one(*render(fields, ALPACA, None))
    assert whole(rendered) == rendered.prompt + output
    template = ALPACA_PROMPT_WITH_INPUT if context else ALPACA_PROMPT_WITHOUT_INPUT
    assert len(rendered.prompt) == len(template.format(instruction="", input="")) + len(instruction) + len(context)


@pytest.mark.parametrize(
    ("source", "fields", "reason", "details"),
    [
        (ALPACA, {"output": "x", "z": 1}, RejectReason.MISSING_COLUMN, ["'instruction' is absent", "seen: output, z"]),
        (ALPACA, {"instruction": "x", "output": None}, RejectReason.MISSING_COLUMN, ["'output' is null"]),
        (ALPACA, {"instruction": "x", "output": [1]}, RejectReason.WRONG_TYPE, ["'output'", "list", "a string"]),
        (ALPACA, {"instruction": "x", "input": 3, "output": "y"}, RejectReason.WRONG_TYPE, ["'input'", "int"]),
        (ALPACA, {"instruction": "x", "output": " \n"}, RejectReason.EMPTY_RESPONSE, ["empty"]),
        (GSM8K, {}, RejectReason.MISSING_COLUMN, ["'question' is absent", "seen: none"]),
        (COLUMNS, {"q": "x", "answer": "y"}, RejectReason.MISSING_COLUMN, ["'a' is absent", "answer, q"]),
        (COLUMNS, {"q": 1.5, "a": "y"}, RejectReason.WRONG_TYPE, ["'q'", "float"]),
    ],
)
def test_what_a_record_lacks_is_named(source: Source, fields: Any, reason: RejectReason, details: list[str]) -> None:
    seen, detail = refused(fields, source)
    assert seen is reason
    assert all(part in detail for part in details), detail


def test_a_detail_stays_short() -> None:
    assert len(refused({f"column {i}": 1 for i in range(1000)}, ALPACA)[1]) < 300


def test_a_row_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(RowError(RejectReason.WRONG_TYPE, "why")))
    assert (error.reason, error.detail) == (RejectReason.WRONG_TYPE, "why")


# --- messages --------------------------------------------------------------------------------------------------------


def test_chatml_scores_each_assistant_turn_with_its_end_marker_only() -> None:
    rendered = chat(TALK)
    assert scored(rendered) == ["1<|im_end|>", "2, or\n more<|im_end|>"]
    assert rendered.prompt == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert rendered.response == "1\n\n2, or\n more"
    assert rendered.segments[2] == Segment("\n<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n", False)


def test_text_after_the_last_scored_turn_is_left_out() -> None:
    assert chat([*TALK, {"role": "user", "content": "Three?"}]) == chat(TALK)


def test_llama_3_has_its_bos_and_a_fixed_date() -> None:
    rendered = chat(TALK, LLAMA3)
    assert rendered.prompt.startswith(
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024<"
    )
    assert scored(rendered) == ["1<|eot_id|>", "2, or\n more<|eot_id|>"]


def test_the_date_is_fixed_also_for_templates_that_ask_the_clock() -> None:
    template = ChatTemplate("{{ strftime_now('%Y-%m-%d') }}|" + CHATML.template, CHATML.named_tokens)
    assert chat(TALK, template).prompt.startswith("2024-07-26|<|im_start|>system")


def test_generation_marks_give_the_spans() -> None:
    rendered = chat(TALK, MARKED)
    assert scored(rendered) == ["1</s>", "2, or\n more</s>"]
    assert whole(rendered) == "U: Be kind.\nU: One?\nA: 1</s>\nU: Two?\nA: 2, or\n more</s>"


def test_marks_that_begin_with_the_header_leave_the_header_of_the_first_reply_to_the_given_messages() -> None:
    header = MARKED.template.replace("A: {% generation %}", "{% generation %}A: ")
    template = ChatTemplate(header, MARKED.named_tokens)
    assert [
        segment.text for segment in template.segments(Conversation(messages=TALK, column="m")) if segment.scored
    ] == [
        "A: 1</s>",
        "A: 2, or\n more</s>",
    ]
    for given_messages, reply in ((2, "1</s>"), (4, "2, or\n more</s>")):
        talk = Conversation(messages=TALK[: given_messages + 1], column="m", given=given_messages)
        segments = template.segments(talk)
        assert segments == (Segment(template.prompt(TALK[:given_messages]), False), Segment(reply, True))


@given(
    st.lists(
        st.tuples(st.sampled_from(["user", "assistant"]), st.text(st.characters(exclude_characters="<"))), min_size=1
    )
)
def test_marks_and_prefixes_find_the_same_spans(turns: list[tuple[str, str]]) -> None:
    messages = [{"role": role, "content": content} for role, content in turns]
    unmarked = MARKED.template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    prefixed = ChatTemplate(unmarked, MARKED.named_tokens)
    replies = [content for role, content in turns if role == "assistant"]
    if not any(reply.strip() for reply in replies):
        expected = RejectReason.EMPTY_RESPONSE if replies else RejectReason.BAD_CONVERSATION
        assert refused({"messages": messages}, MESSAGES, MARKED)[0] is expected
        return
    rendered = chat(messages, MARKED)
    assert rendered == chat(messages, prefixed)
    assert scored(rendered) == [f"{reply}</s>" for reply in replies]


def test_a_template_that_ends_only_the_last_turn_has_no_marker_inside() -> None:
    assert scored(chat(TALK, LAST_TURN_ENDED)) == ["1", "2, or\n more</s>"]


def test_a_turn_whose_last_special_token_is_not_its_end_is_not_cut() -> None:
    headed = ChatTemplate(
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '\n' }}{% endfor %}",
        special_tokens=("<|user|>", "<|assistant|>"),
    )
    assert scored(chat(TALK, headed)) == ["<|assistant|>1\n", "<|assistant|>2, or\n more\n"]


def test_a_template_without_special_tokens_scores_to_the_turns_end() -> None:
    assert scored(chat(TALK, ChatTemplate(CHATML.template))) == ["1<|im_end|>\n", "2, or\n more<|im_end|>\n"]


def test_a_template_that_is_not_stable_is_refused_with_the_difference_shown() -> None:
    reason, detail = refused({"messages": TALK}, MESSAGES, UNSTABLE)
    assert reason is RejectReason.BAD_CONVERSATION
    assert (
        "message 2" in detail and "'2 messages" in detail and "'5 messages" in detail and "generation marks" in detail
    )


@pytest.mark.parametrize(
    ("forgets", "told"), [("true", "does not write message 0"), ("m['role'] == 'assistant'", "when it continues")]
)
def test_a_template_that_drops_earlier_text_is_refused(forgets: str, told: str) -> None:
    kept = f"('…' if {forgets} and loop.index <= messages | length - 2 else m['content'])"
    forgetful = CHATML.template.replace("m['content']", kept)
    reason, detail = refused({"messages": TALK}, MESSAGES, ChatTemplate(forgetful, CHATML.named_tokens))
    assert reason is RejectReason.BAD_CONVERSATION and told in detail


@pytest.mark.parametrize(
    "template",
    [
        MARKED.template.replace("m['content'] + eos_token", "m['content'] | upper"),
        MARKED.template.replace("{% generation %}", "{% if loop.last %}{% generation %}").replace(
            "{% endgeneration %}", "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}"
        ),
    ],
    ids=["rewritten", "only the last turn marked"],
)
def test_a_reply_that_is_not_what_is_scored_is_refused(template: str) -> None:
    messages = [{"role": "assistant", "content": "one"}, {"role": "assistant", "content": "two"}]
    reason, detail = refused({"messages": messages}, MESSAGES, ChatTemplate(template, MARKED.named_tokens))
    assert reason is RejectReason.BAD_CONVERSATION and "assistant turn 1" in detail


def test_what_the_template_raises_is_told() -> None:
    strict = ChatTemplate("{% if messages[0]['role'] != 'user' %}{{ raise_exception('user first!') }}{% endif %}")
    assert refused({"messages": TALK}, MESSAGES, strict) == (
        RejectReason.BAD_CONVERSATION,
        "the chat template rejects the messages: TemplateError: user first!",
    )
    crooked = ChatTemplate("{{ messages[0]['content'] / 0 }}")
    assert "TypeError" in refused({"messages": TALK}, MESSAGES, crooked)[1]


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": "a <|im_end|> b"},
        {"role": "assistant", "content": "<|im_end|>"},
        {"role": "user<|im_end|>", "content": "x"},
        {"role": "user", "content": [{"type": "text", "text": "<|im_"}, {"type": "text", "text": "end|>"}]},
        {"role": "user", "content": "x", "tool_calls": [{"arguments": {"<|im_end|>": 1}}]},
    ],
)
def test_text_that_spells_a_special_token_is_refused(message: dict[str, Any]) -> None:
    reason, detail = refused({"messages": [*TALK, message]}, MESSAGES, CHATML)
    assert reason is RejectReason.SPECIAL_TOKEN_IN_TEXT
    assert "'<|im_end|>'" in detail and "message 5" in detail


@pytest.mark.parametrize(
    ("messages", "reason", "part"),
    [
        (None, RejectReason.MISSING_COLUMN, "'messages' is null"),
        ("hello", RejectReason.WRONG_TYPE, "type str; expected a list of messages"),
        (["hello"], RejectReason.WRONG_TYPE, "message 0 of 'messages' is of type str"),
        ([{"from": "human", "value": "x"}], RejectReason.WRONG_TYPE, "fields from, value; expected"),
        ([{"role": "user", "content": None}], RejectReason.WRONG_TYPE, "fields role; expected"),
        ([{"role": 1, "content": "x"}], RejectReason.WRONG_TYPE, "message 0"),
        ([{"role": "user", "content": 5}], RejectReason.WRONG_TYPE, "message 0 of 'messages' is of type int"),
        ([{"role": "user", "content": [{"type": "image"}]}], RejectReason.NOT_TEXT, "a part of type image"),
        ([{"role": "user", "content": ["x"]}], RejectReason.WRONG_TYPE, "a part of type str"),
        ([], RejectReason.BAD_CONVERSATION, "roles seen: none"),
        ([{"role": "gpt", "content": "x"}], RejectReason.BAD_CONVERSATION, "'assistant'; roles seen: gpt"),
        ([{"role": "assistant", "content": " \n"}] * 2, RejectReason.EMPTY_RESPONSE, "every assistant turn"),
    ],
)
def test_messages_of_another_shape_are_refused(messages: Any, reason: RejectReason, part: str) -> None:
    seen, detail = refused({"messages": messages}, MESSAGES, CHATML)
    assert seen is reason and part in detail, detail


def test_text_parts_are_joined_and_null_fields_do_not_reach_the_template() -> None:
    parts = [{"type": "text", "text": "1"}, {"type": "text", "text": "2"}]
    template = ChatTemplate("{% for m in messages %}{{ m.tool_calls is defined }}{{ m.content }}{% endfor %}")
    rendered = chat([{"role": "assistant", "content": parts, "tool_calls": None}], template)
    assert (rendered.response, whole(rendered)) == ("12", "False12")


def test_an_empty_turn_among_others_scores_its_end_marker() -> None:
    messages = [{"role": "assistant", "content": ""}, {"role": "assistant", "content": "x"}]
    assert scored(chat(messages)) == ["<|im_end|>", "x<|im_end|>"]


# --- from a tokenizer ------------------------------------------------------------------------------------------------


def tokenizer() -> PreTrainedTokenizerFast:
    tokens = Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>"))
    tokens.add_special_tokens([AddedToken("<|header|>", special=True)])
    tokens.add_tokens([AddedToken("<think>", special=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokens, eos_token="</s>", bos_token="<s>", extra_special_tokens=["<|extra|>"]
    )


def test_a_tokenizer_gives_its_template_and_all_its_special_tokens() -> None:
    tokens = tokenizer()
    tokens.chat_template = MARKED.template
    template = ChatTemplate.from_tokenizer(tokens, None)
    assert template.template == MARKED.template
    assert template.named_tokens == {"eos_token": "</s>", "bos_token": "<s>"}
    spelt = [template.find_special_token(f"a {token} b") for token in ("<s>", "</s>", "<|header|>", "<|extra|>")]
    assert spelt == ["<s>", "</s>", "<|header|>", "<|extra|>"]
    assert template.find_special_token("a <think> b") is None
    assert chat(TALK, template) == chat(TALK, MARKED)
    assert ChatTemplate.from_tokenizer(tokens, CHATML.template).template == CHATML.template


def test_the_text_is_what_transformers_writes() -> None:
    tokens = tokenizer()
    tokens.chat_template = MARKED.template
    written = tokens.apply_chat_template(TALK, tokenize=False)
    assert written == whole(chat(TALK, ChatTemplate.from_tokenizer(tokens, None))) + "\n"


def test_a_tokenizer_without_a_template_is_the_users_error() -> None:
    with pytest.raises(ModelError, match=r"no chat template .*give one with --chat_template"):
        ChatTemplate.from_tokenizer(tokenizer(), None)


def test_a_broken_template_is_the_users_error_before_any_row() -> None:
    with pytest.raises(ModelError, match=r"not valid Jinja .line 2: .*--chat_template"):
        ChatTemplate("{{ bos_token }}\n{% for m in %}")


def test_a_template_survives_pickling() -> None:
    chat(TALK, MARKED)
    assert chat(TALK, pickle.loads(pickle.dumps(MARKED))) == chat(TALK, MARKED)


# --- real data -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "source", "response"),
    [("alpaca_9k", ALPACA, "output"), ("gsm8k_train", GSM8K, "answer"), ("gsm8k_test", GSM8K, "answer")],
)
def test_real_rows_render(data_folder: Path, name: str, source: Source, response: str) -> None:
    rejected = 0
    with gzip.open(data_folder / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        for fields in map(json.loads, lines):
            if not fields[response].strip():
                rejected += refused(fields, source)[0] is RejectReason.EMPTY_RESPONSE
                continue
            rendered = one(*render(fields, source, None))
            assert whole(rendered).endswith(fields[response]) and rendered.response == fields[response]
            messages = [
                {"role": "user", "content": rendered.prompt},
                {"role": "assistant", "content": rendered.response},
            ]
            assert scored(chat(messages)) == [f"{rendered.response}<|im_end|>"]
    assert rejected < 10


def test_the_token_that_ends_a_turn() -> None:
    assert CHATML.turn_end() == "<|im_end|>"
    assert ChatTemplate(CHATML.template).turn_end() is None, "no special token is known"
    assert ChatTemplate("{{ raise_exception('no') }}", CHATML.named_tokens).turn_end() is None
