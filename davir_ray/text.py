"""Text from users' files, and text for their terminals."""

import codecs
import io
import logging
import unicodedata
from typing import Any

BYTE_ORDER_MARK = "\ufeff"
"""The character that some editors put at the beginning of a file."""

_SAFE = set("\n\t\u200c\u200d")
"""The last two are invisible joiners that scripts and emoji need; they cannot hide or reorder text."""

_UNSAFE_CATEGORIES = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode categories: controls, formats (such as writing direction), lone surrogates, line and paragraph separators."""


def decoded(content: bytes) -> str:
    """The text of a file from a text editor, with \\n as its line end.

    The file is UTF-8, or UTF-16 with a byte-order mark; the mark is not part of the text. Raises UnicodeDecodeError for
    anything else.
    """
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return content.decode("utf-16" if is_utf16 else "utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")


def one_line(error: BaseException, max_length: int | None = None) -> str:
    """The message of an error in one line of at most `max_length` characters; its type where the message is empty."""
    return " ".join(str(error).split())[:max_length] or type(error).__name__


def shorten(text: str, length: int = 60) -> str:
    """The text, cut to this length with an ellipsis at the end where it is longer."""
    return text if len(text) <= length else text[: length - 1] + "…"


def shorten_middle(text: str, length: int) -> str:
    """The text, cut to this length with an ellipsis in place of its middle where it is longer."""
    tail = length // 4
    return text if len(text) <= length else f"{text[: length - tail - 1]}…{text[-tail:]}"


def format_bytes(count: float) -> str:
    """A number of bytes with its unit, in three digits."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"


def printable(text: str) -> str:
    """Escape the characters of a text that would control a terminal or reorder a line, except \\n and \\t.

    Data may contain escape sequences, which a terminal would execute.
    """
    if text.isprintable():
        return text
    unsafe = [one for one in set(text) - _SAFE if unicodedata.category(one) in _UNSAFE_CATEGORIES]
    return text.translate({ord(one): one.encode("unicode_escape").decode() for one in unsafe})


class PrintableFormatter(logging.Formatter):
    """Formats log lines that are safe on a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, passed through `printable`."""
        return printable(super().format(record))


class PrintableStream:
    """A text stream for a terminal: characters that its encoding lacks become escapes, and all text is `printable`.

    Without it, a character that the encoding lacks would end the job with a UnicodeEncodeError.
    """

    def __init__(self, stream: Any) -> None:
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")
        self._stream = stream

    def write(self, text: str) -> int:
        """Write the text; returns its length."""
        self._stream.write(printable(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
