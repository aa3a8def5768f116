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

Row = tuple[str | None, str | None, str | None, bool]
"""Arrival, prompt tokens, generated tokens, and whether the request failed."""


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
    errors = document.get("errors") or [""] * len(lists[0])
    lengths = {len(values) for values in (*lists, errors)}
    if len(lengths) > 1:
        raise TraceError(f"lists of a benchmark result differ in length: {sorted(lengths)}; save it again")
    for arrival, prompt, generated, error in zip(lists[0], lists[1], lists[2], errors, strict=True):
        yield _text(arrival), _text(prompt), _text(generated), bool(error)


def genai_perf_rows(document: Mapping[str, Any]) -> Iterator[Row]:
    """GenAI-Perf's `profile_export.json`: `timestamp` in ns; tokens from the `usage` that the server sent."""
    experiments = document["experiments"]
    if not isinstance(experiments, list) or len(experiments) != 1:
        raise TraceError("experiments: must be a list of one; export each load on its own")
    requests = [request for request in experiments[0].get("requests", ()) if isinstance(request, dict)]
    usages = [_usage(request.get("response_outputs") or ()) for request in requests]
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
            usage is None,
        )


def _usage(outputs: Any) -> dict[str, Any] | None:
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


_GENERATION = (None, "chat", "text_completion", "generate_content")
"""Operations that generate; a span of an agent repeats the tokens of the calls inside it."""
_INPUT = ("gen_ai.usage.input_tokens", "gen_ai.usage.prompt_tokens")
_OUTPUT = ("gen_ai.usage.output_tokens", "gen_ai.usage.completion_tokens")
"""By today's convention, and by that before 1.27."""
_ERROR = 2


def span_rows(document: Mapping[str, Any]) -> Iterator[Row]:
    """OTLP in JSON (`resourceSpans`): spans that generate, by `gen_ai.*`; `startTimeUnixNano`. Others are left out."""
    for resource in document["resourceSpans"]:
        for scope in resource.get("scopeSpans") or resource.get("instrumentationLibrarySpans") or ():
            for span in scope.get("spans", ()):
                said = {each["key"]: _value(each.get("value")) for each in span.get("attributes", ())}
                if not any(key.startswith("gen_ai.") for key in said):
                    continue
                if said.get("gen_ai.operation.name") not in _GENERATION:
                    continue
                status = span.get("status", {}).get("code")
                failed = status in {_ERROR, "STATUS_CODE_ERROR"} or "error.type" in said
                prompt, generated = (next((said[k] for k in keys if k in said), None) for keys in (_INPUT, _OUTPUT))
                yield _text(span.get("startTimeUnixNano")), _text(prompt), _text(generated), failed


def _value(value: Any) -> Any:
    """Of an attribute: `{"intValue": "7"}` is 7."""
    return next(iter(value.values()), None) if isinstance(value, dict) else value


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
