"""Studies: each run is of the right scenario and policy."""

from throttllem.sim.study import run_all


class Scenario:
    """Stands in for a scenario."""

    def run(self, policy, progress):
        progress(0.25)
        return f"ran {policy}"


def test_run_all_simulates_each_scenario_under_its_policy():
    jobs = [(Scenario(), "triton"), (Scenario(), "throttllem")]
    assert run_all(jobs, workers=1) == ["ran triton", "ran throttllem"]
