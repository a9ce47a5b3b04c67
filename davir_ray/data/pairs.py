"""One preference record → two examples that share a prompt: the chosen response and the rejected one.

    prompt, chosen, rejected     strings, as they stand
    chosen, rejected             strings: whole dialogues of Human and Assistant turns that share a prefix (HH's form)
    chosen, rejected             lists of messages, with the prompt's turns in both, or in a column `prompt` (a string,
                                 or messages); rendered by the chat template

What the two have in common is the prompt and is not scored; of what follows, every assistant turn is.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice, takewhile
from typing import Any, NamedTuple

import numpy as np

from davir_ray.config import Source
from davir_ray.data.examples import ExampleRow, Pair, as_reject, record_text, rendered_in_batches, row_of, stable_id
from davir_ray.data.render import ChatTemplate, Message, Rendered, RowError, Segment, column, messages_of, render_turns
from davir_ray.data.sources import Record, Reject, Slice, read_records
from davir_ray.data.tokens import Encoded, Encoder
from davir_ray.schema import RejectReason, Role

ASSISTANT_MARK, HUMAN_MARK = "\n\nAssistant:", "\n\nHuman:"

_MARKS = re.compile(f"({HUMAN_MARK}|{ASSISTANT_MARK})")


class RenderedPair(NamedTuple):
    """Both responses with their one prompt."""

    chosen: Rendered
    rejected: Rendered
    templated: bool
    """By a chat template, whose special tokens the text spells."""


class PairReader:
    """Turns preference records into pairs of rows of examples/, or rejects that say why not."""

    def __init__(self, encoder: Encoder, chat: ChatTemplate | None, *, keep_record: bool) -> None:
        self._encoder = encoder
        self._chat = chat
        self._keep_record = keep_record
        self.bytes_read = 0
        """Of the sources, as they are stored."""

    def read(self, source: Source, slices: Iterable[Slice], limit: int | None) -> Iterator[Pair | Reject]:
        """Every row of the slices, at most `limit`, exactly once: a pair or a reject."""
        yield from self.convert(source, (item for part in slices for item in read_records(part, self._count)), limit)

    def convert(
        self, source: Source, items: Iterable[Record | Reject], limit: int | None = None
    ) -> Iterator[Pair | Reject]:
        """Every record, at most `limit`, exactly once and in order: a pair or a reject."""
        for batch in rendered_in_batches(islice(items, limit), partial(self._render, source=source)):
            yield from self._encode(source, batch)

    def _count(self, num_bytes: int) -> None:
        self.bytes_read += num_bytes

    def _render(self, record: Record, source: Source) -> RenderedPair:
        return render_pair(record.fields, source, self._chat)

    def _encode(
        self, source: Source, batch: list[tuple[Record | Reject, RenderedPair | Reject]]
    ) -> Iterator[Pair | Reject]:
        pairs = [pair for _, pair in batch if isinstance(pair, RenderedPair)]
        encoded = {
            templated: iter(
                self._encoder.encode(
                    [text for pair in pairs if pair.templated == templated for text in pair[:2]], templated=templated
                )
            )
            for templated in (False, True)
        }
        for record, pair in batch:
            if isinstance(record, Reject):
                yield record
            elif isinstance(pair, Reject):
                yield pair
            else:
                both = encoded[pair.templated]
                yield self._pair(source, record, pair, (next(both), next(both)))

    def _pair(
        self, source: Source, record: Record, pair: RenderedPair, encoded: Sequence[Encoded | RowError]
    ) -> Pair | Reject:
        found = [one for one in encoded if isinstance(one, Encoded)]
        for one in encoded:
            if isinstance(one, RowError):
                return as_reject(record, one)
        chosen, rejected = found
        if np.array_equal(chosen.input_ids, rejected.input_ids):
            detail = f"both responses are the same within the limit of {len(chosen.input_ids)} tokens"
            return Reject(record.source_file, record.source_row, RejectReason.EQUAL_RESPONSES, detail)
        return (
            self._row(source, record, pair.chosen, chosen, Role.CHOSEN),
            self._row(source, record, pair.rejected, rejected, Role.REJECTED),
        )

    def _row(self, source: Source, record: Record, rendered: Rendered, encoded: Encoded, role: Role) -> ExampleRow:
        place = (source.name, record.source_file, record.source_row)
        kept = self._keep_record and role is Role.CHOSEN  # one copy is enough for both rows
        return {
            **row_of(source, record, rendered, encoded, record_text(record) if kept else None),
            "example_id": stable_id(*place, role.value),
            "pair_id": stable_id(*place),
            "prompt_hash": stable_id(rendered.prompt),
            "role": role.value,
        }


def render_pair(fields: Mapping[str, Any], source: Source, chat: ChatTemplate | None) -> RenderedPair:
    """Both responses of one record after their common prompt.

    Raises RowError: missing_column, wrong_type, no_common_prompt, empty_response, equal_responses, and for messages
    special_token_in_text and bad_conversation.
    """
    chosen, rejected = column(fields, source.chosen_column), column(fields, source.rejected_column)
    prompt = fields.get(source.prompt_column)
    if isinstance(chosen, str) and isinstance(rejected, str):
        pair = _of_strings(prompt, chosen, rejected)
    elif isinstance(chosen, list) and isinstance(rejected, list):
        pair = _of_messages(prompt, chosen, rejected, source, chat)
    else:
        seen = f"{type(chosen).__name__} and {type(rejected).__name__}"
        detail = f"{source.chosen_column!r} and {source.rejected_column!r} hold {seen}; expected two strings, or lists"
        raise RowError(RejectReason.WRONG_TYPE, detail)
    _check_pair(pair)
    return pair


def _check_pair(pair: RenderedPair) -> None:
    for role, rendered in zip(Role, pair[:2], strict=True):
        if not rendered.response.strip():
            raise RowError(RejectReason.EMPTY_RESPONSE, f"the {role} response is empty or white space only")
    if pair.chosen.response.strip() == pair.rejected.response.strip():
        raise RowError(RejectReason.EQUAL_RESPONSES, "the chosen and the rejected response are the same")
    if pair.chosen.prompt != pair.rejected.prompt:
        raise _no_common_prompt("the chat template renders their common messages differently")


def _no_common_prompt(detail: str) -> RowError:
    return RowError(RejectReason.NO_COMMON_PROMPT, detail)


def _of_strings(prompt: Any, chosen: str, rejected: str) -> RenderedPair:
    if prompt is not None and not isinstance(prompt, str):
        raise RowError(RejectReason.WRONG_TYPE, f"the prompt is of type {type(prompt).__name__}; expected a string")
    if prompt and prompt.strip() and not _is_repeated(prompt, chosen, rejected):
        return RenderedPair(_plain(prompt, [Segment(chosen, True)]), _plain(prompt, [Segment(rejected, True)]), False)
    num_shared = _num_equal(chosen, rejected)
    start = chosen.rfind(ASSISTANT_MARK, 0, num_shared)
    if start < 0:
        raise _no_common_prompt(
            f"there is no prompt, and of two dialogues the first {num_shared} characters are the same, without a turn "
            f"{ASSISTANT_MARK!r} among them"
        )
    end = start + len(ASSISTANT_MARK)
    return RenderedPair(_dialogue(chosen, end), _dialogue(rejected, end), False)


def _is_repeated(prompt: str, chosen: str, rejected: str) -> bool:
    """Whether the two are whole dialogues that begin with the prompt, which stands in a column of its own, too."""
    return ASSISTANT_MARK in prompt and chosen.startswith(prompt) and rejected.startswith(prompt)


def _dialogue(text: str, start: int) -> Rendered:
    """A dialogue whose prompt ends at a character."""
    return _plain(text[:start], list(_turns(text[start:])))


def _plain(prompt: str, rest: list[Segment]) -> Rendered:
    response = "\n\n".join(segment.text for segment in rest if segment.scored)
    return Rendered(prompt, response, (Segment(prompt, False), *rest))


def _turns(text: str) -> Iterator[Segment]:
    """What follows a dialogue's prompt, up to its last assistant turn: these turns, and what stands between them."""
    first, *rest = _MARKS.split(text)
    yield Segment(first, True)
    between = ""
    for mark, said in zip(rest[::2], rest[1::2], strict=True):
        between += mark
        if mark == ASSISTANT_MARK:
            yield from (Segment(between, False), Segment(said, True))
            between = ""
        else:
            between += said


def _of_messages(
    prompt: Any, chosen: list[Any], rejected: list[Any], source: Source, chat: ChatTemplate | None
) -> RenderedPair:
    if chat is None:
        detail = "the responses are messages, and the base has no chat template; give one with --chat_template FILE"
        raise RowError(RejectReason.BAD_CONVERSATION, detail)
    names = (source.chosen_column, source.rejected_column)
    one, other = (
        _with_prompt(prompt, messages_of(value, name), source)
        for value, name in zip((chosen, rejected), names, strict=True)
    )
    given = _num_shared(one, other)
    return RenderedPair(render_turns(one, names[0], chat, given), render_turns(other, names[1], chat, given), True)


def _with_prompt(prompt: Any, messages: list[Message], source: Source) -> list[Message]:
    """The whole conversation: a column `prompt` may hold its beginning, or repeat it."""
    if isinstance(prompt, list):
        given = messages_of(prompt, source.prompt_column)
        return messages if messages[: len(given)] == given else [*given, *messages]
    if isinstance(prompt, str) and messages and messages[0]["role"] == "assistant":
        return [{"role": "user", "content": prompt}, *messages]
    return messages


def _num_shared(one: list[Message], other: list[Message]) -> int:
    """Messages at the beginning that are the prompt: the same in both, and followed by an assistant's in both."""
    shared = _num_equal(one, other)
    if shared == len(one) == len(other):
        raise RowError(RejectReason.EQUAL_RESPONSES, "the chosen and the rejected conversation are the same")
    while shared and not all(len(m) > shared and m[shared]["role"] == "assistant" for m in (one, other)):
        shared -= 1
    if not shared:
        raise _no_common_prompt("the two conversations share no message that an assistant's follows in both")
    return shared


def _num_equal(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many items at the beginning are the same."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
