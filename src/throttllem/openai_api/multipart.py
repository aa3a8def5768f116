"""The model that a form names: audio and images are uploaded as `multipart/form-data`, the model beside them."""

from __future__ import annotations

import logging
from contextlib import suppress

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header

from throttllem.openai_api.errors import invalid

_FORM = b"multipart/form-data"
_SILENT = logging.Logger("multipart", logging.CRITICAL)
"""The parser would log every fault of a client's form."""
_LONGEST_NAME_BYTES = 1024
_MOST_PARTS = 100
"""Several times what engines read; with the longest headers this many take about 25 ms to parse."""


def model_in_form(body: bytes, content_type: str) -> str | None:
    """The text of the field `model`; None if the body is no such form, or the form has no such field. Raises ApiError
    400 for a form of too many parts.
    """
    kind, options = parse_options_header(content_type)
    if kind != _FORM or not (boundary := options.get(b"boundary")):
        return None
    if body.count(b"\r\n--" + boundary) > _MOST_PARTS:
        raise invalid(f"the form has more than {_MOST_PARTS} parts, the most that are read: send fewer")
    fields = _Fields()
    with suppress(MultipartParseError):  # the engine says what is wrong; the model may be known by then
        parser = MultipartParser(boundary, fields.callbacks())  # type: ignore[arg-type]
        parser.logger = _SILENT
        parser.write(body)
    return fields.model


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
            _, options = parse_options_header(self._value)
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
