"""Text from files and engines, as a terminal may get it: without control characters, which could rewrite the screen."""

from __future__ import annotations


def printable(text: str) -> str:
    """The text with every character escaped that does not print, but for line feeds and tabs; `\\x1b` for an escape."""
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() or letter in "\n\t" else letter.encode("unicode_escape").decode()
        for letter in text
    )
