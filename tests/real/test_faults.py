"""The fault list on real processes: `throttllem serve` before a real vLLM. `make engines` installs it."""

import asyncio

import pytest

from tests.real.vllm import ENVIRONMENT
from tools.evaluation.fault_bench import Bench
from tools.evaluation.faults import FAULTS

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def runner():
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def bench(model, tmp_path_factory, runner):
    bench = Bench(environment=ENVIRONMENT, model=model, folder=tmp_path_factory.mktemp("faults"), say=print)
    yield bench
    runner.run(bench.stop())


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.__module__.rpartition('_')[2]}-{fault.__name__}")
def test_fault(fault, bench, runner):
    for found in runner.run(fault(bench)):
        print(f"{found.fault} | {found.client} | {found.left}")
        assert "nothing" in found.left or "empty" in found.left
