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
from davir_ray.data.frames import Frame, has_only_contents, read_frame
from davir_ray.data.rendered import Rendered, RowError, Segment, num_equal
from davir_ray.data.turn_form import TurnForm, read_turn_form
from davir_ray.data.turns import MarkedConversation, Placed, Span, not_scored
from davir_ray.errors import ModelError
from davir_ray.schema import RejectReason
from davir_ray.text import shorten

# The date that chat templates see as today's, so that the same data is rendered alike on any day. It is the default
# date in Llama 3's own template.
TODAY = datetime(2024, 7, 26)

# The public render_jinja_template replaces the function strftime_now by a string (transformers 5.23), so a
# template that calls it gets no date. Its two private parts, which are used here, accept a function.
_JINJA: Any = chat_template_utils

_MAX_FRAMES = 1000
"""Number of frames that a template keeps: one for each sequence of roles, so about one for each number of turns."""

_GENERATION_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


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

    def segments(self, conversation: Conversation) -> tuple[Segment, ...]:
        """The rendered conversation up to its last scored character.

        What is scored of a turn is what the model would generate in use: from where the generation prompt ends to the
        end of the turn, reasoning and tool calls included. Where only the next role's header ends a turn, its special
        token is scored, and added after the last turn. Where a template drops the reasoning of earlier turns, what is
        scored of them is the text that stands in the whole conversation.

        A template with generation marks has its scored text between them; a special token that ends the turn is added
        where it stands right after the last mark. Raises RowError bad_conversation.
        """
        messages = self._form.fit(conversation.messages)
        text, marks = self._render(self._form, messages, conversation.tools)
        turns = self._place(conversation, messages, text)
        limits = [*(placed[0].start for placed in list(turns.values())[1:]), len(text)]
        spans: list[Span] = []
        for (index, placed), limit in zip(turns.items(), limits, strict=True):
            if not conversation.is_scored(index):
                continue
            after = spans[-1][1] if spans else 0
            end, added = self._end(messages[index], placed, text, limit)
            if marks is None:
                spans.append((self._start(conversation, index, text, after, placed[0].start), end + len(added)))
                text = text[:end] + added + text[end:] if added else text
            else:
                own = [(first, last) for first, last in marks if max(first, placed[0].start) < last <= limit]
                spans += self._with_end(conversation, placed, own, end, text)
        if marks is not None and conversation.given:  # a mark may begin with the header, which belongs to the prompt
            index = next(filter(conversation.is_scored, turns))
            start = self._start(conversation, index, text, 0, turns[index][0].start)
            spans = [(max(start, first), last) for first, last in spans]
        return tuple(_cut(text, spans))

    def _place(self, conversation: Conversation, messages: Sequence[Message], text: str) -> dict[int, list[Placed]]:
        """The pieces of each of the assistant's messages in the text, in the order in which they stand there."""
        if has_only_contents(conversation):
            frame = self._frame(tuple(message["role"] for message in messages))
            if frame and (turns := frame.place(conversation, text)):
                return turns
        _check_is_written(conversation, text)
        marked = MarkedConversation(conversation, messages, text)
        return marked.place(self._render(self._form, marked.messages, conversation.tools)[0])

    def _frame(self, roles: tuple[str, ...]) -> Frame | None:
        """The frame of conversations with these roles, read once; None where the template has none."""
        if roles not in self._frames:
            if len(self._frames) == _MAX_FRAMES:
                self._frames.clear()
            self._frames[roles] = read_frame(lambda messages: self._render(self._form, messages, None)[0], roles)
        return self._frames[roles]

    def prompt(self, messages: Sequence[Message], tools: list[Any] | None = None) -> str:
        """The rendered conversation, up to where the assistant's next turn begins. Raises RowError bad_conversation."""
        return self._render(self._form, self._form.fit(messages), tools, add_generation_prompt=True)[0]

    def turn_end(self) -> str | None:
        """The special token that ends an assistant's scored turn; None where the template has none."""
        talk: list[Message] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            text = self.segments(Conversation(messages=talk, column="messages"))[-1].text.rstrip()
        except RowError:
            return None
        tokens = list(self._special_token.finditer(text))
        return tokens[-1].group() if tokens and tokens[-1].end() == len(text) else None

    @cached_property
    def _has_marks(self) -> bool:
        return _GENERATION_MARK.search(self.template) is not None

    @cached_property
    def _frames(self) -> dict[tuple[str, ...], Frame | None]:
        return {}

    @cached_property
    def _form(self) -> TurnForm:
        def render(form: TurnForm, messages: Sequence[Message], **variables: Any) -> str:
            return self._render(form, form.fit(messages), None, **variables)[0]

        return read_turn_form(render, self._special_token)

    @cached_property
    def _special_token(self) -> re.Pattern[str]:
        tokens = {token for token in (*self.named_tokens.values(), *self.special_tokens) if token}
        longest_first = sorted(tokens, key=lambda token: (-len(token), token))
        return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def _start(self, conversation: Conversation, index: int, text: str, after: int, before: int) -> int:
        """Where the model begins to write a message: after the turn before it, and before its own first piece."""
        if not self._form.starts:
            prompt = self.prompt(conversation.messages[:index], conversation.tools)
            if not text.startswith(prompt):
                raise _not_a_prefix(f"message {index}", prompt, text)
            return len(prompt)
        found = [(text.rfind(start, after, before), len(start)) for start in self._form.starts]
        starts = [at + length for at, length in found if at >= 0]
        if starts:
            return max(starts)
        if after and not text[after:before].strip():  # the template lets the turn before it go on
            return after
        detail = f"the chat template writes no generation prompt before message {index}, so its beginning is not known"
        raise RowError(RejectReason.BAD_CONVERSATION, detail)

    def _end(self, message: Message, placed: Sequence[Placed], text: str, limit: int) -> tuple[int, str]:
        """Where a message ends, at most at `limit`, and the next role's header if that must be added there."""
        if message.get("tool_calls"):
            return self._end_of_calls(placed, text, limit)
        ending, at = self._form.reply, placed[-1].end
        content = message["content"]
        blank = content[len(content.rstrip()) :]
        if text.startswith(blank, at, limit):
            at += len(blank)
        behind = at + len(text[at:limit]) - len(text[at:limit].lstrip())
        for begin in (at, behind):
            if ending.text and text.startswith(ending.text, begin, limit):
                return self._with_last_token(begin + len(ending.text), text), ""
        if token := self._special_token.match(text, behind, limit):
            return self._with_last_token(token.end(), text), ""
        return at, ending.next_header if behind == len(text) else ""

    def _with_last_token(self, end: int, text: str) -> int:
        """The end of the text, if only special tokens follow: Phi-3 ends a conversation with <|end|> and its EOS."""
        rest = text[end:].rstrip()
        return end + len(rest) if rest and not self._special_token.sub("", rest).strip() else end

    def _end_of_calls(self, placed: Sequence[Placed], text: str, limit: int) -> tuple[int, str]:
        ending, at = self._form.call, max(place.end for place in placed if place.piece.is_call)
        added = ""
        if ending.text:
            end = text.find(ending.text, at, limit) + len(ending.text)
        elif token := self._special_token.search(text, at, limit):
            end = token.end()
        elif limit == len(text):
            end, added = len(text.rstrip()), ending.next_header
        else:
            end = 0
        if end < placed[-1].end:
            message = placed[0].piece.message
            detail = f"the chat template writes no known end of the tool calls of message {message}, or text after it"
            raise RowError(RejectReason.BAD_CONVERSATION, detail)
        return end, added

    def _with_end(
        self, conversation: Conversation, placed: Sequence[Placed], spans: list[Span], end: int, text: str
    ) -> list[Span]:
        """A message's marks, the last one drawn out over the special token that ends the turn, if it lacks that."""
        for place in placed:
            if place.piece.is_needed and not any(first <= place.start and place.end <= last for first, last in spans):
                raise not_scored(place.piece, conversation)
        first, last = spans[-1]
        has_end = any(
            token.end() == len(text[:last].rstrip()) for token in self._special_token.finditer(text, first, last)
        )
        if not has_end and self._special_token.sub("", text[last:end]).strip() == "":
            spans[-1] = (first, max(last, end))
        return spans

    def _render(
        self, form: TurnForm, messages: Sequence[Message], tools: list[Any] | None, **variables: Any
    ) -> tuple[str, list[Span] | None]:
        """The rendered text, and the spans inside generation marks; None where the template has no such marks."""
        if form.wants_parts:
            messages = [
                {**message, "content": [{"type": "text", "text": message["content"]}]}
                if message.get("content")
                else message
                for message in messages
            ]
        given: dict[str, Any] = {
            "add_generation_prompt": False,
            **self.named_tokens,
            "date_string": TODAY.strftime("%d %b %Y"),
            "strftime_now": TODAY.strftime,
            **variables,
        }
        template = _JINJA._compile_jinja_template(self.template)
        messages = _JINJA._alias_reasoning_fields(messages)
        try:
            if not self._has_marks:
                return template.render(messages=messages, tools=tools, documents=None, **given), None
            text, spans = _JINJA._render_with_assistant_indices(template, messages, tools, None, **given)
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
    for text in strings_of(conversation.tools):
        if token := chat.find_special_token(text):
            raise RowError(RejectReason.SPECIAL_TOKEN_IN_TEXT, f"the tools of {name!r} contain {token!r}")
    replies = conversation.replies()
    if not replies:
        raise RowError(RejectReason.BAD_CONVERSATION, _nothing_scored(conversation))
    if not any(reply.strip() for reply in replies):
        raise RowError(RejectReason.EMPTY_RESPONSE, "every assistant turn is empty or white space only")
    segments = chat.segments(conversation)
    last = max(filter(conversation.is_scored, range(len(messages))))
    prompt = "" if segments[0].scored else segments[0].text
    return Rendered(
        prompt=prompt,
        response="\n\n".join(replies),
        segments=segments,
        templated=True,
        contents=tuple((message["role"], message["content"] or "") for message in messages[: last + 1]),
    )


def _check_is_written(conversation: Conversation, text: str) -> None:
    """Raise RowError where the template leaves out what the assistant answers to."""
    for index, message in enumerate(conversation.messages):
        if message["role"] in ("system", "user") and message["content"].strip() not in text:
            detail = f"the chat template does not write message {index} of {conversation.column!r}, of the role "
            raise RowError(RejectReason.BAD_CONVERSATION, f"{detail}{message['role']!r}, or rewrites it")
    names = [tool.get("function", tool).get("name", "") for tool in conversation.tools or () if isinstance(tool, dict)]
    if absent := [name for name in names if name not in text]:
        detail = f"the chat template has no place for tools such as {shorten(absent[0], 30)!r}; give another with "
        raise RowError(RejectReason.UNREAD_COLUMN, f"{detail}--chat_template, or add --ignore_columns '[tools]'")


def _nothing_scored(conversation: Conversation) -> str:
    roles = {message["role"] for message in conversation.messages}
    if "assistant" in roles:
        return f"none of the assistant's messages is to be scored (given: {conversation.given})"
    return f"no message has the role 'assistant'; roles seen: {shorten(', '.join(sorted(roles)) or 'none')}"


def _cut(text: str, spans: Sequence[Span]) -> Iterator[Segment]:
    """The text up to the end of the last span, cut into scored segments (the spans) and the others."""
    at = 0
    for start, end in spans:
        if start < at:
            raise RowError(RejectReason.BAD_CONVERSATION, "two of the assistant's turns overlap in the rendered text")
        if start > at:
            yield Segment(text[at:start], False)
        if end > start:
            yield Segment(text[start:end], True)
        at = end


def _not_a_prefix(where: str, start: str, whole: str) -> RowError:
    """The error where a conversation does not continue its rendered beginning, with the first difference."""
    at = num_equal(start, whole)
    detail = (
        f"the chat template has no generation prompt, and writes the conversation before {where} differently when it "
        f"continues ({shorten(start[at:], 30)!r} becomes {shorten(whole[at:], 30)!r}), so the assistant's text cannot "
        "be found; give a template with generation marks"
    )
    return RowError(RejectReason.BAD_CONVERSATION, detail)
