"""Conversations as chat templates take them: messages, and what else a template may write, such as tools."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from davir_ray.data.rendered import RowError
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

    def replies(self) -> list[str]:
        """The contents of the messages that are scored, and the tool calls that they make, as JSON."""
        return [reply_of(message) for index, message in enumerate(self.messages) if self.is_scored(index)]


def messages_of(value: Any, column: str) -> list[Message]:
    """The messages with their contents as strings, null only beside tool calls.

    Other fields that are not null reach the template unchanged. Raises RowError wrong_type.
    """
    if not isinstance(value, list):
        raise _wrong_message(f"column {column!r} has a value of type {type(value).__name__}")
    messages = []
    for index, message in enumerate(value):
        if not isinstance(message, dict):
            raise _wrong_message(f"message {index} of {column!r} is of type {type(message).__name__}")
        kept = {name: item for name, item in message.items() if item is not None}
        where = f"message {index} of {column!r}"
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


def _content(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _wrong_message(f"the content of {where} is of type {type(content).__name__}")
    for part in content:
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise _wrong_message(f"the content of {where} has a part of type {shorten(str(kind))}")
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
