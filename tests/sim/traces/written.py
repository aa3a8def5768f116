"""The same requests, written in every format of trace files: arrival in s, prompt tokens, output tokens."""

import gzip
import io
import json
from datetime import UTC, datetime, timedelta

import polars as pl

START = datetime(2024, 5, 10, tzinfo=UTC)
START_NS = int(START.timestamp()) * 10**9


def _csv(header, rows, separator=",", end="\n"):
    return (end.join(separator.join(map(str, row)) for row in (header, *rows)) + end).encode()


def _lines(objects):
    return "".join(json.dumps(each) + "\n" for each in objects).encode()


def _ns(at_s):
    return START_NS + round(at_s * 10**9)


def _stamp(at_s):
    return str(START + timedelta(microseconds=round(at_s * 1e6)))


def azure(rows):
    return _csv(["TIMESTAMP", "ContextTokens", "GeneratedTokens"], [(_stamp(at_s), *tokens) for at_s, *tokens in rows])


def azure_parquet(rows):
    times = pl.Series([_ns(at_s) for at_s, _, _ in rows]).cast(pl.Datetime("ns", "UTC"))
    prompt, output = ([row[place] for row in rows] for place in (1, 2))
    out = io.BytesIO()
    pl.DataFrame(
        {"line": prompt, "TIMESTAMP": times, "ContextTokens": prompt, "GeneratedTokens": output}
    ).write_parquet(out)
    return out.getvalue()


def burstgpt(rows):
    header = ["Timestamp", "Session ID", "Elapsed time", "Model", "Request tokens", "Response tokens", "Total tokens"]
    body = [(at_s, "a", 43, "GPT-4", f"{p}.0", f"{g}.0", p + g, "API log") for at_s, p, g in rows]
    return _csv([*header, "Log Type"], body)


def mooncake(rows):
    return _lines(
        {"timestamp": at_s * 1000, "input_length": p, "output_length": g, "hash_ids": [1]} for at_s, p, g in rows
    )


def servegen(rows):
    return _csv(["request_id", "timestamp", "input_tokens", "output_tokens"], [(n, *r) for n, r in enumerate(rows)])


def servegen_json(rows):
    found = [
        {"request_id": n, "timestamp": at_s, "data": {"input_tokens": p, "output_tokens": g}}
        for n, (at_s, p, g) in enumerate(rows)
    ]
    return json.dumps(found, indent=1).encode()


def vllm(rows):
    starts, prompts, outputs = (list(column) for column in zip(*rows, strict=True))
    run = {"backend": "vllm", "completed": len(rows), "input_lens": prompts, "output_lens": outputs}
    run |= {"ttfts": [0.1] * len(rows), "itls": [[0.01]] * len(rows), "errors": [""] * len(rows)}
    return json.dumps(run | {"start_times": [70_000.5 + start for start in starts]}).encode()


def aiperf(rows):
    return _lines(
        {
            "metadata": {"request_start_ns": _ns(at_s), "benchmark_phase": "profiling", "was_cancelled": False},
            "metrics": {
                "input_sequence_length": {"value": p, "unit": "tokens"},
                "output_sequence_length": {"value": g, "unit": "tokens"},
            },
            "error": None,
        }
        for at_s, p, g in rows
    )


def genai_perf(rows):
    def request(at_s, prompt, output):
        usage = {"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": output}}
        events = [{"response": 'data: {"choices": [{}]}\n\n'}, {"response": f"data: {json.dumps(usage)}\n\n"}]
        return {"timestamp": _ns(at_s), "response_outputs": [*events, {"response": "data: [DONE]\n\n"}]}

    return json.dumps({"experiments": [{"requests": [request(*row) for row in rows]}], "version": ""}).encode()


def opentelemetry(rows):
    def span(at_s, prompt, output):
        said = {
            "gen_ai.operation.name": {"stringValue": "chat"},
            "gen_ai.usage.input_tokens": {"intValue": str(prompt)},
        }
        said |= {"gen_ai.usage.output_tokens": {"intValue": str(output)}}
        attributes = [{"key": key, "value": value} for key, value in said.items()]
        return {"name": "chat m", "startTimeUnixNano": str(_ns(at_s)), "attributes": attributes, "status": {}}

    agent = {"gen_ai.operation.name": {"stringValue": "invoke_agent"}, "gen_ai.usage.input_tokens": {"intValue": "9"}}
    others = [
        {"name": "GET", "startTimeUnixNano": "1", "attributes": []},
        {"name": "a", "startTimeUnixNano": "2", "attributes": [{"key": k, "value": v} for k, v in agent.items()]},
    ]
    return _lines({"resourceSpans": [{"scopeSpans": [{"spans": [*others, span(*row)]}]}]} for row in rows)


def own_csv(rows):
    quoted = [(f'"{at_s * 1e3}"', f'"{p:.1f}"', g, '"a; ""b"""', 200) for at_s, p, g in rows]
    return "\ufeff".encode() + _csv(["at", " in ", "out", "text", "code"], quoted, separator=";", end="\r\n")


def own_jsonl(rows):
    return _lines({"t": {"at us": at_s * 1e6}, "n.in": p, "out": g, "ok": True} for at_s, p, g in rows)


PLAIN = None
OWN = "arrival=at,prompt=in,generated=out,unit=ms,status=code"
WRITERS = {
    azure: PLAIN,
    azure_parquet: PLAIN,
    burstgpt: PLAIN,
    mooncake: PLAIN,
    servegen: PLAIN,
    servegen_json: PLAIN,
    vllm: PLAIN,
    aiperf: PLAIN,
    genai_perf: PLAIN,
    opentelemetry: PLAIN,
    own_csv: OWN,
    own_jsonl: "arrival=t.at us,prompt=n.in,generated=out,unit=us",
}
"""Each format's writer, and the `--columns` that it needs."""


def compressed(content, how):
    """Parquet is not: it is compressed by itself."""
    return gzip.compress(content) if how == "gz" and not content.startswith(b"PAR1") else content
