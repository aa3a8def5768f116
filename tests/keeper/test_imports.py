"""What runs as root is the keeper's modules and what they need of NVML; nothing else is loaded."""

import json
import subprocess
import sys
from pathlib import Path

KEEPER = Path(__file__).parents[2] / "src/throttllem/keeper"
OURS = {
    "throttllem",
    "throttllem.files",
    "throttllem.gpu",
    "throttllem.gpu.clock_range",
    "throttllem.gpu.locks",
    "throttllem.gpu.nvml",
    "throttllem.keeper",
    "throttllem.keeper.__main__",
    "throttllem.keeper.folder",
    "throttllem.keeper.journal",
    "throttllem.keeper.leases",
    "throttllem.keeper.log",
    "throttllem.keeper.options",
    "throttllem.keeper.server",
    "throttllem.keeper.systemd",
}
SOURCES = [KEEPER / f"{name.rpartition('.')[2]}.py" for name in sorted(OURS) if name.startswith("throttllem.keeper.")]
"""What root runs of the keeper's package: not `unit`, which `throttllem keeper` uses before it becomes the keeper."""
LIBRARIES = {"throttllem", "pynvml", "sitecustomize"}
NOT_NEEDED = {"http", "http.client", "http.server", "urllib.request", "email", "pickle", "multiprocessing"}


def modules_of_the_process():
    """Names of the modules that a keeper loads, started as the unit starts it."""
    code = "import json, sys, throttllem.keeper.__main__; print(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, check=True, text=True)
    return set(json.loads(done.stdout))


def test_the_process_loads_the_keeper_and_nothing_else():
    loaded = modules_of_the_process()
    assert {name for name in loaded if name.split(".")[0] == "throttllem"} == OURS
    libraries = {name.split(".")[0] for name in loaded} - set(sys.stdlib_module_names)
    assert {name for name in libraries if not name.startswith("_")} <= LIBRARIES
    assert not loaded & NOT_NEEDED
