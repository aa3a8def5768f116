"""One line of the doctor's report. Knows nothing of GPUs and keepers."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Mark(StrEnum):
    """How serious a finding is."""

    OK = "ok"
    NOTE = "--"
    TROUBLE = "!!"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """`text` about `subject`; `remedy`: what to do about it, None where nothing has to be done."""

    mark: Mark
    subject: str
    text: str
    remedy: str | None = None


def ok(subject: str, text: str) -> Finding:
    """It is as it should be."""
    return Finding(mark=Mark.OK, subject=subject, text=text)


def note(subject: str, text: str, remedy: str | None = None) -> Finding:
    """Worth knowing; nothing is wrong."""
    return Finding(mark=Mark.NOTE, subject=subject, text=text, remedy=remedy)


def trouble(subject: str, text: str, remedy: str) -> Finding:
    """Something is wrong; the remedy is required."""
    return Finding(mark=Mark.TROUBLE, subject=subject, text=text, remedy=remedy)
