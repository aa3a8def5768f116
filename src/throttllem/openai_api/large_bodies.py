"""Large JSON bodies, read without holding the event loop: what is not ours is skipped, not built.

The parser holds the interpreter's lock during one call, so a thread alone would not help: every call here is bounded to
a few tens of milliseconds (docs/evaluation/bounds.md), by skipping (msgspec passes over 32 MB in 10 to 60 ms, and makes
no objects of it) and by a limit on the elements of a body. Knows no fields' meaning.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec
import numpy as np
from msgspec import Raw

from throttllem.openai_api.errors import invalid

LARGE_BYTES = 64 * 1024
"""A body up to this size is parsed whole: at worst that takes 3 ms. Of a larger one, larger values stay undecoded."""
OFF_LOOP_BYTES = 1024 * 1024
"""A larger body is read in a thread, so that other requests go on between two calls of the parser."""
PIECE_BYTES = 64 * 1024
"""Of a body that is searched in one call: 1 to 2 ms at worst, after which another thread has the interpreter."""
MOST_ELEMENTS = 4_000_000
"""Commas, colons and brackets of one body: this many take msgspec about 25 ms to skip."""
MOST_OBJECTS = 200_000
"""Lists, objects, texts or keys that are built of one value: about 30 ms."""
_DECODED_BYTES = 12 * 1024 * 1024
"""The most bytes of one value that is decoded: a text of escapes takes 30 ms."""
_DECODED_LISTS = 20_000
"""The most lists of a prompt that are decoded: these take about 25 ms."""
_NAMES = (
    "model prompt messages text_input max_tokens max_completion_tokens n best_of stream stream_options user throttllem "
    "echo tools tool_choice add_generation_prompt continue_final_message chat_template chat_template_kwargs "
    "add_special_tokens cache_salt mm_processor_kwargs media_io_kwargs input instructions store background "
    "previous_response_id max_output_tokens system documents query text_1 text_2 priority logprobs top_logprobs "
    "prompt_logprobs service_tier"
)
"""Fields that the gateway reads, of whichever kind of request."""


class _Model(msgspec.Struct):
    model: Raw = Raw(b"null")
    throttllem: Raw = Raw()


_MODEL = msgspec.json.Decoder(_Model)
_NAMED = tuple(
    msgspec.json.Decoder(msgspec.defstruct("_Named", [(name, Raw, Raw()) for name in _NAMES.split()[at::4]]))
    for at in range(4)
)
"""A few names each: the parser compares every key with every name, in one call."""
_ALL = msgspec.json.Decoder(dict[str, Raw])
_TEXTS = msgspec.json.Decoder(list[str])
_ANY = msgspec.json.Decoder()
_TOKEN_LISTS = re.compile(rb"\[\[(?:\]\[)*\]\]")
_NOT_JSON = (msgspec.DecodeError, RecursionError, UnicodeDecodeError)
_BLANK = b" \t\r\n"


def named_values(body: bytes, *, decoded: bool = False) -> dict[str, Any]:
    """The fields of an object that the gateway reads; values over LARGE_BYTES stay as Raw. `decoded`: all fields, all
    values decoded. Raises ApiError 400 for what is no object, or too much to be read.
    """
    _check_elements(body)
    try:
        values: dict[str, Raw]
        if decoded:
            if _occurrences(body, b'":') + _occurrences(body, b'" :') > MOST_OBJECTS:
                raise invalid(f"the body has more keys than {MOST_OBJECTS}, the most that are translated")
            values = _ALL.decode(body)
        else:
            values = _named(body)
    except msgspec.ValidationError:
        raise invalid("the body must be a JSON object") from None
    except _NOT_JSON as error:
        raise invalid(f"the body is not JSON: {str(error)[:200]}") from None
    # A small value is cheap whatever it is; a large one stays as it is.
    return {
        name: read_value(name, raw) if decoded or len(memoryview(raw)) <= LARGE_BYTES else raw
        for name, raw in values.items()
    }


def model_in(body: bytes) -> str | None:
    """The text in `model` of a JSON object; None if it is no such thing. Raises ApiError 400 for too many elements, and
    for the gateway's own field: only requests under control have metrics.
    """
    first = _after_blanks(body, 0)
    if body[first : first + 1] != b"{":
        return None
    _check_elements(body)
    try:
        read = _MODEL.decode(body)
        model = _ANY.decode(read.model)
    except _NOT_JSON:
        return None
    if memoryview(read.throttllem):
        message = "throttllem: only requests under control have metrics; send this one without the field"
        raise invalid(message, "throttllem")
    return model if isinstance(model, str) else None


def read_value(name: str, raw: Raw) -> Any:
    """A value decoded. Raises ApiError 400 for one that would take too long."""
    content = memoryview(raw)
    if len(content) > _DECODED_BYTES or _count(raw, b"[{,") > MOST_OBJECTS:
        shown = f"{_DECODED_BYTES} bytes or {MOST_OBJECTS} elements"
        raise invalid(f"{name}: is over {shown}, the most that is read of one field here", name)
    try:
        return _ANY.decode(raw)
    except _NOT_JSON as error:
        raise invalid(f"{name}: is not JSON: {str(error)[:200]}", name) from None


def prompt_lengths(raw: Raw) -> tuple[Any, ...] | None:
    """The prompts in a large value: one text, undecoded; the texts of a list; or a `range` as long as each list of
    token ids (lists have the mean of their lengths). None for anything else. Raises ApiError 400 for
    that with too many lists.
    """
    if memoryview(raw)[0] == ord('"'):
        return (raw,)
    content = bytes(raw)
    if content.count(b'"') == 0:
        commas = content.count(b",")
        shape = content.translate(None, b"0123456789," + _BLANK)
        if shape == b"[]":
            return (range(commas + 1),)
        if b"[]" in content.translate(None, _BLANK):
            shape = b""
        if shape.count(b"[") < MOST_OBJECTS and _TOKEN_LISTS.fullmatch(shape):
            lists = shape.count(b"[") - 1
            return (range(-(-(commas + 1) // lists)),) * lists
    elif content.count(b'"') <= 2 * MOST_OBJECTS and len(content) <= _DECODED_BYTES:
        try:
            return tuple(_TEXTS.decode(content))
        except _NOT_JSON:
            pass
    if content.count(b"[") > _DECODED_LISTS:
        message = f"prompt: is over {_DECODED_LISTS} lists, the most that are read unless all are token ids in digits"
        raise invalid(message, "prompt")
    return None


def _named(body: bytes) -> dict[str, Raw]:
    """The fields that the gateway reads, undecoded."""
    parts = [msgspec.structs.asdict(decoder.decode(body)) for decoder in _NAMED]
    return {name: raw for part in parts for name, raw in part.items() if raw}


def with_model(body: bytes, model: str) -> bytes:
    """The object with another value in `model`, every other byte as it was. Raises ApiError 400 for what is no JSON."""
    try:
        raw = _MODEL.decode(body).model
    except _NOT_JSON as error:
        raise invalid(f"the body is not JSON: {str(error)[:200]}") from None
    start, seen = _address(raw) - _address(body), memoryview(body)
    return b"".join((seen[:start], msgspec.json.encode(model), seen[start + len(memoryview(raw)) :]))


def without(body: bytes, name: str) -> bytes:
    """The object without one field, every other byte as it was. Raises ApiError 400 if the field is there twice."""
    raw = _named(body)[name]
    start = _address(raw) - _address(body)
    end = start + len(memoryview(raw))
    colon = body.rfind(b":", 0, start)
    key_end = body.rfind(b'"', 0, colon)
    key = body.rfind(b'"', 0, key_end)
    after = _after_blanks(body, end)
    if body[after] == ord(","):
        end = after + 1
    else:
        before = _before_blanks(body, key) - 1
        key = before if body[before] == ord(",") else key
    seen = memoryview(body)
    rest = b"".join((seen[:key], seen[end:]))
    if name in _named(rest):
        raise invalid(f"{name}: is in the body twice", name)
    return rest


def find(body: bytes, text: bytes, at: int) -> int:
    """Where the text next begins, from `at` on; -1: nowhere. In pieces: one call would hold up the event loop."""
    while at < len(body):
        if (found := body.find(text, at, at + PIECE_BYTES + len(text) - 1)) >= 0:
            return found
        at += PIECE_BYTES
    return -1


def _after_blanks(body: bytes, at: int) -> int:
    """Where the blanks that begin at `at` end."""
    while at < len(body):
        piece = body[at : at + PIECE_BYTES]
        if rest := piece.lstrip(_BLANK):
            return at + len(piece) - len(rest)
        at += len(piece)
    return at


def _before_blanks(body: bytes, end: int) -> int:
    """Where the blanks that end at `end` begin."""
    while end > 0:
        start = max(0, end - PIECE_BYTES)
        if rest := body[start:end].rstrip(_BLANK):
            return start + len(rest)
        end = start
    return end


def _occurrences(body: bytes, text: bytes) -> int:
    """How often a short text is in the body, about; in pieces."""
    return sum(body.count(text, at, at + PIECE_BYTES + len(text) - 1) for at in range(0, len(body), PIECE_BYTES))


def _check_elements(body: bytes) -> None:
    if len(body) > LARGE_BYTES and _count(body, b"[{,:") > MOST_ELEMENTS:
        raise invalid(f"the body has more lists, objects and elements than {MOST_ELEMENTS}")


def _count(content: bytes | Raw, characters: bytes) -> int:
    """How often the characters occur, those in texts included; in pieces, each of which takes below a millisecond."""
    seen = np.frombuffer(content, np.uint8)
    pieces = (seen[at : at + (1 << 20)] for at in range(0, len(seen), 1 << 20))
    return sum(int(np.count_nonzero(piece == character)) for piece in pieces for character in characters)


def _address(content: bytes | Raw) -> int:
    return int(np.frombuffer(content, np.uint8).ctypes.data)
