"""The tiny model that real engines serve, made once."""

import pytest

from tests.real.vllm import ENVIRONMENT
from tools.testbed.engines.vllm import tiny_model


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    if not ENVIRONMENT.exists():
        pytest.skip("no vLLM in .engines: `make engines` installs it")
    return tiny_model(ENVIRONMENT, tmp_path_factory.mktemp("model") / "tiny")
