"""Studies: each run is of the right scenario and policy."""

import pytest

from throttllem.config import FaultOptions, Options
from throttllem.physics.catalogue import Catalogue
from throttllem.sim.study import Study, run_all


class Scenario:
    """Stands in for a scenario."""

    def run(self, policy, progress):
        progress(0.25)
        return f"ran {policy}"


def test_run_all_simulates_each_scenario_under_its_policy():
    jobs = [(Scenario(), "triton"), (Scenario(), "throttllem")]
    assert run_all(jobs, workers=1) == ["ran triton", "ran throttllem"]


@pytest.mark.parametrize(
    ("gpus", "policy", "per_host", "engines", "wrong"),
    [
        (1, "triton", 8, None, "--gpus 1: an engine of TP 2 does not fit"),
        (8, "least-energy+gather", 8, None, "--policy least-energy+gather --gpus 8: a pool runs under"),
        (None, "triton", 8, {1: 1}, "--engines: is for a pool"),
        (8, "triton", 8, {4: 1}, "--engines: TP 4 is none of --sizes 1,2"),
        (8, "triton", 8, {1: 3, 2: 3}, "--engines: need 9 GPUs"),
        (8, "triton", 1, None, "faults.gpus_per_host = 1: an engine of TP 2 is on one host"),
    ],
)
def test_what_a_pool_cannot_do_is_refused_before_anything_slow(tmp_path, gpus, policy, per_host, engines, wrong):
    study = Study(
        gpu="a100-40gb-sxm",
        model="llama-2-13b",
        sizes=(1, 2),
        trace="azure-conv-like",
        policies=(policy,),
        gpus=gpus,
        engines=engines,
        options=Options(faults=FaultOptions(gpus_per_host=per_host)),
    )
    with pytest.raises(ValueError, match=wrong.replace("+", r"\+")):
        study.prepare(Catalogue.load(None), tmp_path)
