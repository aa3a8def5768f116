"""Odd requests get the same status and body from a real vLLM directly and through the gateway, or there is a reason."""

import pytest

from tests.real.vllm import ENVIRONMENT
from tools.evaluation.differential import compare_all, unexplained
from tools.testbed.engines.vllm import UNCACHED, vllm
from tools.testbed.gateway import gateway

pytestmark = pytest.mark.real


def test_odd_requests_are_answered_as_by_vllm(model, tmp_path):
    with (
        vllm(ENVIRONMENT, tmp_path, model=model, flags=UNCACHED, report=print) as engine,
        gateway(("--engine", engine.url), tmp_path / "gateway") as up,
    ):
        found = compare_all(engine.url, up.url, print)
    assert len(found) >= 300
    assert unexplained(found) == []
