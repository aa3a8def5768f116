"""Whole numbers and truth values of a JSON body as vLLM, which reads them with pydantic, takes them.

`4.0`, `"4"` and `true` are whole numbers; `"true"`, `1` and `"on"` are true. Anything else is None.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import FailFast, TypeAdapter, ValidationError

_WHOLE = TypeAdapter(int).validator
_TRUTH = TypeAdapter(bool).validator
_TOKEN_IDS = TypeAdapter(Annotated[list[Annotated[list[int], FailFast()]], FailFast()]).validator


def whole_number(value: object) -> int | None:
    """The whole number that a value stands for."""
    try:
        found: int = _WHOLE.validate_python(value)
    except ValidationError:
        return None
    return found


def truth(value: object) -> bool | None:
    """The truth value that a value stands for."""
    try:
        found: bool = _TRUTH.validate_python(value)
    except ValidationError:
        return None
    return found


def token_ids(lists: object) -> list[list[int]] | None:
    """The whole numbers that lists stand for; in one call, as there may be many."""
    try:
        found: list[list[int]] = _TOKEN_IDS.validate_python(lists)
    except ValidationError:
        return None
    return found
