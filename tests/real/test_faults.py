"""The catalogue of faults on real processes, before a small engine and before a real vLLM (`make engines`)."""

import asyncio

import pytest

from tests.real.vllm import ENVIRONMENT
from tools.evaluation.faults import FAULTS
from tools.evaluation.faults.bed import Bed, RealEngine, SmallEngine


@pytest.fixture(scope="module")
def runner():
    with asyncio.Runner() as runner:
        yield runner


SMALL = pytest.param("small", marks=pytest.mark.slow)


@pytest.fixture(scope="module", params=[SMALL, pytest.param("vllm", marks=pytest.mark.real)])
def bed(request, tmp_path_factory, runner):
    folder = tmp_path_factory.mktemp("faults")
    if request.param == "small":
        kind = SmallEngine(folder=folder)
    else:
        model = request.getfixturevalue("model")
        kind = RealEngine(environment=ENVIRONMENT, model_folder=model, folder=folder, report=print)
    bed = Bed(kind=kind, folder=folder, report=print)
    yield bed
    runner.run(bed.stop())


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.__module__.rpartition('.')[2]}-{fault.__name__}")
def test_fault(fault, bed, runner):
    for found in runner.run(fault(bed)):
        print(f"{found.fault} | {found.client} | {found.left}")
        assert "nothing" in found.left or "empty" in found.left
