"""Conversations as chat templates take them: messages, and what else a template may write, such as tools."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from davir_ray.config.prepare import ScoreTurns
from davir_ray.data.rendered import LeftOutError, RowError
from davir_ray.schema import RejectReason
from davir_ray.text import shorten

Message = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """One conversation, and which of its messages are scored."""

    messages: list[Message]
    """Each with `role`, `content` (null only beside tool calls) and what else a template may read; see messages_of."""
    column: str
    """The column that it comes from, for errors."""
    tools: list[Any] | None = None
    """The tools that the assistant may call, as JSON schemas."""
    given: int = 0
    """The number of messages at the beginning that are the prompt, whoever wrote them."""
    scored: tuple[bool, ...] | None = None
    """Whether each of the assistant's messages after the given ones is scored; None: all are."""

    def is_scored(self, index: int) -> bool:
        """Whether the message at this index is scored; only the assistant's are."""
        if index < self.given or self.messages[index]["role"] != "assistant":
            return False
        return self.scored is None or self.scored[index]

    @property
    def num_left_out(self) -> int:
        """Number of the assistant's messages after the given ones that are not scored."""
        after = range(self.given, len(self.messages))
        return sum(self.messages[index]["role"] == "assistant" and not self.is_scored(index) for index in after)

    def replies(self) -> list[str]:
        """The contents of the messages that are scored, and the tool calls that they make, as JSON."""
        return [reply_of(message) for index, message in enumerate(self.messages) if self.is_scored(index)]


def messages_of(value: Any, column: str) -> list[Message]:
    """The messages with their contents as strings, null only beside tool calls.

    The value is a list of messages, or its JSON text. Other fields that are not null reach the template unchanged; the
    function_call of OpenAI's older form becomes a tool call. Raises RowError wrong_type and not_text.
    """
    messages = []
    for index, message in enumerate(_items(value, column)):
        where = f"message {index} of {column!r}"
        if not isinstance(message, dict):
            raise _wrong_message(f"{where} is of type {type(message).__name__}")
        kept = {name: item for name, item in message.items() if item is not None}
        if message.get("role") == "assistant" and isinstance(kept.get("function_call"), dict):
            kept["tool_calls"] = [_function(kept.pop("function_call"))]
        if not isinstance(kept.get("role"), str) or ("content" not in kept and not _calls_tools(kept)):
            raise _wrong_message(f"{where} has the fields {shorten(', '.join(map(str, kept)))}")
        content = _content(kept["content"], where) if "content" in kept else None
        if _calls_tools(kept):
            _check_calls(kept["tool_calls"], where)
        messages.append({**kept, "content": content})
    return messages


def reply_of(message: Message) -> str:
    """The text of a message, and below it the tool calls that it makes, each as JSON."""
    calls = [json.dumps(call.get("function", call), ensure_ascii=False) for call in message.get("tool_calls") or ()]
    return "\n".join([message["content"]] * bool(message["content"] or not calls) + calls)


def _calls_tools(message: Message) -> bool:
    return message["role"] == "assistant" and bool(message.get("tool_calls"))


def _check_calls(calls: Any, where: str) -> None:
    """Raise RowError unless these are tool calls in OpenAI's form, or each the function alone."""
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not (isinstance(function, dict) and isinstance(function.get("name"), str)):
            expected = "a list of objects with the name of a function and its arguments"
            detail = f"the tool_calls of {where} hold {shorten(repr(call), 60)}; expected {expected}"
            raise RowError(RejectReason.WRONG_TYPE, detail)


SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "bot": "assistant",
    "chatgpt": "assistant", "model": "assistant", "system": "system", "tool": "tool", "observation": "tool",
    "function_call": "assistant",
}  # fmt: skip
"""Names of roles in data of ShareGPT's form, and what chat templates call them."""


def turns_of(value: Any, column: str) -> list[Message]:
    """Messages from turns of {from, value}, ShareGPT's form; a function_call becomes the assistant's tool_calls."""
    messages = []
    for index, turn in enumerate(_items(value, column)):
        where = f"turn {index} of {column!r}"
        if not (isinstance(turn, dict) and isinstance(turn.get("from"), str) and turn.get("value") is not None):
            seen = shorten(", ".join(map(str, turn))) if isinstance(turn, dict) else type(turn).__name__
            raise RowError(RejectReason.WRONG_TYPE, f"{where} is {seen}; expected the fields from and value")
        speaker = turn["from"].lower()
        if speaker not in SHAREGPT_ROLES:
            raise RowError(RejectReason.BAD_CONVERSATION, f"{where} is from {shorten(speaker)!r}, which is not a role")
        kept = {name: item for name, item in turn.items() if item is not None and name not in ("from", "value")}
        message = {"role": SHAREGPT_ROLES[speaker], "content": _content(turn["value"], where), **kept}
        if speaker == "function_call":
            message |= {"content": None, "tool_calls": _calls(message["content"], where)}
        messages.append(message)
    return messages


def with_system(messages: list[Message], system: str, column: str) -> list[Message]:
    """The messages after a system message that has a column of its own, which they may repeat."""
    if not system.strip():
        return messages
    if not messages or messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    if messages[0]["content"].strip() != system.strip():
        detail = f"column {column!r} and the conversation have different system messages"
        raise RowError(RejectReason.BAD_CONVERSATION, detail)
    return messages


def tools_of(value: Any, column: str) -> list[Any] | None:
    """Tools as JSON schemas, from a list or its JSON text; a bare function is wrapped as templates expect it."""
    if not is_filled(value):
        return None
    tools = _parsed(value) if isinstance(value, str) else value
    tools = [tools] if isinstance(tools, dict) else tools
    if not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        seen = type(tools).__name__
        raise RowError(RejectReason.WRONG_TYPE, f"column {column!r} has {seen}; expected a list of tools, or its JSON")
    return [tool if "function" in tool or "name" not in tool else _function(tool) for tool in tools]


MARKS = ("weight", "loss", "train")
"""Fields of a message that say whether it is scored: of OpenAI, ms-swift and axolotl."""


def scored_of(
    messages: Sequence[Message], given: int, score_turns: ScoreTurns, mask_history: bool = False
) -> tuple[bool, ...] | None:
    """Whether each message is scored; None where that is every one of the assistant's after the given ones.

    `given` is the number of messages at the beginning that are the prompt. Marks of other roles are not read. Raises
    LeftOutError if the marks leave no turn, RowError for a mark that is neither true nor false.
    """
    replies = [index for index, message in enumerate(messages) if message["role"] == "assistant" and index >= given]
    kept = replies
    if score_turns == "last" or (score_turns == "marked" and mask_history):
        kept = replies[-1:]
    if score_turns == "marked":
        kept = [index for index in kept if _is_marked_scored(messages[index], index)]
    if kept == replies:
        return None
    if not kept:
        raise LeftOutError
    return tuple(index in kept for index in range(len(messages)))


def _is_marked_scored(message: Message, index: int) -> bool:
    marks = {name: message[name] for name in MARKS if message.get(name) is not None}
    for name, mark in marks.items():
        if not (isinstance(mark, int | float) and mark in (0, 1)):
            detail = f"{name} of message {index} is {shorten(repr(mark))}; expected true or false, or 1 or 0"
            raise RowError(RejectReason.WRONG_TYPE, detail)
    return all(marks.values())


def is_filled(value: Any) -> bool:
    """Whether a value says anything: not null, blank text, an empty list, nor the JSON text of one."""
    return value.strip() not in ("", "[]", "{}", "null") if isinstance(value, str) else value not in (None, [], {}, ())


def _items(value: Any, column: str) -> list[Any]:
    """The list in a column, which may be stored as JSON text."""
    items = _parsed(value) if isinstance(value, str) else value
    if not isinstance(items, list):
        raise _wrong_message(f"column {column!r} has a value of type {type(value).__name__}")
    return items


def _parsed(text: str) -> Any:
    """The value of a JSON text; None if it is not one."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _calls(text: str, where: str) -> list[Any]:
    """Tool calls in the form of OpenAI, from the JSON text of {name, arguments} or of a list of these."""
    parsed = _parsed(text)
    calls = parsed if isinstance(parsed, list) else [parsed]
    if not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        detail = f"{where} is a function_call, but its value {shorten(text)!r} is not JSON with a name and arguments"
        raise RowError(RejectReason.BAD_CONVERSATION, detail)
    return [_function({**call, "arguments": _arguments(call.get("arguments"))}) for call in calls]


def _arguments(value: Any) -> Any:
    parsed = _parsed(value) if isinstance(value, str) else value
    return (value or {}) if parsed is None else parsed


def _function(function: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": function}


def _content(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _wrong_message(f"the content of {where} is of type {type(content).__name__}")
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if not (isinstance(part, dict) and kind == "text" and isinstance(part.get("text"), str)):
            seen = f"the content of {where} has a part of type {shorten(str(kind))}"
            if any(medium in str(kind) for medium in ("image", "audio", "video")):
                raise RowError(RejectReason.NOT_TEXT, f"{seen}; only text can be scored")
            raise _wrong_message(seen)
    return "".join(part["text"] for part in content)


def _wrong_message(seen: str) -> RowError:
    expected = "a list of messages with the fields role (a string) and content (a string or a list of text parts)"
    return RowError(RejectReason.WRONG_TYPE, f"{seen}; expected {expected}")


def strings_of(value: Any) -> Iterator[str]:
    """Every string in a message, including names of fields: a template may write any of them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from strings_of(name)
            yield from strings_of(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings_of(item)
