"""The fake NVML and a keeper on the test's loop."""

from tests.gpu.conftest import machine, testbed  # noqa: F401 (fixtures)
