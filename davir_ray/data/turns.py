"""Where the assistant's turns stand in a rendered conversation, whatever the chat template does with them.

The conversation is rendered twice: as it is, and with a marker in place of each piece of the assistant's text. White
space and think tags around a piece stay, so that a template which strips, splits or drops text treats both alike. The
second text with the pieces put back must be the first one: then every piece that is written has its place, to the
character. What the template writes around a turn is known from conversations of our own; see turn_form.py. Most
conversations need no second rendering of their own; see frames.py.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from davir_ray.data.conversation import Conversation, Message
from davir_ray.data.rendered import RowError, num_equal
from davir_ray.schema import RejectReason
from davir_ray.text import shorten

REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")

Span = tuple[int, int]  # characters of a rendered conversation, end exclusive

_THINK_TAG = re.compile(r"(\s*</?[^\s<>]*think[^\s<>]*>\s*)")


class Piece(NamedTuple):
    """A piece of the assistant's text that a marker stands for."""

    number: int
    message: int
    text: str
    is_needed: bool
    """The template must write it. It may drop the reasoning of earlier turns, as most templates do."""
    is_call: bool
    """The name of a function that is called. A template may write it again, for instance before the result."""


class Placed(NamedTuple):
    """A piece in the rendered conversation."""

    piece: Piece
    start: int
    end: int


class MarkedConversation:
    """A conversation with markers in the assistant's messages, and what the markers stand for."""

    def __init__(self, conversation: Conversation, messages: Sequence[Message], text: str) -> None:
        """Mark messages that a template renders as `text`; the markers are such that none is in it."""
        self._conversation = conversation
        self._text = text
        self._tag = "Zqv"
        while self._tag in text:
            self._tag += "v"
        self._pieces: list[Piece] = []
        spoken = [index for index, message in enumerate(messages) if message["role"] in ("user", "assistant")]
        self.messages = [
            self._marked(index, message, index == spoken[-1]) if message["role"] == "assistant" else message
            for index, message in enumerate(messages)
        ]

    def _marked(self, index: int, message: Message, keeps_reasoning: bool) -> Message:
        marked = {**message}
        reasonings: dict[str, str] = {}  # the same text may stand in several fields, of which a template reads one
        for name in REASONING_FIELDS:
            text = message.get(name)
            if isinstance(text, str) and text.strip():
                if text not in reasonings:
                    reasonings[text] = self._around(index, text, keeps_reasoning)
                marked[name] = reasonings[text]
        calls = message.get("tool_calls") or []
        if calls:
            marked["tool_calls"] = [self._marked_call(index, call) for call in calls]
        *parts, answer = _THINK_TAG.split(message.get("content") or "")
        parts[::2] = [self._around(index, text, keeps_reasoning) for text in parts[::2]]
        if answer.strip():
            answer = self._around(index, answer, True)
        elif not calls:
            answer = self._marker(index, answer, not parts)
        if parts or answer:
            marked["content"] = "".join([*parts, answer])
        return marked

    def _marked_call(self, index: int, call: Any) -> Any:
        if "function" in call:
            return {**call, "function": self._marked_call(index, call["function"])}
        return {**call, "name": self._marker(index, call["name"], True, is_call=True)}

    def _around(self, index: int, text: str, is_needed: bool) -> str:
        """The text with a marker in place of all but the white space around it."""
        piece = text.strip()
        if not piece:
            return text
        start = text.index(piece)
        return text[:start] + self._marker(index, piece, is_needed) + text[start + len(piece) :]

    def _marker(self, index: int, text: str, is_needed: bool, is_call: bool = False) -> str:
        is_needed = is_needed and self._conversation.is_scored(index)
        self._pieces.append(Piece(len(self._pieces), index, text, is_needed, is_call))
        return f"{self._tag}{len(self._pieces) - 1}q"

    def place(self, marked_text: str) -> dict[int, list[Placed]]:
        """The pieces of each assistant's message that are in the text, given what the template writes for the marked.

        Raises RowError bad_conversation if a piece that is needed is not there, or the texts differ otherwise.
        """
        literals = re.split(rf"{self._tag}(\d+)q", marked_text)
        pieces = [self._pieces[int(number)] for number in literals[1::2]]
        self._check_are_written(pieces)
        placed, whole = _filled(literals[::2], pieces)
        if whole != self._text:  # a template that strips takes all of a blank content
            placed, whole = _filled(literals[::2], [piece._replace(text=piece.text.strip()) for piece in pieces])
        if whole != self._text:
            at = num_equal(whole, self._text)
            detail = (
                f"the chat template rewrites the assistant's text ({shorten(whole[at:], 30)!r} becomes "
                f"{shorten(self._text[at:], 30)!r}), so it cannot be found; give a template that leaves it as it is"
            )
            raise RowError(RejectReason.BAD_CONVERSATION, detail)
        found: dict[int, dict[int, Placed]] = {}
        for place in placed:
            found.setdefault(place.piece.message, {}).setdefault(place.piece.number, place)
        for piece in self._pieces:
            if self._conversation.is_scored(piece.message) and piece.message not in found:
                raise not_scored(piece, self._conversation)
        return {message: list(places.values()) for message, places in found.items()}

    def _check_are_written(self, written: Sequence[Piece]) -> None:
        counts = [0] * len(self._pieces)
        for piece in written:
            counts[piece.number] += 1
        for piece in self._pieces:
            if piece.is_needed and not counts[piece.number]:
                raise not_scored(piece, self._conversation)
            if counts[piece.number] > 1 and not piece.is_call:
                detail = f"the chat template writes {shorten(piece.text, 30)!r} of message {piece.message} twice"
                raise RowError(RejectReason.BAD_CONVERSATION, detail)


def _filled(literals: Sequence[str], pieces: Sequence[Piece]) -> tuple[list[Placed], str]:
    """Where the pieces stand between the literals, and the whole text."""
    at, placed, parts = len(literals[0]), [], [literals[0]]
    for piece, literal in zip(pieces, literals[1:], strict=True):
        placed.append(Placed(piece, at, at + len(piece.text)))
        parts += [piece.text, literal]
        at += len(piece.text) + len(literal)
    return placed, "".join(parts)


def not_scored(piece: Piece, conversation: Conversation) -> RowError:
    """The error where a template does not write a piece of the assistant's text, or does not mark it."""
    turn = sum(conversation.is_scored(index) for index in range(piece.message + 1))
    detail = (
        f"assistant turn {turn} is not in the scored text unchanged ({shorten(piece.text, 30)!r} is missing): the chat "
        "template rewrites it, drops it always or when it continues, or marks only some turns"
    )
    return RowError(RejectReason.BAD_CONVERSATION, detail)
