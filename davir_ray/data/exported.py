"""One scored row → a row that a trainer reads: its text in the trainer's form, with its rank, score and losses.

    completion    prompt, completion             the text that was scored
    alpaca        instruction, input, output     as in the source
    messages      messages, perhaps tools        role and content, with whatever else a message of the source has
    alternating   the same                       user and assistant in turn, as LLaMA-Factory wants them
    sharegpt      conversations                  from and value

A record that has no turns in a form that is known here (see `_READERS`) becomes a user's turn, the prompt, and an
assistant's, the response. A row that cannot be put into the form raises RowError.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from davir_ray.config.export import Trainer
from davir_ray.config.sources import Format, Source
from davir_ray.data.conversation import Message, messages_of
from davir_ray.data.rendered import RowError
from davir_ray.schema import RejectReason

Form = Literal["completion", "alpaca", "messages", "alternating", "sharegpt"]

Fields = Mapping[str, Any]
"""A record by column name."""

SCORE_COLUMNS = (
    "rank", "davir", "rho_sum", "rho_mean", "base_nll", "reference_nll", "num_prompt_tokens", "num_response_tokens",
    "source", "example_id",
)  # fmt: skip
"""Columns of selected/ that every exported row has, after its text."""

_TEXTS: tuple[Format, ...] = ("alpaca", "gsm8k", "prompt_response")
"""Formats whose prompt and response are plain text, which a trainer of completions takes as it was scored."""

_SHAREGPT_ROLES = {"system": "system", "user": "human", "assistant": "gpt"}

_ROLES = {name: role for role, name in _SHAREGPT_ROLES.items()} | {role: role for role in _SHAREGPT_ROLES}


def form_of(trainer: Trainer, formats: Iterable[Format]) -> Form | None:
    """The form that a trainer takes the rows of these sources in; None: the columns of selected/."""
    found = set(formats)
    if trainer == "parquet":
        return None
    if trainer in ("axolotl", "llamafactory") and found == {"alpaca"}:
        return "alpaca"
    if trainer == "trl" and found <= {*_TEXTS}:
        return "completion"
    if trainer == "llamafactory":
        return "alternating"
    return "sharegpt" if trainer == "sharegpt" else "messages"


def needs_record(form: Form | None, format: Format) -> bool:
    """Whether a row of this format can be put into the form only with its record."""
    return form not in (None, "completion") and format not in ("gsm8k", "prompt_response")


def exported_text(form: Form, prompt: str, response: str, record: Fields, source: Source) -> dict[str, Any]:
    """The text of a row in a form; `record` is empty where none was kept."""
    if form == "completion":
        return {"prompt": prompt, "completion": response}
    if form == "alpaca":
        return {name: record.get(name) or "" for name in ("instruction", "input", "output")}
    messages = _turns(prompt, response, record, source)
    tools = record.get("tools")
    if form in ("sharegpt", "alternating") and tools is not None:
        raise _no_place("the record has tools, which this form has no place for")
    if form == "sharegpt":
        return {"conversations": [_sharegpt_turn(index, message) for index, message in enumerate(messages)]}
    if form == "alternating":
        _check_alternating(messages)
    return {"messages": messages} if tools is None else {"messages": messages, "tools": tools}


def _turns(prompt: str, response: str, record: Fields, source: Source) -> list[Message]:
    """The messages of a row, by what its record holds."""
    for read in _READERS:
        messages = read(record, source)
        if messages is not None:
            return messages
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def _messages(record: Fields, source: Source) -> list[Message] | None:
    """Lists of {role, content}."""
    for name in (source.messages_column, "messages", "conversations"):
        if _is_turns(record.get(name), "role"):
            return messages_of(record[name], name)
    return None


def _sharegpt(record: Fields, source: Source) -> list[Message] | None:
    """Lists of {from, value}."""
    for name in (source.messages_column, "conversations"):
        turns = record.get(name)
        if _is_turns(turns, "from"):
            system = record.get("system")
            first = [{"role": "system", "content": system}] if system else []
            turns = [{"role": _role(turn["from"], name), "content": turn.get("value")} for turn in record[name]]
            return messages_of([*first, *turns], name)
    return None


def _alpaca(record: Fields, source: Source) -> list[Message] | None:
    """Instruction, input and output; the input stands below the instruction."""
    if not all(isinstance(record.get(name), str) for name in ("instruction", "output")):
        return None
    prompt = "\n\n".join(text for text in (record["instruction"], record.get("input")) if text)
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": record["output"]}]


_READERS: tuple[Callable[[Fields, Source], list[Message] | None], ...] = (_messages, _sharegpt, _alpaca)
"""Each gives the messages of a record that it knows, else None. A new kind of record is a function here."""


def _is_turns(value: Any, key: str) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(turn, dict) and key in turn for turn in value)


def _role(name: Any, column: str) -> str:
    if name not in _ROLES:
        raise _no_place(f"{column!r} has a turn from {name!r}; expected {', '.join(_ROLES)}")
    return _ROLES[name]


def _sharegpt_turn(index: int, message: Message) -> dict[str, str]:
    role = message["role"]
    if role not in _SHAREGPT_ROLES:
        raise _no_place(f"message {index} is of the role {role!r}; sharegpt has {', '.join(_SHAREGPT_ROLES)}")
    _refuse_more(index, message)
    return {"from": _SHAREGPT_ROLES[role], "value": message["content"]}


def _check_alternating(messages: list[Message]) -> None:
    """RowError unless LLaMA-Factory keeps the row; it skips others with a line in its log."""
    for index, message in enumerate(messages):
        _refuse_more(index, message)
    turns = [message["role"] for message in messages]
    turns = turns[1:] if turns[:1] == ["system"] else turns
    if turns != ["user", "assistant"] * (len(turns) // 2) or not turns:
        raise _no_place(f"the turns are {', '.join(turns)}; LLaMA-Factory takes user and assistant in turn")


def _refuse_more(index: int, message: Message) -> None:
    if more := sorted(message.keys() - {"role", "content"}):
        raise _no_place(f"message {index} has {', '.join(more)}, which this form has no place for")


def _no_place(detail: str) -> RowError:
    return RowError(RejectReason.BAD_CONVERSATION, detail)
