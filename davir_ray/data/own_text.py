"""The text of a record as its author wrote it: without a chat template, and without Stanford Alpaca's frame."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from davir_ray.config.prepare import PrepareConfig
from davir_ray.config.sources import Source
from davir_ray.data.formats import (
    ALPACA_PROMPT_WITH_INPUT,
    ALPACA_PROMPT_WITHOUT_INPUT,
    GSM8K_PROMPT,
    conversation_of,
    uses_chat,
)
from davir_ray.data.rendered import RowError


class OwnText(NamedTuple):
    """What is said in a record, the same however it is rendered."""

    prompt: str
    """The user's side of the conversation: all that the user says, without system messages."""
    response: str
    """All that the assistant says."""


def _matching(frame: str) -> re.Pattern[str]:
    """A pattern for prompts in this frame, with a group for each of its fields."""
    return re.compile(re.sub(r"\\\{\w+\\\}", "(.*)", re.escape(frame.strip())), re.DOTALL)


_FRAMES = [_matching(frame) for frame in (ALPACA_PROMPT_WITH_INPUT, ALPACA_PROMPT_WITHOUT_INPUT, GSM8K_PROMPT)]


def own_text(fields: Mapping[str, Any], source: Source) -> OwnText:
    """What is said in a record of one example. Raises RowError where it does not have its source's format."""
    messages = conversation_of(fields, source).messages
    said = {
        role: "\n".join(message["content"] or "" for message in messages if message["role"] == role)
        for role in ("user", "assistant")
    }
    return OwnText(without_frame(said["user"]), said["assistant"])


def own_text_of_example(row: Mapping[str, Any], source: Source, options: PrepareConfig) -> OwnText | None:
    """What is said in a row of examples; None where a chat template rendered it and no record was kept.

    The row has prompt, response and record.
    """
    if row["record"] is not None:
        try:
            return own_text(json.loads(row["record"]), source)
        except RowError:  # a value that JSON cannot express was replaced in the record
            pass
    if uses_chat(source, options):
        return None
    return OwnText(without_frame(row["prompt"]), row["response"])


def without_frame(prompt: str) -> str:
    """A prompt without the frame that this package puts around plain text; data may have the frame, too."""
    for frame in _FRAMES:
        if match := frame.fullmatch(prompt.strip()):
            return "\n".join(match.groups())
    return prompt


def texts_of(value: Any) -> Iterator[str]:
    """Every string in a value, at any depth and in order; one that is the JSON of objects is looked into."""
    if isinstance(value, str):
        parsed = _parsed(value) if value.startswith(("{", "[{")) else None
        if parsed is None:
            yield value
        else:
            yield from texts_of(parsed)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from texts_of(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from texts_of(item)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
