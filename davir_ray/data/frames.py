"""What a chat template writes around the contents of messages, which for most templates depends on the roles alone.

A frame is read off one conversation of these roles with a marker for each content. Where the text of another one is
exactly the frame with its own contents, each content has its place without a second rendering (see turns.py).
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from davir_ray.data.conversation import Conversation, Message
from davir_ray.data.rendered import RowError
from davir_ray.data.turns import REASONING_FIELDS, Piece, Placed

_THINK_TAG = re.compile(r"<[^\s<>]*think")  # the beginning of each tag that MarkedConversation knows


class Frame(NamedTuple):
    """The text around the contents of messages with certain roles."""

    literals: list[str]
    """The text before the first content, between each two, and after the last."""
    order: list[int]
    """Indexes of the messages in the order in which the template writes them."""

    def place(self, conversation: Conversation, text: str) -> dict[int, list[Placed]] | None:
        """The contents of the assistant's messages in the text, as MarkedConversation.place finds them.

        None unless the text is this frame with every content as it is, or every content stripped.
        """
        contents = [message["content"] for message in conversation.messages]
        stripped = [content.strip() for content in contents]
        starts = self._starts(contents, text)
        if starts is not None:
            starts = [at + content.index(piece) for at, content, piece in zip(starts, contents, stripped, strict=True)]
        elif (starts := self._starts(stripped, text)) is None:
            return None
        turns = {}
        for index in self.order:
            if conversation.messages[index]["role"] == "assistant":
                piece = Piece(index, index, stripped[index], conversation.is_scored(index), is_call=False)
                turns[index] = [Placed(piece, starts[index], starts[index] + len(piece.text))]
        return turns

    def _starts(self, contents: Sequence[str], text: str) -> list[int] | None:
        """Where each content begins; None unless the text is this frame with these contents."""
        starts, at = [0] * len(contents), 0
        for index, literal in zip(self.order, self.literals[:-1], strict=True):
            starts[index] = at + len(literal)
            if not (text.startswith(literal, at) and text.startswith(contents[index], starts[index])):
                return None
            at = starts[index] + len(contents[index])
        return starts if text[at:] == self.literals[-1] else None


def read_frame(render: Callable[[list[Message]], str], roles: Sequence[str]) -> Frame | None:
    """The frame of messages with these roles; None unless the template writes each content once and unchanged."""
    try:
        text = render([{"role": role, "content": f"Zqv{index}q"} for index, role in enumerate(roles)])
    except RowError:
        return None
    literals = re.split(r"Zqv(\d+)q", text)
    order = [int(number) for number in literals[1::2]]
    return Frame(literals[::2], order) if sorted(order) == list(range(len(roles))) else None


def has_only_contents(conversation: Conversation) -> bool:
    """Whether contents are all that the assistant says: no reasoning, no tool calls, and no message is blank."""
    said = [message for message in conversation.messages if message["role"] == "assistant"]
    return not conversation.tools and all(map(_is_only_content, said))


def _is_only_content(message: Message) -> bool:
    if message.get("tool_calls") or any(message.get(name) for name in REASONING_FIELDS):
        return False
    return bool(message["content"].strip()) and not _THINK_TAG.search(message["content"])
