"""A gateway with a simulated engine answers as its own /openapi.json says, whatever that lets a client send."""

import asyncio
import tempfile
import threading
from functools import cache
from pathlib import Path

import requests
import schemathesis
from hypothesis import strategies as st
from schemathesis import checks

from tests.fuzz.properties import fuzzed
from throttllem.config import Options, ServerOptions
from throttllem.gateway.http.openapi import document
from throttllem.gateway.run import run_gateway
from throttllem.openai_api.requests import is_controlled

MODEL = "llama-3-8b"
MOST_TOKENS = 2
"""Of an answer: the engine takes its real time."""
LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
CHECKS = [
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
]


@cache
def gateway():
    """The address of one that runs as long as this process, and its session of HTTP."""
    messages, up = [], threading.Event()

    def say(message):
        messages.append(message)
        if len(messages) == 3:
            up.set()

    async def serve():
        with tempfile.TemporaryDirectory() as folder:
            server = ServerOptions(port=0, metrics_port=0)
            options = Options(policy="triton", state_dir=Path(folder) / "state", server=server)
            await run_gateway(options, Path(folder) / "cache").serving(say, asyncio.Event())

    threading.Thread(target=lambda: asyncio.run(serve()), daemon=True).start()
    assert up.wait(20), messages
    private = messages[2].split()[1].removesuffix("/dashboard")
    return messages[1].split()[1].removesuffix("/v1"), private, requests.Session()


def cases(*, generation):
    """Requests that the document allows, to paths of generation or to all others."""
    found = [each.ok() for each in schemathesis.openapi.from_dict(document("1")).get_all_operations()]
    return st.one_of([each.as_strategy() for each in found if is_controlled(each.path) is generation])


def shortened(body):
    """A body that asks for no long answer, of the model that there is."""
    if not isinstance(body, dict):
        return body
    named = [name for name in LIMITS if body.get(name) is not None] or ["max_tokens"]
    limits = {name: at_most(body.get(name, MOST_TOKENS)) for name in named}
    counts = {name: 1 for name in ("n", "best_of") if name in body}
    return body | limits | counts | {"model": MODEL}


def at_most(limit):
    """The limit itself, unless it is a number of too many tokens: 4096, 4096.0 and "4096" are the same."""
    try:
        return MOST_TOKENS if float(limit) > MOST_TOKENS else limit
    except (TypeError, ValueError, OverflowError):
        return limit


def checked(case):
    public, private, session = gateway()
    case.body = shortened(case.body)
    url = private if case.path in ("/metrics", "/dashboard", "/dashboard/state") else public
    case.call_and_validate(url, session, checks=CHECKS, timeout=10)


@fuzzed(4, case=cases(generation=True))
def test_requests_of_generation_are_answered_as_documented(case):
    checked(case)


@fuzzed(case=cases(generation=False))
def test_other_requests_are_answered_as_documented(case):
    checked(case)
