"""One line of what the doctor says. Knows nothing of what it is about."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Mark(StrEnum):
    """How it is meant."""

    OK = "ok"
    NOTE = "--"
    TROUBLE = "!!"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """`text` about `subject`; `remedy`: what to do about it, None where nothing is to be done."""

    mark: Mark
    subject: str
    text: str
    remedy: str | None = None


def ok(subject: str, text: str) -> Finding:
    """As it should be."""
    return Finding(mark=Mark.OK, subject=subject, text=text)


def note(subject: str, text: str, remedy: str | None = None) -> Finding:
    """To be known."""
    return Finding(mark=Mark.NOTE, subject=subject, text=text, remedy=remedy)


def trouble(subject: str, text: str, remedy: str) -> Finding:
    """To be mended, and how."""
    return Finding(mark=Mark.TROUBLE, subject=subject, text=text, remedy=remedy)
