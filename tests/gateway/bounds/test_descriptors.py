import subprocess
import sys

import pytest

from throttllem.gateway.bounds.descriptors import fitted


def test_the_soft_limit_becomes_the_hard_one():
    program = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 500));"
        "from throttllem.gateway.bounds.descriptors import raise_limit;"
        "print(raise_limit(), *resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout == "500 500 500\n"


@pytest.mark.parametrize(("limit", "room"), [(20_000, 4096), (1024, 464), (10, 1)])
def test_connections_fit_the_limit(limit, room, caplog):
    assert fitted(4096, limit) == room
    assert ("limits.connections = 4096" in caplog.text) == (room < 4096)
