"""A chat as one text: by the model's own template where it lies beside its tokenizer.json, else by a plain one.

The plain one writes each message as a line `role: content` and ends with `assistant:`. A model's template (Jinja, in
`tokenizer_config.json` or `chat_template.jinja`) is rendered in Jinja's sandbox.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from throttllem.openai_api.errors import ApiError, invalid

Message = Mapping[str, object]
Template = Callable[[Sequence[Message]], str]


class TemplateError(ValueError):
    """A chat template that cannot be used."""


def plain(messages: Sequence[Message]) -> str:
    """`role: content` lines, and `assistant:`."""
    return "".join(f"{message['role']}: {message['content']}\n" for message in messages) + "assistant:"


def text_messages(messages: object) -> list[dict[str, object]]:
    """Messages with their text parts joined. Raises ApiError 400 for what is no text, and for calls of tools."""
    if not isinstance(messages, list) or not messages:
        raise invalid("messages: must be a list of at least one message", "messages")
    return [_text_message(at, message) for at, message in enumerate(messages)]


def chat_template(tokenizer: Path | None) -> tuple[Template, Path | None]:
    """The template beside a tokenizer.json and its file, else the plain one and None. Raises TemplateError."""
    if tokenizer is None:
        return plain, None
    path, beside = tokenizer.parent / "tokenizer_config.json", tokenizer.parent / "chat_template.jinja"
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError, OSError) as error:
        raise TemplateError(f"{path}: not JSON: {error}") from error
    if not isinstance(config, dict):
        raise TemplateError(f"{path}: must hold a JSON object")
    source = config.get("chat_template")
    if isinstance(source, list):
        named = [entry for entry in source if isinstance(entry, dict) and entry.get("name") == "default"]
        source = named[0].get("template") if named else None
    try:
        if beside.is_file():
            source, path = beside.read_text(encoding="utf-8"), beside
    except (ValueError, OSError) as error:
        raise TemplateError(f"{beside}: {error}") from error
    if not isinstance(source, str):
        return plain, None
    special = {name: config.get(name) or "" for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    special = {name: value.get("content", "") if isinstance(value, dict) else value for name, value in special.items()}
    return _jinja(source, special, path), path


def _text_message(at: int, message: object) -> dict[str, object]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise _wrong(at, "must be an object with a role")
    if message.get("tool_calls") or message["role"] == "tool":
        raise _wrong(at, "this engine supports no tools")
    content = message.get("content")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts = [part.get("text") for part in parts if isinstance(part, dict) and part.get("type") == "text"]
    if len(texts) < len(parts) or not all(isinstance(text, str) for text in texts):
        raise _wrong(at, "content must be a text, or parts of type text")
    return {**message, "content": "".join(map(str, texts))}


def _wrong(at: int, why: str) -> ApiError:
    return invalid(f"messages[{at}]: {why}", "messages")


def _jinja(source: str, special: dict[str, Any], path: Path) -> Template:
    try:
        jinja, sandbox = import_module("jinja2"), import_module("jinja2.sandbox")
    except ImportError as error:
        raise TemplateError(f"{path}: its chat template needs the package jinja2 (pip install jinja2)") from error

    def fail(message: str) -> str:
        raise invalid(f"messages: the chat template refuses them: {message}", "messages")

    environment = sandbox.ImmutableSandboxedEnvironment(
        extensions=["jinja2.ext.loopcontrols"], trim_blocks=True, lstrip_blocks=True
    )
    environment.globals["raise_exception"] = fail
    try:
        template = environment.from_string(source)
    except (jinja.TemplateError, RecursionError, ArithmeticError, ValueError, TypeError) as error:
        raise TemplateError(f"{path}: {error}") from error

    def render(messages: Sequence[Message]) -> str:
        try:
            return str(template.render(messages=messages, add_generation_prompt=True, **special))
        except ApiError:
            raise
        except Exception as error:  # a template may fail in every way that Python can
            raise invalid(f"messages: the chat template fails on them: {error}", "messages") from error

    return render
