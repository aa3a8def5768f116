"""Text from an engine or a client, as a log, a terminal or a page may show it: one line, no control characters."""

from __future__ import annotations

import logging
from types import TracebackType

MOST_CHARACTERS = 2000
_MOST_LINES = 200
Failure = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]


def printable(text: str, most: int = MOST_CHARACTERS) -> str:
    """The text with everything escaped that is no visible character or blank (control characters, terminal escapes,
    marks that reverse the direction), cut to `most` characters.
    """
    if len(text) > most:
        text = f"{text[:most]}... ({len(text)} characters)"
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


class PrintableFormatter(logging.Formatter):
    """One line a message, whatever it quotes; the lines of a traceback stay apart."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """The line without a traceback."""
        record.message = printable(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: Failure) -> str:  # noqa: N802
        """The traceback."""
        return "\n".join(printable(line) for line in super().formatException(ei).split("\n")[-_MOST_LINES:])
