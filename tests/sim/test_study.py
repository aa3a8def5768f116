"""Studies: each run is of the right scenario and policy."""

import pytest

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
    ("gpus", "policy", "wrong"),
    [
        (1, "triton", "--gpus 1: an engine of TP 2 does not fit"),
        (8, "least-energy+gather", "--policy least-energy+gather --gpus 8: a pool runs under"),
    ],
)
def test_what_a_pool_cannot_do_is_refused_before_anything_slow(tmp_path, gpus, policy, wrong):
    study = Study(
        gpu="a100-40gb-sxm", model="llama-2-13b", sizes=(1, 2), trace="azure-conv-like", policies=(policy,), gpus=gpus
    )
    with pytest.raises(ValueError, match=wrong.replace("+", r"\+")):
        study.prepare(Catalogue.load(None), tmp_path)
