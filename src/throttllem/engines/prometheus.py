"""Reads a few samples out of a metrics page of Prometheus's text format, without parsing the rest of it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

LABEL = re.compile(rb'\s*([a-zA-Z_]\w*)\s*=\s*"((?:[^"\\]|\\.)*)"\s*,?\s*')
NUMBER = re.compile(rb"[ \t]+([^\s#]+)")
ESCAPED = re.compile(r'\\([\\"n])')


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One line of a metrics page."""

    labels: dict[str, str]
    value: float


def samples(page: bytes, name: str) -> Iterator[Sample]:
    """The samples of exactly this name, in order; lines that are none are passed over."""
    wanted = name.encode()
    at = page.find(wanted)
    while at >= 0:
        end = at + len(wanted)
        if (at == 0 or page[at - 1 : at] == b"\n") and page[end : end + 1] in (b"{", b" ", b"\t"):
            sample = _sample(page, end)
            if sample is not None:
                yield sample
        at = page.find(wanted, end)


def total(page: bytes, name: str) -> float | None:
    """The sum over all samples of this name (one per engine behind an address); None: there is none."""
    values = [sample.value for sample in samples(page, name)]
    return sum(values) if values else None


def _sample(page: bytes, at: int) -> Sample | None:
    labels: dict[str, str] = {}
    if page[at : at + 1] == b"{":
        at += 1
        while (found := LABEL.match(page, at)) is not None:
            labels[found[1].decode()] = _plain(found[2].decode(errors="replace"))
            at = found.end()
        if page[at : at + 1] != b"}":
            return None
        at += 1
    number = NUMBER.match(page, at)
    try:
        return None if number is None else Sample(labels=labels, value=float(number[1]))
    except ValueError:
        return None


def _plain(text: str) -> str:
    return ESCAPED.sub(lambda found: "\n" if found[1] == "n" else found[1], text) if "\\" in text else text
