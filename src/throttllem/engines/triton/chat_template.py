"""A chat as one text: the model's own template where its tokenizer's folder holds one, a plain one where not.

The plain one writes each message as `role: content` on a line of its own and ends with `assistant:`. A template of
the model (Jinja, in `tokenizer_config.json` or `chat_template.jinja`) is rendered in Jinja's sandbox.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path

Message = Mapping[str, object]
Template = Callable[[Sequence[Message]], str]


class ChatError(ValueError):
    """A chat that cannot be written as one text, or a template that cannot be used."""


def plain(messages: Sequence[Message]) -> str:
    """`role: content` lines, and `assistant:`."""
    return "".join(f"{message['role']}: {message['content']}\n" for message in messages) + "assistant:"


def checked(messages: object) -> list[dict[str, object]]:
    """Messages with their text parts joined. Raises ChatError for what is no text, and for calls of tools."""
    if not isinstance(messages, list) or not messages:
        raise ChatError("messages: must be a list of at least one message")
    return [_message(at, message) for at, message in enumerate(messages)]


def chat_template(tokenizer: Path | None) -> tuple[Template, str]:
    """The template that lies beside a tokenizer.json, else the plain one; and where it is from.

    Raises ChatError if there is one that cannot be used here.
    """
    found = None if tokenizer is None else _source(tokenizer.parent)
    if found is None:
        return plain, "plain"
    source, special, path = found
    return _jinja(source, special, path), str(path)


def _message(at: int, message: object) -> dict[str, object]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ChatError(f"messages[{at}]: must be an object with a role")
    if message.get("tool_calls") or message.get("role") == "tool":
        raise ChatError(f"messages[{at}]: this engine knows no tools")
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(_part(at, part) for part in content)
    if not isinstance(content, str):
        raise ChatError(f"messages[{at}].content: must be a text")
    return {**message, "content": content}


def _part(at: int, part: object) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise ChatError(f"messages[{at}].content: this engine takes parts of type text only")


def _source(folder: Path) -> tuple[str, dict[str, str], Path] | None:
    """Template, special tokens by name, and the file; None if there is no template."""
    path = folder / "tokenizer_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ChatError(f"{path}: no JSON: {error}") from error
    special = {name: _token(config.get(name)) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    beside = folder / "chat_template.jinja"
    if beside.is_file():
        return beside.read_text(encoding="utf-8"), special, beside
    template = config.get("chat_template")
    if isinstance(template, list):
        template = next((entry["template"] for entry in template if entry.get("name") == "default"), None)
    return None if not isinstance(template, str) else (template, special, path)


def _token(value: object) -> str:
    return str(value.get("content", "")) if isinstance(value, dict) else value if isinstance(value, str) else ""


def _jinja(source: str, special: dict[str, str], path: Path) -> Template:
    try:
        jinja, sandbox = import_module("jinja2"), import_module("jinja2.sandbox")
    except ImportError as error:
        raise ChatError(f"{path}: its chat template needs the package jinja2 (pip install jinja2)") from error

    def fail(message: str) -> str:
        raise ChatError(f"the chat template refuses it: {message}")

    environment = sandbox.ImmutableSandboxedEnvironment(
        extensions=["jinja2.ext.loopcontrols"], trim_blocks=True, lstrip_blocks=True
    )
    environment.globals["raise_exception"] = fail
    try:
        template = environment.from_string(source)
    except jinja.TemplateError as error:
        raise ChatError(f"{path}: {error}") from error

    def render(messages: Sequence[Message]) -> str:
        try:
            return str(template.render(messages=messages, add_generation_prompt=True, **special))
        except ChatError:
            raise
        # A template may fail in every way that Python can.
        except Exception as error:
            raise ChatError(f"the chat template fails on it: {error}") from error

    return render
