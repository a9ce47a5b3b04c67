"""What a record becomes before it is encoded: segments of text, scored or not."""

from typing import NamedTuple

from davir_ray.schema import RejectReason


class Segment(NamedTuple):
    """A stretch of the rendered text."""

    text: str
    scored: bool


class Rendered(NamedTuple):
    """The text of an example.

    `segments` in order are what the model reads, up to the last scored character. For all formats but messages they are
    the prompt (which may be empty) and the response. For messages no segment is empty, the text holds the template's
    special tokens (also BOS and end markers, if the template writes them), `prompt` is what stands before the first
    scored segment and `response` the assistant's contents joined by blank lines, without markers.
    """

    prompt: str
    response: str
    segments: tuple[Segment, ...]


class RowError(Exception):
    """A record that cannot become an example, with the reason and the particulars."""

    def __init__(self, reason: RejectReason, detail: str) -> None:
        """Keep both in `args`, which is what pickling keeps."""
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


def shorten(text: str, length: int = 60) -> str:
    """The text, its end replaced by an ellipsis where it is longer."""
    return text if len(text) <= length else text[: length - 1] + "…"
