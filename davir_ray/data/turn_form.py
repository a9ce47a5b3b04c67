"""What a chat template writes around an assistant's turn, read off conversations of our own, once for each template."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal, NamedTuple

from davir_ray.data.conversation import Message
from davir_ray.data.rendered import RowError, num_equal

_USER, _REPLY, _USER_2, _REPLY_2, _FUNCTION, _ARGUMENT, _RESULT = (f"zq{letter}qz" for letter in "abcdefg")

_TALK: list[Message] = [
    {"role": "user", "content": _USER},
    {"role": "assistant", "content": _REPLY},
    {"role": "user", "content": _USER_2},
    {"role": "assistant", "content": _REPLY_2},
]

ArgumentsAs = Literal["object", "text"]

_WAYS_TO_THINK: tuple[dict[str, Any], ...] = ({}, {"enable_thinking": True}, {"enable_thinking": False})
"""Variables under which templates write other generation prompts; without thinking it holds an empty think block."""


class Ending(NamedTuple):
    """How a turn ends."""

    text: str = ""
    """What ends it, up to its last special token if it has one; empty where that varies."""
    next_header: str = ""
    """The special token that begins the next role's header, where nothing else ends the turn (GLM's <|user|>)."""


UNKNOWN = Ending()


@dataclass(frozen=True, kw_only=True)
class TurnForm:
    """What a chat template writes around an assistant's turn, and the fields that it takes."""

    wants_parts: bool = False
    """Contents must be lists of parts."""
    needs_content: bool = False
    """A message that only calls tools must have a content, which is empty."""
    arguments_as: ArgumentsAs | None = None
    """What the arguments of a tool call must be, JSON text or an object; None: either, or unknown."""
    starts: tuple[str, ...] = ()
    """Texts after which the assistant begins to write; none where the template has no generation prompt."""
    reply: Ending = UNKNOWN
    """How a turn that says something ends."""
    call: Ending = UNKNOWN
    """How a turn that calls tools ends: its text is at most one special token."""

    def fit(self, messages: Sequence[Message]) -> list[Message]:
        """The messages with their fields as the template takes them."""
        return [self._fitted(message) for message in messages]

    def _fitted(self, message: Message) -> Message:
        if "tool_calls" not in message:
            return message
        fitted = {**message, "tool_calls": [self._fitted_call(call) for call in message["tool_calls"]]}
        if self.needs_content:
            fitted["content"] = message["content"] or ""
        elif not message["content"]:  # transformers leaves nulls out as well
            del fitted["content"]
        return fitted

    def _fitted_call(self, call: Any) -> Any:
        if not isinstance(call, dict):
            return call
        if "function" in call:
            return {**call, "function": self._fitted_call(call["function"])}
        arguments = call.get("arguments")
        if self.arguments_as == "text" and isinstance(arguments, dict):
            return {**call, "arguments": json.dumps(arguments, ensure_ascii=False)}
        if self.arguments_as == "object" and isinstance(arguments, str):
            try:
                return {**call, "arguments": json.loads(arguments)}
            except ValueError:  # the template refuses it, or writes it as it is
                return call
        return call


Render = Callable[..., str]
"""A function from a TurnForm, messages and variables of the template to the text; raises RowError."""


def read_turn_form(render: Render, special_token: re.Pattern[str]) -> TurnForm:
    """The form of a template's turns; what cannot be read off stays empty."""

    def attempt(form: TurnForm, messages: Sequence[Message], **variables: Any) -> str:
        try:
            return render(form, messages, **variables)
        except RowError:
            return ""

    form = TurnForm()
    if any(message["content"] not in attempt(form, _TALK) for message in _TALK):
        in_parts = replace(form, wants_parts=True)
        if any(message["content"] not in attempt(in_parts, _TALK) for message in _TALK):
            return form
        form = in_parts
    talk = attempt(form, _TALK)
    form = replace(form, reply=_end_of_reply(_between(talk, _REPLY, _USER_2), _after(talk, _REPLY_2), special_token))
    gaps = [_between(talk, _USER, _REPLY), _between(talk, _USER_2, _REPLY_2)]
    starts: set[str] = set()
    for thinking in _WAYS_TO_THINK:
        plain = _after(attempt(form, _TALK[:1], **thinking), _USER)
        prompt = _after(attempt(form, _TALK[:1], add_generation_prompt=True, **thinking), _USER)
        prompt = prompt[len(_common(plain, prompt, special_token)) :]
        starts |= {prompt, *(_longest_prefix(prompt, gap, special_token) for gap in gaps)}
    form = replace(form, starts=tuple(start for start in starts if start.strip()))
    return _with_calls(form, attempt, special_token)


def _with_calls(form: TurnForm, attempt: Render, special_token: re.Pattern[str]) -> TurnForm:
    """The form with what concerns tool calls, if the template writes them at all."""
    found: list[tuple[int, TurnForm, list[Message]]] = []
    kinds: tuple[ArgumentsAs, ...] = ("object", "text")
    for needs_content, kind in product((False, True), kinds):
        tried = replace(form, needs_content=needs_content, arguments_as=kind)
        messages = _calling(kind)
        text = attempt(tried, messages)
        if all(word in text for word in (_FUNCTION, _ARGUMENT, _RESULT, _REPLY)) and '\\"' not in text:
            found.append((len(text), tried, messages))
    if not found:
        return form
    _, tried, messages = min(found, key=lambda one: one[0])  # some templates write "None" or "null" for no content
    takes_both = {one.arguments_as for _, one, _ in found if one.needs_content == tried.needs_content} == {
        "object",
        "text",
    }
    form = replace(tried, arguments_as=None if takes_both else tried.arguments_as)
    inside = _between(attempt(form, messages), _ARGUMENT, _RESULT)
    call = _end_of_call(inside, _after(attempt(form, messages[:2]), _ARGUMENT), special_token)
    after_result = _after(attempt(form, messages[:3], add_generation_prompt=True), _RESULT)
    starts = {*form.starts, after_result} - {""} if form.starts else ()
    return replace(form, call=call, starts=tuple(starts))


def _calling(arguments_as: ArgumentsAs) -> list[Message]:
    arguments: Any = {"x": _ARGUMENT}
    function = {"name": _FUNCTION, "arguments": arguments if arguments_as == "object" else json.dumps(arguments)}
    return [
        {"role": "user", "content": _USER},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "123456789", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "123456789", "name": _FUNCTION, "content": _RESULT},
        {"role": "assistant", "content": _REPLY},
    ]


def _end_of_reply(inside: str, at_end: str, special_token: re.Pattern[str]) -> Ending:
    """How a reply ends, given what follows it inside a conversation and at the end of one."""
    end = _common(inside, at_end, special_token)
    if tokens := list(special_token.finditer(end)):
        return Ending(end[: tokens[-1].end()])
    header = re.match(rf"\s*({special_token.pattern})", inside)
    if end or header is None or special_token.search(at_end):
        return Ending(end)
    return Ending(next_header=header.group(1))


def _end_of_call(inside: str, at_end: str, special_token: re.Pattern[str]) -> Ending:
    """How a turn that calls tools ends, given what follows its argument, which is not the last of its text."""
    if tokens := list(special_token.finditer(_common(inside, at_end, special_token))):
        return Ending(tokens[-1].group())
    header = special_token.search(inside)
    return Ending(next_header=header.group() if header and not special_token.search(at_end) else "")


def _between(text: str, start: str, end: str) -> str:
    return _after(text, start).partition(end)[0]


def _after(text: str, word: str) -> str:
    return text.partition(word)[2]


def _pieces(text: str, special_token: re.Pattern[str]) -> list[str]:
    """The text cut into special tokens and single characters."""
    return [match.group() for match in re.finditer(f"{special_token.pattern}|.", text, re.DOTALL)]


def _common(one: str, other: str, special_token: re.Pattern[str]) -> str:
    """The common beginning of two texts, in which no special token is cut."""
    pieces = _pieces(one, special_token)
    return "".join(pieces[: num_equal(pieces, _pieces(other, special_token))])


def _longest_prefix(text: str, gap: str, special_token: re.Pattern[str]) -> str:
    """The longest beginning of a text, in which no special token is cut, that another contains."""
    pieces = _pieces(text, special_token)
    prefixes = ("".join(pieces[:count]) for count in range(len(pieces), 0, -1))
    return next((prefix for prefix in prefixes if prefix in gap), "")
