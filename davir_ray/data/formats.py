"""One record → prompt and response text, cut into segments that are scored and segments that are not.

    alpaca            instruction, input, output        Stanford Alpaca's prompt, then the output
    gsm8k             question, answer                  a prompt of ours, then the answer
    prompt_response   two columns of any name           as they stand
    messages          a list of {role, content}         the chat template; every assistant turn is scored

(pairs.py renders the format preference.)

A record that cannot be rendered raises RowError, which names one of the schema's reasons.
"""

from collections.abc import Callable, Mapping
from typing import Any

from davir_ray.config.sources import Format, Source
from davir_ray.data.chat import TODAY, ChatTemplate, messages_of, render_turns
from davir_ray.data.rendered import Rendered, RowError, Segment, shorten
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

# Ours: neither GSM8K nor the DavIR paper states a prompt.
GSM8K_PROMPT = "Question: {question}\nAnswer:\n"


def render(fields: Mapping[str, Any], source: Source, chat: "ChatTemplate | None") -> Rendered:
    """The prompt, response and segments of one record in its source's format.

    `chat` is used by the format messages only, which needs it. Raises RowError: missing_column (absent or null),
    wrong_type, empty_response (empty or white space only), and for messages special_token_in_text and bad_conversation.
    """
    if source.format == "messages":
        assert chat is not None, "the format messages needs a chat template"
        name = source.messages_column
        return render_turns(messages_of(column(fields, name), name), name, chat)
    prompt, response = _PROMPTERS[source.format](fields, source)
    if not response.strip():
        raise RowError(RejectReason.EMPTY_RESPONSE, "the response is empty or white space only")
    return Rendered(prompt, response, (Segment(prompt, False), Segment(response, True)))


def render_prompt(fields: Mapping[str, Any], source: Source, chat: "ChatTemplate | None") -> Rendered:
    """The prompt alone of a record with `instruction` and, where there is one, `input`: what a response would follow.

    In the format alpaca it is Stanford Alpaca's; in the format messages a user's turn, the input below the instruction,
    and whatever the chat template writes before a reply. Nothing is scored. Raises RowError.
    """
    if source.format != "messages":
        prompt = _alpaca_prompt(fields)
    else:
        assert chat is not None, "the format messages needs a chat template"
        turn = "\n\n".join(text for text in _instruction(fields) if text)
        if token := chat.find_special_token(turn):
            raise RowError(RejectReason.SPECIAL_TOKEN_IN_TEXT, f"the instruction spells {token!r}")
        prompt = chat.prompt([{"role": "user", "content": turn}])
    return Rendered(prompt, "", (Segment(prompt, False),))


def columns(source: Source) -> dict[str, bool]:
    """Columns that a source's format reads, and whether every row must have them."""
    named: dict[Format, dict[str, bool]] = {
        "alpaca": {"instruction": True, "input": False, "output": True},
        "gsm8k": {"question": True, "answer": True},
        "prompt_response": {source.prompt_column: True, source.response_column: True},
        "messages": {source.messages_column: True},
        "preference": {source.prompt_column: False, source.chosen_column: True, source.rejected_column: True},
    }
    return named[source.format]


def rendering(source: Source) -> list[str]:
    """What the text of a source's examples depends on beside its records and a chat template."""
    return {
        "alpaca": [ALPACA_PROMPT_WITH_INPUT, ALPACA_PROMPT_WITHOUT_INPUT],
        "gsm8k": [GSM8K_PROMPT],
        "prompt_response": [source.prompt_column, source.response_column],
        "messages": [source.messages_column, TODAY.isoformat()],
        "preference": [source.prompt_column, source.chosen_column, source.rejected_column, TODAY.isoformat()],
    }[source.format]


def _alpaca(fields: Mapping[str, Any], source: Source) -> tuple[str, str]:
    return _alpaca_prompt(fields), _text(fields, "output")


def _alpaca_prompt(fields: Mapping[str, Any]) -> str:
    instruction, context = _instruction(fields)
    template = ALPACA_PROMPT_WITH_INPUT if context else ALPACA_PROMPT_WITHOUT_INPUT
    return template.format(instruction=instruction, input=context)


def _instruction(fields: Mapping[str, Any]) -> tuple[str, str]:
    """The instruction and its input, which may be empty."""
    return _text(fields, "instruction"), "" if fields.get("input") is None else _text(fields, "input")


def _gsm8k(fields: Mapping[str, Any], source: Source) -> tuple[str, str]:
    return GSM8K_PROMPT.format(question=_text(fields, "question")), _text(fields, "answer")


def _prompt_response(fields: Mapping[str, Any], source: Source) -> tuple[str, str]:
    return _text(fields, source.prompt_column), _text(fields, source.response_column)


_PROMPTERS: dict[Format, Callable[[Mapping[str, Any], Source], tuple[str, str]]] = {
    "alpaca": _alpaca,
    "gsm8k": _gsm8k,
    "prompt_response": _prompt_response,
}


def column(fields: Mapping[str, Any], name: str) -> Any:
    """The value of a column; RowError missing_column where it is absent or null."""
    if fields.get(name) is None:
        fault = "is null" if name in fields else "is absent"
        seen = ", ".join(sorted(fields)) or "none"
        raise RowError(RejectReason.MISSING_COLUMN, f"column {name!r} {fault}; columns seen: {shorten(seen, 200)}")
    return fields[name]


def _text(fields: Mapping[str, Any], name: str) -> str:
    value = column(fields, name)
    if not isinstance(value, str):
        detail = f"column {name!r} holds a value of type {type(value).__name__}; expected a string"
        raise RowError(RejectReason.WRONG_TYPE, detail)
    return value
