"""One record → prompt and response text, cut into segments that are scored and segments that are not.

    alpaca            instruction, input, output        Stanford Alpaca's prompt, then the output
    gsm8k             question, answer                  a prompt of our own, then the answer
    prompt_response   two columns of any name           both unchanged
    messages          a list of {role, content}         the chat template; every assistant turn is scored
    preference        two responses to one prompt       two examples; see pairs.py

A format is a name in config/sources.py, one function here and one row of FORMATS. A record that cannot be rendered
raises RowError, which has one of the schema's reasons.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from davir_ray.config.sources import Format, Source
from davir_ray.data.chat import TODAY, ChatTemplate, render_conversation
from davir_ray.data.conversation import Conversation, messages_of
from davir_ray.data.pairs import render_pair
from davir_ray.data.rendered import Rendered, RowError, Segment, column
from davir_ray.schema import RejectReason

# Stanford Alpaca, train.py, PROMPT_DICT (github.com/tatsu-lab/stanford_alpaca). The response follows without a space.
ALPACA_PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)

ALPACA_PROMPT_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)

# Our own: neither GSM8K nor the DavIR paper states a prompt.
GSM8K_PROMPT = "Question: {question}\nAnswer:\n"

Fields = Mapping[str, Any]
"""A record by column name."""


def _alpaca(fields: Fields, source: Source, chat: ChatTemplate | None) -> tuple[Rendered]:
    return _plain(_alpaca_prompt(fields), _text(fields, "output"))


def _gsm8k(fields: Fields, source: Source, chat: ChatTemplate | None) -> tuple[Rendered]:
    return _plain(GSM8K_PROMPT.format(question=_text(fields, "question")), _text(fields, "answer"))


def _prompt_response(fields: Fields, source: Source, chat: ChatTemplate | None) -> tuple[Rendered]:
    return _plain(_text(fields, source.prompt_column), _text(fields, source.response_column))


def _messages(fields: Fields, source: Source, chat: ChatTemplate | None) -> tuple[Rendered]:
    assert chat is not None, "the format messages needs a chat template"
    name = source.messages_column
    return (render_conversation(Conversation(messages=messages_of(column(fields, name), name), column=name), chat),)


@dataclass(frozen=True, kw_only=True)
class FormatSpec:
    """Everything that the code knows about a format."""

    render: Callable[[Fields, Source, ChatTemplate | None], tuple[Rendered, ...]]
    """Function from a record to the text of its example, or of the two examples of a pair."""
    columns: dict[str, bool]
    """Columns that are read, and whether every row must have them; a name that ends in _column is the field of Source
    that names the column."""
    also: tuple[str, ...] = ()
    """What else the text depends on, besides the record and the chat template."""


FORMATS: dict[Format, FormatSpec] = {
    "alpaca": FormatSpec(
        render=_alpaca,
        columns={"instruction": True, "input": False, "output": True},
        also=(ALPACA_PROMPT_WITH_INPUT, ALPACA_PROMPT_WITHOUT_INPUT),
    ),
    "gsm8k": FormatSpec(render=_gsm8k, columns={"question": True, "answer": True}, also=(GSM8K_PROMPT,)),
    "prompt_response": FormatSpec(render=_prompt_response, columns={"prompt_column": True, "response_column": True}),
    "messages": FormatSpec(render=_messages, columns={"messages_column": True}, also=(TODAY.isoformat(),)),
    "preference": FormatSpec(
        render=render_pair,
        columns={"prompt_column": False, "chosen_column": True, "rejected_column": True},
        also=(TODAY.isoformat(),),
    ),
}


def render(fields: Fields, source: Source, chat: ChatTemplate | None) -> tuple[Rendered, ...]:
    """The text of one record in its source's format: one example, or the chosen and the rejected one of a pair.

    Raises RowError: missing_column (absent or null), wrong_type, empty_response (empty or white space only); with a
    chat template special_token_in_text and bad_conversation; for a pair also no_common_prompt and equal_responses.
    """
    return FORMATS[source.format].render(fields, source, chat)


def columns(source: Source) -> dict[str, bool]:
    """Columns that a source's format reads, and whether every row must have them."""
    found = FORMATS[source.format].columns.items()
    return {getattr(source, name) if name.endswith("_column") else name: needed for name, needed in found}


def rendering(source: Source) -> list[str]:
    """What the text of a source's examples depends on, besides its records and a chat template; for fingerprints."""
    spec = FORMATS[source.format]
    return [*(getattr(source, name) for name in spec.columns if name.endswith("_column")), *spec.also]


def render_prompt(fields: Fields, source: Source, chat: ChatTemplate | None) -> tuple[Rendered]:
    """Only the prompt of a record with `instruction`, possibly `input`, and no response; nothing is scored.

    In the format alpaca it is Stanford Alpaca's prompt; in the format messages it is a user's turn with the input
    below the instruction, followed by what the chat template writes before a reply. Raises RowError.
    """
    is_templated = source.format == "messages"
    if is_templated:
        assert chat is not None, "the format messages needs a chat template"
        turn = "\n\n".join(text for text in _instruction(fields) if text)
        if token := chat.find_special_token(turn):
            raise RowError(RejectReason.SPECIAL_TOKEN_IN_TEXT, f"the instruction contains {token!r}")
        prompt = chat.prompt([{"role": "user", "content": turn}])
    else:
        prompt = _alpaca_prompt(fields)
    return (Rendered(prompt=prompt, response="", segments=(Segment(prompt, False),), templated=is_templated),)


def _plain(prompt: str, response: str) -> tuple[Rendered]:
    """An example whose text is the prompt and the response, unchanged."""
    if not response.strip():
        raise RowError(RejectReason.EMPTY_RESPONSE, "the response is empty or white space only")
    return (Rendered(prompt=prompt, response=response, segments=(Segment(prompt, False), Segment(response, True))),)


def _alpaca_prompt(fields: Fields) -> str:
    instruction, context = _instruction(fields)
    template = ALPACA_PROMPT_WITH_INPUT if context else ALPACA_PROMPT_WITHOUT_INPUT
    return template.format(instruction=instruction, input=context)


def _instruction(fields: Fields) -> tuple[str, str]:
    """The instruction and its input, which may be empty."""
    return _text(fields, "instruction"), "" if fields.get("input") is None else _text(fields, "input")


def _text(fields: Fields, name: str) -> str:
    value = column(fields, name)
    if not isinstance(value, str):
        detail = f"column {name!r} has a value of type {type(value).__name__}; expected a string"
        raise RowError(RejectReason.WRONG_TYPE, detail)
    return value
