"""Fixtures of the fake NVML; Hypothesis profiles: a quick one, and `HYPOTHESIS_PROFILE=thorough` for a long look."""

import os

from hypothesis import HealthCheck, settings

pytest_plugins = ["tools.nvml.plugin"]
settings.register_profile(
    "quick", max_examples=40, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("thorough", settings.get_profile("quick"), max_examples=2000, stateful_step_count=100)
# In CI a failure must be the change's and not the dice's: the same examples each time. At a desk they differ.
chosen = settings.get_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))
settings.register_profile("chosen", chosen, derandomize=bool(os.environ.get("CI")))
settings.load_profile("chosen")
