"""The rules of the house that no linter knows: who imports whom, the core's purity, sizes, words, README commands.

Every rule is a function from sources to a list of faults; each is tried on a source that breaks it, so that a rule
that can no longer fail is noticed.
"""

import pytest
from house_rules import (
    ROOT,
    SRC,
    command_faults,
    crowded_folders,
    import_faults,
    kernel_faults,
    purity_faults,
    tracked,
    word_faults,
)

# ---- the rules, over this repository --------------------------------------------------------------------------


def test_imports_point_one_way():
    assert import_faults(SRC) == []


def test_the_core_is_pure():
    assert purity_faults(SRC) == []


def test_kernels_keep_to_their_file():
    assert kernel_faults(SRC) == []


def test_folders_are_small():
    assert crowded_folders(SRC) == []


def test_nothing_of_one_machine_is_written_down():
    assert word_faults(ROOT, tracked(ROOT)) == []


def test_readme_commands_exist():
    assert command_faults(ROOT) == []


# ---- the rules, over sources that break them ------------------------------------------------------------------


def put(root, name, text):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("name", "text", "fine"),
    [
        (
            "core/a.py",
            "from throttllem.core import types\nfrom . import types\nfrom throttllem import __version__",
            True,
        ),
        ("core/a.py", "import throttllem.physics", False),
        ("core/a.py", "from ..gpu import nvml", False),
        ("core/a.py", "from throttllem import files", False),
        ("physics/a.py", "from throttllem import config", True),
        ("physics/a.py", "def f():\n    from throttllem.engines.simulated.batcher import B", False),
        ("engines/a.py", "from ..gpu.simulated import G\nfrom ..physics import p", True),
        ("sim/a.py", "from throttllem.profiling import profile", True),
        ("profiling/a.py", "from throttllem.sim import traces", False),
        ("profiling/a.py", "from throttllem import sim", False),
        ("sim/a.py", "import throttllem.gateway.control.loop", False),
        ("gateway/a.py", "import importlib\nimportlib.import_module('throttllem.sim.traces')", False),
        ("report/a.py", "from throttllem.sim.result import RunResult", True),
        ("report/a.py", "from throttllem.cli.app import main", False),
        ("files.py", "from throttllem.core import types", False),
        ("cli/app.py", "from throttllem.report import html", True),
        ("helpers.py", "", False),
        ("keeper/a.py", "from throttllem.gpu.locks import LockableGpu", True),
        ("keeper/a.py", "from throttllem.gateway import control", False),
        ("gateway/a.py", "from throttllem.gpu.locks import LockableGpu", False),
        ("gpu/a.py", "from throttllem.gpu import locks", False),
        ("core/compiled.py", "def f():\n    from numba import njit", True),
        ("core/a.py", "import numba", False),
        ("sim/a.py", "from numba import njit", False),
    ],
)
def test_import_rule_sees(tmp_path, name, text, fine):
    put(tmp_path, f"throttllem/{name}", text)
    assert len(import_faults(tmp_path)) == (0 if fine else 1)


@pytest.mark.parametrize(
    ("text", "fine"),
    [
        ("import math\nimport numpy as np\nfrom collections import deque\nX = (1, 2)\n__all__ = ['X']", True),
        ("from types import MappingProxyType\nX = MappingProxyType({1: 2})\ndef f():\n    return [1]", True),
        ("import time", False),
        ("from os import path", False),
        ("import polars", False),
        ("def f():\n    from datetime import datetime", False),
        ("from numpy import random", False),
        ("import numpy as np\ndef f():\n    return np.random.default_rng(0)", False),
        ("import numpy as np\nX = np.zeros(3)", False),
        ("X = []", False),
        ("X: dict[str, int] = {}", False),
        ("X = (1, [2])", False),
        ("from collections import deque\nX = deque()", False),
        ("def f():\n    print(1)", False),
        ("def f(path):\n    return open(path)", False),
        ("def f():\n    global X", False),
    ],
)
def test_purity_rule_sees(tmp_path, text, fine):
    put(tmp_path, "throttllem/core/a.py", text)
    assert len(purity_faults(tmp_path)) == (0 if fine else 1)


@pytest.mark.parametrize(
    ("body", "fine"),
    [
        ("return np.int64(LIMIT + own(value))", True),
        ("return other(value)", False),
        ("return value + THEIRS", False),
    ],
)
def test_kernel_rule_sees(tmp_path, body, fine):
    head = "import numpy as np\nfrom throttllem.core.compiled import compiled\nfrom throttllem.core.a import other\n"
    head += "from ..core.a import THEIRS\nLIMIT = 3\n@compiled\ndef own(value):\n    return value\n"
    put(tmp_path, "throttllem/core/b.py", f"{head}@compiled\ndef kernel(value):\n    {body}\n")
    assert len(kernel_faults(tmp_path)) == (0 if fine else 1)


def test_folder_rule_sees(tmp_path):
    for number in range(12):
        put(tmp_path, f"throttllem/core/part{number}.py", "")
    put(tmp_path, "throttllem/core/__init__.py", "")
    assert crowded_folders(tmp_path) == []
    put(tmp_path, "throttllem/core/one_more.py", "")
    assert crowded_folders(tmp_path) == ["throttllem/core: 13 files"]


def test_word_rule_sees(tmp_path):
    bad = ["cd /wor" + "k/main", "x = '/roo" + "t/.cache'", "see https://PYPI" + ".org/p", "/opt/whe" + "els"]
    text = put(tmp_path, "a.md", "\n".join([*bad, "https://x.example/wor" + "k/1, frame/wor" + "k/, the root/ of it"]))
    picture = put(tmp_path, "a.png", "\0" + bad[0])
    assert len(word_faults(tmp_path, [text, picture])) == len(bad)


def test_command_rule_sees(tmp_path):
    put(tmp_path, "Makefile", "PYTHON := x\ndemo: a\n\ttrue\ntest:\n")
    put(tmp_path, "README.md", "```bash\n$ make demo && make test   # make haste\n```\n")
    assert command_faults(tmp_path) == []
    put(tmp_path, "README.md", "```bash\nmake demo\nmake dance\n```\nand `make sing`, make no mistake\n")
    assert [fault.split()[4] for fault in command_faults(tmp_path)[:2]] == ["dance,", "sing,"]
    assert command_faults(tmp_path)[2:] == ["README shows no `make test` in a block"]
