"""The chat that a request of `/v1/responses` or `/v1/messages` stands for, so that its prompt can be counted.

Only what an engine's `/tokenize` needs. Where the prompt has a part that is not in the request (a stored response), or
one that no chat of texts and tools has (a picture, a document), there is no such chat, and the count is an estimate.
"""

from __future__ import annotations

import json
from typing import Any

_TOOL_FIELDS = ("name", "description", "parameters", "strict")


class _NoChatError(Exception):
    """A part of the prompt that is no text and no call of a function."""


def chat_of_response(fields: dict[str, Any]) -> dict[str, Any] | None:
    """The chat of a request of OpenAI's Responses; None: it cannot be known from the request alone."""
    if fields.get("previous_response_id") or fields.get("conversation") or fields.get("prompt"):
        return None
    given = fields.get("input")
    messages = [_message("system", fields["instructions"])] if fields.get("instructions") else []
    try:
        if isinstance(given, str):
            messages.append(_message("user", given))
        elif isinstance(given, list):
            for item in given:
                messages.append(_item(item))
        else:
            return None
        tools = [_function_tool(tool) for tool in fields.get("tools") or ()]
    except (_NoChatError, AttributeError, KeyError, TypeError):
        return None
    return _chat(messages, tools)


def chat_of_message(fields: dict[str, Any]) -> dict[str, Any] | None:
    """The chat of a request of Anthropic's Messages; None: it has parts that no chat of texts and tools has."""
    messages: list[dict[str, Any]] = []
    try:
        if system := _joined(fields.get("system") or ""):
            messages.append(_message("system", system))
        for message in fields["messages"]:
            messages += _blocks(message["role"], message["content"])
        tools = [
            _function_tool({**tool, "type": "function", "parameters": tool["input_schema"]})
            for tool in fields.get("tools") or ()
        ]
    except (_NoChatError, AttributeError, KeyError, TypeError):
        return None
    return _chat(messages, tools)


def texts_in(value: object) -> list[str]:
    """Every text in the input of such a request, for an estimate; other parts, as pictures, count nothing."""
    if isinstance(value, str):
        return [value]
    found: list[str] = []
    for part in value if isinstance(value, list) else ():
        if isinstance(part, dict):
            for name in ("text", "content", "thinking", "output", "arguments"):
                found += texts_in(part.get(name))
    return found


def _chat(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> dict[str, Any] | None:
    if not messages:
        return None
    return {"messages": messages, "tools": tools} if tools else {"messages": messages}


def _message(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def _item(item: dict[str, Any]) -> dict[str, Any]:
    match item.get("type", "message"):
        case "message":
            return _message(item["role"], _joined(item["content"]))
        case "function_call":
            return {"role": "assistant", "tool_calls": [_call(item["call_id"], item["name"], item["arguments"])]}
        case "function_call_output":
            return {"role": "tool", "tool_call_id": item["call_id"], "content": _joined(item["output"])}
    raise _NoChatError


def _blocks(role: str, content: object) -> list[dict[str, Any]]:
    """The messages that one of Anthropic's is: results of tools are messages by themselves."""
    if isinstance(content, str):
        return [_message(role, content)]
    before: list[dict[str, Any]] = []
    texts: list[str] = []
    calls: list[dict[str, Any]] = []
    if not isinstance(content, list):
        raise _NoChatError
    for block in content:
        match block["type"]:
            case "text":
                texts.append(block["text"])
            case "tool_use":
                calls.append(_call(block["id"], block["name"], json.dumps(block["input"])))
            case "tool_result":
                result = _joined(block.get("content") or "")
                before.append({"role": "tool", "tool_call_id": block["tool_use_id"], "content": result})
            case _:
                raise _NoChatError
    if not texts and not calls:
        return before
    message: dict[str, Any] = {"role": role}
    if len(texts) == 1:
        message["content"] = texts[0]
    elif texts:
        message["content"] = [{"type": "text", "text": text} for text in texts]
    return [*before, message | {"tool_calls": calls} if calls else message]


def _joined(content: object) -> str:
    """A text, or the texts of a list of parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or any(not isinstance(part.get("text"), str) for part in content):
        raise _NoChatError
    return "".join(part["text"] for part in content)


def _call(name: str, function: str, arguments: str) -> dict[str, Any]:
    return {"id": name, "type": "function", "function": {"name": function, "arguments": arguments}}


def _function_tool(tool: dict[str, Any]) -> dict[str, Any]:
    if tool["type"] != "function":
        raise _NoChatError
    return {"type": "function", "function": {name: tool[name] for name in _TOOL_FIELDS if name in tool}}
