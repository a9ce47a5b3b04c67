"""Chat templates: conversations rendered as transformers does, with the place of each assistant turn in the text."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Any

from jinja2 import TemplateSyntaxError
from transformers.utils import chat_template_utils

from davir_ray.data.conversation import Conversation, Message, strings_of
from davir_ray.data.rendered import Rendered, RowError, Segment, num_equal
from davir_ray.errors import ModelError
from davir_ray.schema import RejectReason
from davir_ray.text import shorten

# The date that chat templates see as today's, so that the same data is rendered alike on any day. It is the default
# date in Llama 3's own template.
TODAY = datetime(2024, 7, 26)

# The public render_jinja_template replaces the function strftime_now by a string (transformers 5.23), so a
# template that calls it gets no date. Its two private parts, which are used here, accept a function.
_JINJA: Any = chat_template_utils

_GENERATION_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")

Span = tuple[int, int]  # characters of a rendered conversation, end exclusive


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template and its special tokens; independent of the tokenizer's class, and picklable.

    A template that does not compile raises ModelError when the object is made.
    """

    template: str
    """Jinja text in the dialect of transformers."""
    named_tokens: Mapping[str, str] = field(default_factory=dict)
    """Special tokens by the names that templates use (bos_token, eos_token, …)."""
    special_tokens: tuple[str, ...] = ()
    """All other strings that the tokenizer encodes as one special token."""

    def __post_init__(self) -> None:
        """Compile the template once, so that a broken one is found before any row."""
        try:
            _JINJA._compile_jinja_template(self.template)
        except TemplateSyntaxError as error:
            raise ModelError(
                f"the chat template is not valid Jinja (line {error.lineno}: {error.message}); correct it, or give "
                "another with --chat_template"
            ) from error

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, override: str | None) -> "ChatTemplate":
        """The template `override`, or the tokenizer's own where that is None; ModelError if there is neither."""
        if override is None:
            try:
                override = tokenizer.get_chat_template()
            except ValueError as error:
                raise ModelError(
                    f"the tokenizer {tokenizer.name_or_path!r} has no chat template to use for the format messages; "
                    "give one with --chat_template FILE"
                ) from error
        named = {name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
        added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        special = tuple(sorted({*tokenizer.all_special_tokens, *added}))
        return cls(override, named_tokens=named, special_tokens=special)

    def find_special_token(self, text: str) -> str | None:
        """The first special token that a text contains; None if there is none."""
        match = self._special_token.search(text)
        return match.group() if match else None

    def segments(self, messages: Sequence[Message], given: int = 0) -> tuple[Segment, ...]:
        """The rendered conversation up to its last scored character; every assistant turn is scored, except among the
        first `given` messages.

        The scored spans are those of the template's generation marks. Without marks a span is what an assistant turn
        adds to the conversation before it, end marker included. Raises RowError bad_conversation.
        """
        text, spans = self._render(messages)
        if not _GENERATION_MARK.search(self.template):
            spans = list(self._turn_spans(messages, text))
        if given:
            start = self._prompt_end(messages[:given], text, f"the first {given} messages")
            spans = [(max(start, first), end) for first, end in spans if end > start]
        segments = tuple(_cut(text, spans))
        _check_replies_are_scored(messages[given:], segments)
        return segments

    def prompt(self, messages: Sequence[Message]) -> str:
        """The rendered conversation, up to where the assistant's next turn begins. Raises RowError bad_conversation."""
        return self._render(messages, add_generation_prompt=True)[0]

    def turn_end(self) -> str | None:
        """The special token that ends an assistant's scored turn; None where the template has none."""
        try:
            text = self.segments([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])[-1].text
        except RowError:
            return None
        content_end, marker_end = self._turn_end(text, 0)
        return text[content_end:marker_end] or None

    def _prompt_end(self, messages: Sequence[Message], text: str, where: str) -> int:
        """Where the assistant's turn after these messages begins in the text of a longer conversation."""
        before = self.prompt(messages)
        if not text.startswith(before):
            raise _not_a_prefix(where, before, text)
        return len(before)

    @cached_property
    def _special_token(self) -> re.Pattern[str]:
        tokens = {token for token in (*self.named_tokens.values(), *self.special_tokens) if token}
        longest_first = sorted(tokens, key=lambda token: (-len(token), token))
        return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def _turn_spans(self, messages: Sequence[Message], text: str) -> Iterator[Span]:
        """The span of each assistant turn, found by rendering the conversation up to it and with it."""
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            through, _ = self._render(messages[: index + 1])
            start = self._prompt_end(messages[:index], through, f"message {index}")
            content_end, marker_end = self._turn_end(through, start)
            if text.startswith(through[:marker_end]):
                yield start, marker_end
            elif text.startswith(through[:content_end]):  # the template writes an end marker after the last turn only
                yield start, content_end
            else:
                raise _not_a_prefix(f"what follows message {index}", through[:content_end], text)

    def _turn_end(self, text: str, start: int) -> tuple[int, int]:
        """Where a turn's content ends, and where its end marker ends.

        The marker is the turn's last special token if only white space follows, so the line break that ChatML writes
        after it is not scored. Without a marker both are the end of the text.
        """
        markers = list(self._special_token.finditer(text, start))
        if not markers or text[markers[-1].end() :].strip():
            return len(text), len(text)
        return markers[-1].start(), markers[-1].end()

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> tuple[str, list[Span]]:
        """The rendered text and the spans inside generation marks."""
        try:
            text, spans = _JINJA._render_with_assistant_indices(
                _JINJA._compile_jinja_template(self.template),
                list(messages),
                None,
                None,
                add_generation_prompt,
                **self.named_tokens,
                date_string=TODAY.strftime("%d %b %Y"),
                strftime_now=TODAY.strftime,
            )
        except Exception as error:  # a template is a program: it may raise anything
            detail = f"the chat template rejects the messages: {type(error).__name__}: {error}"
            raise RowError(RejectReason.BAD_CONVERSATION, shorten(detail, 300)) from error
        return text, spans


def render_conversation(conversation: Conversation, chat: ChatTemplate) -> Rendered:
    """A conversation rendered by the chat template, with the messages that are scored.

    Raises RowError special_token_in_text, bad_conversation or empty_response, which names the conversation's column.
    """
    messages, name = conversation.messages, conversation.column
    for index, message in enumerate(messages):
        for text in strings_of(message):
            if token := chat.find_special_token(text):
                raise RowError(RejectReason.SPECIAL_TOKEN_IN_TEXT, f"message {index} of {name!r} contains {token!r}")
    replies = conversation.replies()
    if not replies:
        roles = shorten(", ".join(sorted({message["role"] for message in messages})) or "none")
        raise RowError(RejectReason.BAD_CONVERSATION, f"no message has the role 'assistant'; roles seen: {roles}")
    if not any(reply.strip() for reply in replies):
        raise RowError(RejectReason.EMPTY_RESPONSE, "every assistant turn is empty or white space only")
    segments = chat.segments(messages, conversation.given)
    prompt = "" if segments[0].scored else segments[0].text
    return Rendered(prompt=prompt, response="\n\n".join(replies), segments=segments, templated=True)


def _replies(messages: Sequence[Message]) -> list[str]:
    return [message["content"] for message in messages if message["role"] == "assistant"]


def _cut(text: str, spans: Sequence[Span]) -> Iterator[Segment]:
    """The text up to the end of the last span, cut into scored segments (the spans) and the others."""
    at = 0
    for start, end in spans:
        if start < at:
            raise RowError(RejectReason.BAD_CONVERSATION, "the chat template's generation marks overlap")
        if start > at:
            yield Segment(text[at:start], False)
        if end > start:
            yield Segment(text[start:end], True)
        at = end


def _check_replies_are_scored(messages: Sequence[Message], segments: Sequence[Segment]) -> None:
    """Raise RowError unless every reply is scored unchanged: a template may drop, rewrite or not mark a turn."""
    scored = "".join(segment.text for segment in segments if segment.scored)
    at = 0
    for number, reply in enumerate(_replies(messages), start=1):
        found = scored.find(reply.strip(), at)
        if found < 0:
            detail = (
                f"assistant turn {number} is not in the scored text unchanged: the chat template drops or rewrites it, "
                "or marks only some turns"
            )
            raise RowError(RejectReason.BAD_CONVERSATION, detail)
        at = found + len(reply.strip())


def _not_a_prefix(where: str, start: str, whole: str) -> RowError:
    """The error where a conversation does not continue its rendered beginning, with the first difference."""
    at = num_equal(start, whole)
    detail = (
        f"the chat template writes the conversation before {where} differently when it continues "
        f"({shorten(start[at:], 30)!r} becomes {shorten(whole[at:], 30)!r}), so the assistant's text cannot be found; "
        "give a template with generation marks"
    )
    return RowError(RejectReason.BAD_CONVERSATION, detail)
