"""Text that comes from people's files, and text that goes to their terminals."""

import codecs
import io
import logging
import unicodedata
from typing import Any

BYTE_ORDER_MARK = "\ufeff"
"""What some editors put before a text."""

_JOINERS = "\u200c\u200d"
"""Of the characters without a shape, those that scripts and emoji need; they move and hide nothing."""


def decoded(content: bytes) -> str:
    """The text of a file that a person wrote, its lines ended by \\n.

    It is UTF-8, or UTF-16 where it begins with a byte-order mark, as some editors write; the mark is no part of the
    text. Raises UnicodeDecodeError for anything else.
    """
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return content.decode("utf-16" if is_utf16 else "utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")


def one_line(error: BaseException, most: int | None = None) -> str:
    """What an error says, in one line of at most so many characters; its type where it says nothing."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def printable(text: str) -> str:
    """The text with what would act on a terminal, or turn its line around, as escapes; \\n and \\t stay.

    Data may hold escape sequences, and a terminal obeys them.
    """
    return text if text.isprintable() else "".join(map(_shown, text))


def _shown(character: str) -> str:
    if character in "\n\t" or character in _JOINERS or unicodedata.category(character) not in _ACTING:
        return character
    return character.encode("unicode_escape").decode()


_ACTING = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Categories: controls, formats (directions of writing), lone surrogates, separators of lines and paragraphs."""


class PrintableFormatter(logging.Formatter):
    """Formats log lines such that a terminal can show them."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, as `printable` has it."""
        return printable(super().format(record))


class PrintableStream:
    """A stream of text for a terminal: what its encoding lacks is written as escapes, and so is what `printable` says.

    Without it a letter that the encoding lacks would end the job in a UnicodeEncodeError.
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
