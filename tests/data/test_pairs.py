"""Preference records: every form gives the same prompt twice, what follows it is scored, a bad pair says why."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from davir_ray.config.sources import Source
from davir_ray.data.chat import ChatTemplate
from davir_ray.data.files import Slice, list_files
from davir_ray.data.formats import render
from davir_ray.data.reader import ExampleReader, ExampleRows, stable_id
from davir_ray.data.records import Reject
from davir_ray.data.rendered import Rendered, RowError
from davir_ray.data.tokens import Encoder
from davir_ray.schema import PAIRS, RejectReason

SOURCE = Source(name="s", path="x", format="preference")
CHATML = ChatTemplate(
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    special_tokens=("<|im_start|>", "<|im_end|>"),
)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def scored(rendered: Rendered) -> list[str]:
    return [segment.text for segment in rendered.segments if segment.scored]


def refused(fields: dict[str, Any], chat: ChatTemplate | None = None) -> tuple[RejectReason, str]:
    with pytest.raises(RowError) as raised:
        render(fields, SOURCE, chat)
    return raised.value.reason, raised.value.detail


def test_a_prompt_with_two_answers_stands_as_it_is() -> None:
    chosen, rejected = render({"prompt": "Q: ", "chosen": " yes", "rejected": "no"}, SOURCE, None)
    assert [chosen.prompt, rejected.prompt, chosen.templated] == ["Q: ", "Q: ", False]
    assert [scored(chosen), scored(rejected)] == [[" yes"], ["no"]]


def test_dialogues_share_what_stands_before_the_assistant_turn_where_they_part() -> None:
    before = "\n\nHuman: a\n\nAssistant: the same\n\nHuman: b\n\nAssistant:"
    chosen, rejected = render({"chosen": f"{before} One.", "rejected": f"{before} Once."}, SOURCE, None)
    assert chosen.prompt == rejected.prompt == before
    assert [scored(chosen), scored(rejected)] == [[" One."], [" Once."]]


def test_a_dialogue_may_have_its_prompt_in_a_column_too() -> None:
    prompt = "\n\nHuman: a\n\nAssistant:"
    whole = {"chosen": f"{prompt} One.", "rejected": f"{prompt} Two."}
    expected = render(whole, SOURCE, None)
    assert render({**whole, "prompt": prompt}, SOURCE, None) == expected
    assert render({**whole, "prompt": ""}, SOURCE, None) == expected
    assert render({"prompt": prompt, "chosen": " One.", "rejected": " Two."}, SOURCE, None) == expected


@pytest.mark.parametrize("prompt", ["\n\nHuman: a", "Human: a\n\nAssistant:"])
def test_the_column_may_hold_the_prompt_without_its_marks_and_line_breaks(prompt: str) -> None:
    whole = {"chosen": "\n\nHuman: a\n\nAssistant: One.", "rejected": "\n\nHuman: a\n\nAssistant: Two."}
    assert render({**whole, "prompt": prompt}, SOURCE, None) == render(whole, SOURCE, None)


@pytest.mark.parametrize(
    ("prompt", "repeated", "kept"),
    [
        ("Question: x\nAnswer:", "Question: x\nAnswer:", "Question: x\nAnswer:"),
        ("Question: x\nAnswer: ", "Question: x\nAnswer: ", "Question: x\nAnswer: "),
        ("\nQuestion: x\n", "Question: x", "Question: x"),
        ("Question: x", "\n\nQuestion: x", "Question: x"),
    ],
)
def test_a_prompt_that_both_responses_repeat_is_kept_once(prompt: str, repeated: str, kept: str) -> None:
    fields = {"prompt": prompt, "chosen": f"{repeated} yes", "rejected": f"{repeated}no"}
    chosen, rejected = render(fields, SOURCE, None)
    assert chosen.prompt == rejected.prompt == kept
    assert [scored(chosen), scored(rejected)] == [[" yes"], ["no"]]
    assert [chosen.response, rejected.response] == [" yes", "no"]


def test_an_answer_may_begin_with_a_short_prompt() -> None:
    fields = {"prompt": "I  am  not", "chosen": "I  am  not sure.", "rejected": "No."}
    assert scored(render(fields, SOURCE, None)[0]) == ["I  am  not sure."]
    assert refused({**fields, "prompt": "I  am  not su"})[0] is RejectReason.NO_COMMON_PROMPT


@pytest.mark.parametrize(
    ("chosen", "rejected", "end"),
    [
        (" One.", " One. More.", ""),
        (" One.", " One.\n\nHumans differ.", ""),
        (" One.\n\nHuman: b\n\nAssistant: Two.", " One. More.", ""),
        (
            " One.\n\nHuman: b\n\nAssistant: Two.",
            " One.\n\nHuman: b\n\nAssistant: 2.",
            " One.\n\nHuman: b\n\nAssistant:",
        ),
    ],
    ids=["the same turn goes on", "a mark that is none", "the turn ends in one", "a later turn"],
)
def test_dialogues_may_part_anywhere_in_an_assistant_s_turn(chosen: str, rejected: str, end: str) -> None:
    before = "\n\nHuman: a\n\nAssistant:"
    chosen_one, rejected_one = render({"chosen": before + chosen, "rejected": before + rejected}, SOURCE, None)
    assert chosen_one.prompt == rejected_one.prompt == before + end
    assert chosen_one != rejected_one


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        (" One.\n\nHuman: b\n\nAssistant: Two.", " One.\n\nHuman: c\n\nAssistant: Three."),
        (" One.\n\nHuman: b\n\nAssistant: Two.", " One.\n\nHuman: b or c\n\nAssistant: Three."),
        (" One.\n\nHuman: b\n\nAssistant: Two.", " One."),
        (" One.\n\nHuman: b\n\nAssistant: Two.", " One.\n"),
        (" One. \n\nHuman: b\n\nAssistant: Two.", " One.\n\nHuman: c\n\nAssistant: Three."),
        (" One.\n\nHuman: b", " One.\n\nAssistant: Two."),
    ],
    ids=["questions", "a longer question", "one ends", "one ends in a line break", "space", "speakers"],
)
@pytest.mark.parametrize("prompt", [None, "\n\nHuman: a\n\nAssistant:"])
def test_dialogues_that_part_in_another_turn_answer_different_questions(
    chosen: str, rejected: str, prompt: str | None
) -> None:
    both = [f"\n\nHuman: a\n\nAssistant:{text}" for text in (chosen, rejected)]
    for one, other in (both, both[::-1]):
        reason, detail = refused({"prompt": prompt, "chosen": one, "rejected": other})
        assert reason is RejectReason.NO_COMMON_PROMPT
        assert "the first turn that differs" in detail


def test_of_a_dialogue_that_goes_on_only_the_assistants_turns_are_scored() -> None:
    before = "\n\nHuman: a\n\nAssistant:"
    longer = f"{before} One.\n\nHuman: b\n\nAssistant: Two.\n\nHuman: bye"
    chosen, rejected = render({"chosen": longer, "rejected": f"{before} No."}, SOURCE, None)
    assert scored(chosen) == [" One.", " Two."]
    assert "".join(segment.text for segment in chosen.segments) == longer.removesuffix("\n\nHuman: bye")
    assert rejected.prompt == chosen.prompt == before


@pytest.mark.parametrize(
    "fields",
    [
        {"chosen": [user("hi"), assistant("yes")], "rejected": [user("hi"), assistant("no")]},
        {"prompt": "hi", "chosen": [user("hi"), assistant("yes")], "rejected": [user("hi"), assistant("no")]},
        {"prompt": "hi", "chosen": [assistant("yes")], "rejected": [assistant("no")]},
        {"prompt": [user("hi")], "chosen": [assistant("yes")], "rejected": [assistant("no")]},
        {"prompt": [user("hi")], "chosen": [user("hi"), assistant("yes")], "rejected": [user("hi"), assistant("no")]},
        {"prompt": "\nhi ", "chosen": [user("hi"), assistant("yes")], "rejected": [user("hi"), assistant("no")]},
        {"prompt": " ", "chosen": [user("hi"), assistant("yes")], "rejected": [user("hi"), assistant("no")]},
        {"prompt": [user("hi")], "chosen": [assistant("yes")], "rejected": [user("hi"), assistant("no")]},
    ],
    ids=[
        "whole conversations",
        "text repeated",
        "prompt as text",
        "prompt as messages",
        "messages repeated",
        "text repeated but for space",
        "blank prompt",
        "messages repeated by one",
    ],
)
def test_all_forms_of_messages_are_the_same_pair(fields: dict[str, Any]) -> None:
    chosen, rejected = render(fields, SOURCE, CHATML)
    assert chosen.templated and rejected.templated
    assert chosen.prompt == rejected.prompt == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert [scored(chosen), scored(rejected)] == [["yes<|im_end|>"], ["no<|im_end|>"]]


@pytest.mark.parametrize(
    ("prompt", "repeated"),
    [
        ([system("s"), user("hi")], [user("hi")]),
        ([system("s"), user("hi")], [system("s"), user("hi")]),
        ([user("a"), assistant("b"), user("a")], [user("a")]),
        ([user("a"), assistant("b"), user("c")], [assistant("b"), user("c")]),
        ([user("a"), assistant("b")], []),
        ("hi", [system("s"), user("hi")]),
        ("hi", [assistant("b"), user("hi")]),
    ],
)
def test_a_conversation_may_repeat_the_end_of_its_prompt(prompt: Any, repeated: list[Any]) -> None:
    fields = {"chosen": [*repeated, assistant("yes")], "rejected": [*repeated, assistant("no")]}
    whole = repeated if isinstance(prompt, str) else prompt
    chosen_one, rejected_one = render({**fields, "prompt": prompt}, SOURCE, CHATML)
    assert chosen_one.prompt == rejected_one.prompt == CHATML.prompt(whole)
    assert [scored(chosen_one), scored(rejected_one)] == [["yes<|im_end|>"], ["no<|im_end|>"]]


def test_an_assistant_may_say_the_same_again() -> None:
    fields = {"prompt": [user("a"), assistant("b")], "chosen": [assistant("b")], "rejected": [assistant("c")]}
    assert scored(render(fields, SOURCE, CHATML)[0]) == ["b<|im_end|>"]


def test_assistant_turns_of_the_prompt_are_not_scored() -> None:
    before = [user("a"), assistant("the same"), user("b")]
    fields = {"chosen": [*before, assistant("one")], "rejected": [*before, assistant("two")]}
    for rendered, answer in zip(render(fields, SOURCE, CHATML), ("one", "two"), strict=True):
        assert scored(rendered) == [f"{answer}<|im_end|>"]
        assert "the same" in rendered.prompt


def test_a_template_that_marks_generations_scores_none_of_the_prompt() -> None:
    marked = ChatTemplate(
        "{% for m in messages %}{% if m.role == 'assistant' %}A:{% generation %}{{ m.content }};{% endgeneration %}"
        "{% else %}U:{{ m.content }};{% endif %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
    )
    before = [user("a"), assistant("the same"), user("b")]
    fields = {"chosen": [*before, assistant("one")], "rejected": [*before, assistant("two")]}
    assert scored(render(fields, SOURCE, marked)[0]) == ["one;"]


@pytest.mark.parametrize(
    ("fields", "reason", "told"),
    [
        ({"chosen": "a"}, RejectReason.MISSING_COLUMN, "rejected"),
        ({"chosen": "a", "rejected": ["b"]}, RejectReason.WRONG_TYPE, "str and list"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, RejectReason.WRONG_TYPE, "int"),
        ({"prompt": " ", "chosen": "a", "rejected": "b"}, RejectReason.NO_COMMON_PROMPT, "no prompt"),
        ({"prompt": "p", "chosen": "a ", "rejected": " a"}, RejectReason.EQUAL_RESPONSES, "same"),
        ({"prompt": "p", "chosen": "a", "rejected": " \n"}, RejectReason.EMPTY_RESPONSE, "rejected"),
        ({"prompt": "p", "chosen": "", "rejected": "b"}, RejectReason.EMPTY_RESPONSE, "chosen"),
        ({"chosen": "The sky is blue.", "rejected": "The sky is green."}, RejectReason.NO_COMMON_PROMPT, "first 11"),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: x", "rejected": "\n\nHuman: b\n\nAssistant: y"},
            RejectReason.NO_COMMON_PROMPT,
            "no prompt",
        ),
        (
            {"prompt": "Question: x", "chosen": "Question: x. Yes.", "rejected": "No."},
            RejectReason.NO_COMMON_PROMPT,
            "'chosen' begins with the text of 'prompt' and 'rejected' does not",
        ),
        (
            {"prompt": "Question: x", "chosen": "Yes.", "rejected": " Question: x. No."},
            RejectReason.NO_COMMON_PROMPT,
            "'rejected' begins with the text of 'prompt' and 'chosen' does not",
        ),
        (
            {"prompt": "Question: x", "chosen": "Question: x", "rejected": "Question: x y"},
            RejectReason.EMPTY_RESPONSE,
            "chosen",
        ),
        ({"chosen": "\n\nAssistant: x", "rejected": "\n\nAssistant: x"}, RejectReason.EQUAL_RESPONSES, "same"),
        ({"chosen": "\n\nAssistant: x", "rejected": "\n\nAssistant: x\n"}, RejectReason.EQUAL_RESPONSES, "same"),
        ({"chosen": [user("a")], "rejected": [user("b")]}, RejectReason.BAD_CONVERSATION, "--chat_template"),
    ],
)
def test_a_bad_pair_says_why(fields: dict[str, Any], reason: RejectReason, told: str) -> None:
    found, detail = refused(fields)
    assert found is reason
    assert told in detail


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        ([user("a"), assistant("x")], [user("b"), assistant("y")], RejectReason.NO_COMMON_PROMPT),
        ([user("a"), assistant("x")], [user("a"), assistant("x")], RejectReason.EQUAL_RESPONSES),
        ([user("a"), assistant("x")], [user("a"), user("b")], RejectReason.NO_COMMON_PROMPT),
        ([user("a"), assistant("x")], [user("a"), assistant(" ")], RejectReason.EMPTY_RESPONSE),
        ([user("a"), assistant("<|im_end|>")], [user("a"), assistant("x")], RejectReason.SPECIAL_TOKEN_IN_TEXT),
        ([user("a"), assistant("x")], [{"role": "user"}], RejectReason.WRONG_TYPE),
    ],
)
def test_bad_conversations_say_why(chosen: list[Any], rejected: list[Any], reason: RejectReason) -> None:
    assert refused({"chosen": chosen, "rejected": rejected}, CHATML)[0] is reason


X, Y = [assistant("x")], [assistant("y")]


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected", "told"),
    [
        (" ", X, Y, "no prompt"),
        ("\n", [assistant("b"), *X], [assistant("b"), *Y], "no prompt"),
        (None, X, Y, "no prompt"),
        ("hi", [user("hello"), *X], [user("hello"), *Y], "'chosen' begins with a message of the role 'user', 'hello'"),
        ("hi", X, [user("hello"), *Y], "'rejected' begins with a message of the role 'user', 'hello'"),
        ("hi", [system("hi"), *X], [system("hi"), *Y], "the role 'system'"),
        ([user("hi")], [user("hello"), *X], [user("hello"), *Y], "the last message of the prompt is 'hi'"),
        ([system("s"), user("hi")], [system("s"), *X], [system("s"), *Y], "the role 'system', 's'"),
        (None, [user("a"), *X, user("b"), *X], [user("a"), *X, user("c"), *Y], "share their first 2 messages"),
        (None, [user("a"), *X, user("b"), *Y], [user("a"), *X], "followed by user and the end"),
        (None, [user("a"), *X], [user("a"), *X, *Y], "followed by the end and assistant"),
        ([user("a")], [], Y, "followed by the end and assistant"),
        (None, [user("a"), assistant("x "), user("b"), *X], [user("a"), *X, user("c"), *Y], "more than white space"),
    ],
)
def test_conversations_without_a_common_prompt_say_what_they_have(
    prompt: Any, chosen: list[Any], rejected: list[Any], told: str
) -> None:
    reason, detail = refused({"prompt": prompt, "chosen": chosen, "rejected": rejected}, CHATML)
    assert reason is RejectReason.NO_COMMON_PROMPT
    assert told in detail


def test_a_prompt_beside_messages_is_text_or_messages() -> None:
    reason, detail = refused({"prompt": 3, "chosen": [user("a"), *X], "rejected": [user("a"), *Y]}, CHATML)
    assert reason is RejectReason.WRONG_TYPE
    assert "'prompt' has a value of type int" in detail


def read(tokenizer: PreTrainedTokenizerFast, file: Path, max_tokens: int = 400) -> list[ExampleRows | Reject]:
    source = Source(name="s", path=str(file), format="preference")
    reader = ExampleReader(Encoder(tokenizer, max_tokens), None, keep_record=True)
    return list(reader.read(source, [Slice(one) for one in list_files(source)], None))


def test_the_rows_of_a_pair_have_its_id_their_own_and_the_same_prompt_tokens(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps({"prompt": "Say:", "chosen": " one", "rejected": " another"}))
    ((chosen, rejected),) = read(tokenizer, file)
    assert set(chosen) == set(rejected) == set(PAIRS.names)
    assert chosen["pair_id"] == rejected["pair_id"] == stable_id("s", "pairs.jsonl", 0)
    assert [chosen["role"], rejected["role"]] == ["chosen", "rejected"]
    assert chosen["example_id"] != rejected["example_id"]
    assert json.loads(chosen["record"])["chosen"] == " one"
    assert rejected["record"] is None
    start = chosen["num_prompt_tokens"]
    assert np.array_equal(chosen["input_ids"][:start], rejected["input_ids"][:start])
    for row in (chosen, rejected):
        assert row["response_spans"] == [start, len(row["input_ids"])]
        assert row["input_ids"][-1] == tokenizer.eos_token_id


def test_answers_that_part_beyond_the_token_limit_are_equal(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps({"prompt": "p", "chosen": "a b c d e f g x", "rejected": "a b c d e f g y"}))
    (cut,) = read(tokenizer, file, max_tokens=6)
    assert isinstance(cut, Reject) and cut.reason is RejectReason.EQUAL_RESPONSES
    assert not isinstance(read(tokenizer, file)[0], Reject)


def test_real_dialogues_become_pairs(tokenizer: PreTrainedTokenizerFast, data_folder: Path, tmp_path: Path) -> None:
    file = data_folder / "hh_harmless_pairs_1k.jsonl.gz"
    with gzip.open(file, "rt") as lines:
        records = [json.loads(line) for line in lines]
    items = read(tokenizer, file, max_tokens=4000)
    assert len(items) == len(records)
    rejects = [item for item in items if isinstance(item, Reject)]
    assert {reject.reason for reject in rejects} == {RejectReason.EMPTY_RESPONSE}
    for record, item in zip(records, items, strict=True):
        if isinstance(item, Reject):
            continue
        for row, role in zip(item, ("chosen", "rejected"), strict=True):
            # In this set the two part in the last turn: an independent reading of what is the answer.
            prompt, _, response = record[role].rpartition("\n\nAssistant:")
            assert row["response"] == response
            assert row["prompt"] == f"{prompt}\n\nAssistant:"
