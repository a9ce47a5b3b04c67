"""What a record becomes before it is encoded: segments of text, scored or not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, NamedTuple

from davir_ray.schema import RejectReason
from davir_ray.text import shorten


class Segment(NamedTuple):
    """A piece of the rendered text."""

    text: str
    scored: bool


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """The text of one example."""

    prompt: str
    """The text before the first scored segment, which may be empty."""
    response: str
    """The scored text: of assistant turns their contents and tool calls, joined by blank lines, without what the
    template writes around them."""
    segments: tuple[Segment, ...]
    """All that the model reads, in order, up to the last scored character."""
    templated: bool = False
    """The text comes from a chat template: it contains special tokens (also BOS and end markers, if the template
    writes them), and no segment is empty."""
    contents: tuple[tuple[str, str], ...] = ()
    """The role and the content of each message, in the order of the text; empty where it has no roles."""
    num_turns_left_out: int = 0
    """Number of the assistant's turns that are not scored because the data or prepare.score_turns leave them out."""


class RowError(Exception):
    """A record cannot become an example, for one of the schema's reasons."""

    def __init__(self, reason: RejectReason, detail: str) -> None:
        """Pass both to Exception, so that they survive pickling."""
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


class LeftOutError(Exception):
    """The data's own marks leave a record out: a bad answer of KTO's, or a conversation with no turn to score."""


def column(fields: Mapping[str, Any], name: str) -> Any:
    """The value of a column; RowError missing_column where it is absent or null."""
    if fields.get(name) is None:
        fault = "is null" if name in fields else "is absent"
        seen = ", ".join(sorted(fields)) or "none"
        raise RowError(RejectReason.MISSING_COLUMN, f"column {name!r} {fault}; columns seen: {shorten(seen, 200)}")
    return fields[name]


def num_equal(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Number of items at the beginning that are equal."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
