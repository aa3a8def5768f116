import pytest

from engines.triton_peer import SPEC
from throttllem.engines.base import RemoteOptions
from throttllem.engines.openai import OpenaiEngine
from throttllem.engines.remote import KINDS, remote_engine
from throttllem.engines.triton.engine import TritonEngine


@pytest.mark.parametrize("kind", KINDS)
def test_the_kind_decides_the_engine(kind):
    engine = remote_engine(RemoteOptions(url="http://127.0.0.1:1", kind=kind), SPEC)
    assert type(engine) is {"openai": OpenaiEngine, "triton": TritonEngine}[kind]


def test_no_key_is_shown():
    assert "sk-7" not in repr(RemoteOptions(url="http://127.0.0.1:1", kind="openai", api_key="sk-7"))
