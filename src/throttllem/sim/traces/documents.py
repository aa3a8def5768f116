"""Records of whole runs, in JSON: vLLM's benchmark results, GenAI-Perf's exports, OpenTelemetry's spans; as rows.

Each record nests its requests in its own way. Knows nothing of files and of what a valid row is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from throttllem.sim.traces.formats import Layout
from throttllem.sim.traces.generators import TraceError
from throttllem.sim.traces.rows import FAILED

Row = tuple[str | None, str | None, str | None, str | None]
"""Arrival, prompt tokens, generated tokens, and why it is left out (None: it is a request)."""


def vllm_rows(document: Mapping[str, Any]) -> Iterator[Row]:
    """`vllm bench serve --save-result --save-detailed`: parallel lists, one entry a request, `start_times` in s."""
    lists: list[list[Any]] = []
    for name in ("start_times", "input_lens", "output_lens"):
        values = document.get(name)
        if not isinstance(values, list):
            raise TraceError(
                f"a benchmark result without {name}: save it with --save-detailed by a version that writes start_times"
            )
        lists.append(values)
    errors = _list(document, "errors") or [""] * len(lists[0])
    lengths = {len(values) for values in (*lists, errors)}
    if len(lengths) > 1:
        raise TraceError(f"lists of a benchmark result differ in length: {sorted(lengths)}; save it again")
    for arrival, prompt, generated, error in zip(lists[0], lists[1], lists[2], errors, strict=True):
        yield _text(arrival), _text(prompt), _text(generated), FAILED if error else None


def genai_perf_rows(document: Mapping[str, Any]) -> Iterator[Row]:
    """GenAI-Perf's `profile_export.json`: `timestamp` in ns; tokens from the `usage` that the server sent."""
    experiments = _objects(document, "experiments")
    if len(experiments) != 1:
        raise TraceError("experiments: must be a list of one; export each load on its own")
    requests = _objects(experiments[0], "requests")
    usages = [_usage(_list(request, "response_outputs")) for request in requests]
    if requests and not any(usages):
        raise TraceError(
            "GenAI-Perf's export holds texts, no token counts: run it with usage in the stream "
            "(--extra-inputs stream_options:'{\"include_usage\": true}'), or take aiperf's profile_export.jsonl"
        )
    for request, usage in zip(requests, usages, strict=True):
        tokens = usage or {}
        yield (
            _text(request.get("timestamp")),
            _text(tokens.get("prompt_tokens")),
            _text(tokens.get("completion_tokens")),
            FAILED if usage is None else None,
        )


def _usage(outputs: list[Any]) -> dict[str, Any] | None:
    """The last `usage` in the texts that the server sent: events of a stream, or one JSON object."""
    for output in reversed(outputs):
        text = output.get("response") if isinstance(output, dict) else None
        for part in reversed(text.splitlines() if isinstance(text, str) else ()):
            try:
                found = json.loads(part.removeprefix("data:"))
            except ValueError:
                continue
            usage = found.get("usage") if isinstance(found, dict) else None
            if isinstance(usage, dict):
                return usage
    return None


_GENERATION = (None, "chat", "text_completion", "generate_content", "completion", "message", "response")
"""Operations that generate, as the convention and clients name them (also in the plural, as APIs do); a span of an
agent repeats the tokens of the calls inside it.
"""
_INPUT = ("gen_ai.usage.input_tokens", "gen_ai.usage.prompt_tokens")
_OUTPUT = ("gen_ai.usage.output_tokens", "gen_ai.usage.completion_tokens")
"""By today's convention, and by that before 1.27."""
_ERROR = 2


def span_rows(document: Mapping[str, Any]) -> Iterator[Row]:
    """OTLP in JSON (`resourceSpans`): spans with `gen_ai.*`; `startTimeUnixNano`. Those that generate are requests."""
    for resource in _objects(document, "resourceSpans"):
        for scope in _objects(resource, "scopeSpans") or _objects(resource, "instrumentationLibrarySpans"):
            for span in _objects(scope, "spans"):
                said = {str(each.get("key")): _value(each.get("value")) for each in _objects(span, "attributes")}
                if not any(key.startswith("gen_ai.") for key in said):
                    continue
                prompt, generated = (next((said[k] for k in keys if k in said), None) for keys in (_INPUT, _OUTPUT))
                yield _text(span.get("startTimeUnixNano")), _text(prompt), _text(generated), _left_out(span, said)


def _left_out(span: Mapping[str, Any], said: Mapping[str, Any]) -> str | None:
    operation = said.get("gen_ai.operation.name")
    if operation not in _GENERATION and str(operation).removesuffix("s") not in _GENERATION:
        return f"of operation {str(operation)[:40]}"
    status = span.get("status")
    code = status.get("code") if isinstance(status, dict) else None
    return FAILED if code in (_ERROR, "STATUS_CODE_ERROR") or "error.type" in said else None


def _value(value: Any) -> Any:
    """Of an attribute: `{"intValue": "7"}` is 7."""
    return next(iter(value.values()), None) if isinstance(value, dict) else value


def _list(found: Mapping[str, Any], key: str) -> list[Any]:
    """The list at a key; empty where it is missing or null. Raises TraceError for another value."""
    values = found.get(key)
    if values is None:
        return []
    if not isinstance(values, list):
        raise TraceError(f"{key} = {json.dumps(values)[:40]}: must be a list; export the run again")
    return values


def _objects(found: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    """The list of objects at a key. Raises TraceError for another value."""
    values = _list(found, key)
    for value in values:
        if not isinstance(value, dict):
            raise TraceError(f"{key}: {json.dumps(value)[:40]} is not an object; export the run again")
    return values


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


DOCUMENTS: Mapping[str, tuple[Callable[[Mapping[str, Any]], Iterator[Row]], Layout]] = MappingProxyType(
    {
        "resourceSpans": (
            span_rows,
            Layout(
                format="OpenTelemetry",
                arrival="startTimeUnixNano",
                prompt=_INPUT[0],
                generated=_OUTPUT[0],
                unit="ns",
                failures=("status.code", "error.type"),
            ),
        ),
        "experiments": (
            genai_perf_rows,
            Layout(
                format="GenAI-Perf",
                arrival="timestamp",
                prompt="usage.prompt_tokens",
                generated="usage.completion_tokens",
                unit="ns",
            ),
        ),
        "input_lens": (
            vllm_rows,
            Layout(
                format="vLLM",
                arrival="start_times",
                prompt="input_lens",
                generated="output_lens",
                unit="s",
                failures=("errors",),
            ),
        ),
    }
)
"""By the key that recognises a document: its rows, and where they come from."""
