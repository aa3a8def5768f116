"""HTTP clients that people use, which are no Python: the JDK's, and curl in its ways to send a body."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tools.testbed.gateway import gateway

pytestmark = pytest.mark.real
BODY = {"model": "llama-3-8b", "prompt": "Hello", "max_tokens": 4, "stream": True}


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    with gateway(("--policy", "triton"), tmp_path_factory.mktemp("gateway")) as up:
        yield f"{up.url}/v1/completions"


def output_of(program, *arguments):
    if (found := shutil.which(program)) is None:
        pytest.skip(f"no {program} is installed")
    done = subprocess.run([found, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


def test_the_client_of_the_jdk(url):
    lines = output_of("java", Path(__file__).with_name("Client.java"), url, json.dumps(BODY)).splitlines()
    assert lines == ["200 data: [DONE]"] * 26


@pytest.mark.parametrize(
    "way",
    [
        ("--http2",),
        ("--http1.0",),
        ("--http2", "-H", "expect: 100-continue"),
        ("--http2", "-H", "transfer-encoding: chunked"),
        ("--compressed",),
    ],
)
def test_curl(url, way):
    output = output_of("curl", "-sS", *way, "-H", "content-type: application/json", "-d", json.dumps(BODY), url)
    assert output.endswith("data: [DONE]\n\n")
