"""The model that a form names: audio and images are uploaded as `multipart/form-data`, the model beside them."""

from __future__ import annotations

import logging
from contextlib import suppress

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from throttllem.openai_api.errors import invalid
from throttllem.openai_api.large_bodies import PIECE_BYTES, find

_FORM = b"multipart/form-data"
_SILENT = logging.Logger("multipart", logging.CRITICAL)
"""The parser would log every fault of a client's form."""
_LONGEST_NAME_BYTES = 1024
_LONGEST_TYPE_BYTES = 1024
"""Of a content-type that is read: the longest boundary and some; 1 ms at worst."""
_MOST_PARTS = 100
"""Several times what engines read."""
_MOST_OPTIONS = 8
"""Of a part's content-disposition that is read: `name`, `filename`, `filename*` and some."""
_MOST_BLANKS = 64
"""Behind a boundary, where the parser goes byte by byte."""


def model_in_form(body: bytes, content_type: str) -> str | None:
    """The text of the field `model`; None if the body is no such form, or the form has no such field. Raises ApiError
    400 for a form that would take too long to read.
    """
    if len(content_type) > _LONGEST_TYPE_BYTES:
        message = f"content-type: is over {_LONGEST_TYPE_BYTES} bytes, the most that is read of a form's: shorten it"
        raise invalid(message, "content-type")
    kind, options = parse_options_header(content_type)
    if kind != _FORM or not (boundary := options.get(b"boundary")):
        return None
    _check_parts(body, b"\r\n--" + boundary)
    fields = _Fields()
    with suppress(FormParserError):  # the engine says what is wrong; the model may be known by then
        parser = MultipartParser(boundary, fields.callbacks())  # type: ignore[arg-type]
        parser.logger = _SILENT
        for at in range(0, len(body), PIECE_BYTES):
            parser.write(body[at : at + PIECE_BYTES])
            if fields.model is not None:
                break
    return fields.model


def _check_parts(body: bytes, delimiter: bytes) -> None:
    parts, at = 0, find(body, delimiter, 0)
    while at >= 0:
        parts, end = parts + 1, at + len(delimiter)
        if parts > _MOST_PARTS:
            raise invalid(f"the form has more than {_MOST_PARTS} parts, the most that are read: send fewer")
        behind = body[end : end + _MOST_BLANKS + 1]
        if len(behind) > _MOST_BLANKS and not behind.strip(b" \t"):
            raise invalid(f"the form has more than {_MOST_BLANKS} blanks behind a boundary: send none")
        at = find(body, delimiter, end)


class _Fields:
    """Keeps the value of the first field called `model`; files are passed over."""

    def __init__(self) -> None:
        self.model: str | None = None
        self._name = b""
        self._value = b""
        self._is_model = False
        self._parts: list[bytes] | None = None

    def callbacks(self) -> dict[str, object]:
        """What the parser calls."""
        return {
            "on_part_begin": self._part,
            "on_header_field": self._header_field,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_part_data": self._data,
            "on_part_end": self._end,
        }

    def _part(self) -> None:
        self._name = self._value = b""
        self._is_model, self._parts = False, []

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        if self._name.lower() == b"content-disposition":
            short = self._value.count(b";") <= _MOST_OPTIONS
            _, options = parse_options_header(self._value) if short else (b"", {})
            self._is_model = options.get(b"name") == b"model" and b"filename" not in options
        self._name = self._value = b""

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._is_model and self.model is None and self._parts is not None:
            self._parts.append(data[start:end])

    def _end(self) -> None:
        if self._is_model and self.model is None:
            name = b"".join(self._parts or ())
            if len(name) <= _LONGEST_NAME_BYTES:
                self.model = name.decode("utf-8", "replace")
