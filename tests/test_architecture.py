"""The rules of the house that no linter knows: who imports whom, the core's purity, sizes, words, README commands.

Every rule is a function from sources to a list of faults; each is tried on a source that breaks it, so that a rule
that can no longer fail is noticed.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src"

BELOW = {
    "core": set(),
    "physics": {"core"},
    "gpu": {"core", "physics"},
    "engine": {"core", "physics", "gpu"},
    "learn": {"core", "physics", "gpu", "engine"},
    "calibrate": {"core", "physics", "learn"},
    "sim": {"core", "physics", "gpu", "engine", "learn"},
    "gateway": {"core", "physics", "gpu", "engine", "learn"},
    "report": {"core", "physics", "gpu", "engine", "learn", "sim", "gateway"},
}
"""What each layer may import besides itself. Outside: `cli` and its parts; `config` and `files` serve all but core;
`vllm_stats` runs inside vLLM."""
FOUNDATION = {"config", "files", "tree"}


def words(text):
    return set(text.split())


IMPURE_MODULES = words(
    "time os sys random secrets threading _thread multiprocessing concurrent asyncio socket ssl select selectors "
    "signal subprocess logging pathlib io datetime shutil tempfile glob http urllib uuid platform sched queue "
    "contextvars ctypes mmap importlib sqlite3 atexit gc pickle shelve fcntl resource pty getpass locale warnings"
)
IMPURE_CALLS = words("open print input exec eval __import__ breakpoint")
IMPURE_NUMPY = words("random load save savez savetxt loadtxt genfromtxt fromfile memmap")
MUTABLE_CALLS = words(
    "list dict set bytearray defaultdict deque Counter OrderedDict ChainMap array zeros ones empty full arange"
)
MUTABLE_LITERALS = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)


def imports(path, src):
    """(line, dotted module) of every import, relative ones resolved, `from a import b` as `a.b`."""
    package = path.relative_to(src).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            stem = ".".join(base + ([node.module] if node.module else []))
            yield from ((node.lineno, f"{stem}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in {"import_module", "__import__"}:
                yield node.lineno, str(node.args[0].value)


def layer_of(parts):
    """The layer or top-level module of `throttllem.x.y`; None for the package itself or what is not ours."""
    return parts[1] if len(parts) > 1 and parts[0] == "throttllem" else None


def import_faults(src):
    faults = []
    for path in sorted((src / "throttllem").rglob("*.py")):
        layer = layer_of(path.relative_to(src).with_suffix("").parts)
        if layer in {"arguments", "cli", "cli_calibrate", "cli_engines", "cli_replay", "cli_serve", "vllm_stats"}:
            continue
        allowed = BELOW.get(layer, set()) | {layer}
        if layer != "core":
            allowed |= FOUNDATION
        if layer == "config":
            allowed |= {"core"}
        if layer not in BELOW.keys() | FOUNDATION | {"__init__"}:
            faults.append(f"{path.relative_to(src)}: is in no layer")
        for line, module in imports(path, src):
            target = layer_of(module.split("."))
            # `from throttllem import __version__` names no layer.
            if target is not None and not target.startswith("__") and target not in allowed:
                faults.append(f"{path.relative_to(src)}:{line}: {layer} imports {module}")
    return faults


def is_mutable(value):
    if isinstance(value, ast.Tuple):
        return any(is_mutable(element) for element in value.elts)
    if isinstance(value, ast.Call):
        name = value.func.attr if isinstance(value.func, ast.Attribute) else getattr(value.func, "id", "")
        return name in MUTABLE_CALLS
    return isinstance(value, MUTABLE_LITERALS)


def impurity(node):
    """What is impure about one node, wherever it stands; None for nothing."""
    match node:
        case ast.Global():
            return "global"
        case ast.Call(func=ast.Name(id=name)) if name in IMPURE_CALLS:
            return f"{name}()"
        case ast.Attribute(value=ast.Name(id="np" | "numpy"), attr=name) if name in IMPURE_NUMPY:
            return f"numpy.{name}"
    return None


def purity_faults(src):
    faults = []
    for path in sorted((src / "throttllem/core").rglob("*.py")):
        where, tree = path.relative_to(src), ast.parse(path.read_text(), str(path))
        for line, module in imports(path, src):
            parts = module.split(".")
            ours = parts[:2] == ["throttllem", "core"]
            known = ours or parts[0] == "numpy" or parts[0] in sys.stdlib_module_names
            if not known or parts[0] in IMPURE_MODULES or (parts[0] == "numpy" and IMPURE_NUMPY & set(parts)):
                faults.append(f"{where}:{line}: imports {module}")
        faults += [f"{where}:{node.lineno}: {what}" for node in ast.walk(tree) if (what := impurity(node))]
        for node in tree.body:
            names = [
                ast.unparse(target) for target in getattr(node, "targets", [getattr(node, "target", None)]) if target
            ]
            if isinstance(node, ast.Assign | ast.AnnAssign) and "__all__" not in names and is_mutable(node.value):
                faults.append(f"{where}:{node.lineno}: {', '.join(names)} is mutable")
    return faults


def size_faults(root, file_lines=300, function_lines=60):
    faults = []
    for path in sorted(path for top in ("src", "tests", "bench", "tools") for path in (root / top).rglob("*.py")):
        text = path.read_text()
        if (count := len(text.splitlines())) > file_lines:
            faults.append(f"{path.relative_to(root)}: {count} lines")
        for node in ast.walk(ast.parse(text, str(path))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > function_lines:
                    faults.append(f"{path.relative_to(root)}:{node.lineno}: {node.name} has {length} lines")
    return faults


# Put together here so that this file passes its own rule.
FORBIDDEN = re.compile(
    r"(?<![\w.])/(?:" + "|".join(("wor" + "k/", "roo" + "t/", "opt/whe" + "els")) + ")|"
    r"\b(?:" + "|".join(("pypi" + r"\.org", "pythonhosted" + r"\.org", "anaconda" + r"\.org")) + r")\b",
    re.IGNORECASE,
)


def tracked(root):
    """The files that git tracks, and those that it would."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, capture_output=True, check=False, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout: nothing says which files belong to it")
    return [root / name for name in listed.stdout.split("\0") if name and (root / name).is_file()]


def word_faults(root, paths):
    faults = []
    for path in paths:
        content = path.read_bytes()
        # A picture or another file that is not text.
        if b"\0" in content:
            continue
        for number, line in enumerate(content.decode(errors="replace").splitlines(), start=1):
            if found := FORBIDDEN.search(line):
                faults.append(f"{path.relative_to(root)}:{number}: {found[0]}")
    return faults


def command_faults(root):
    """`make` targets that the README shows and the Makefile lacks, and the two that it must show."""
    readme, makefile = ((root / name).read_text() for name in ("README.md", "Makefile"))
    targets = set(re.findall(r"^([a-z][\w-]*):(?!=)", makefile, re.MULTILINE))
    blocks = re.findall(r"^```(?:bash|sh|console|shell)?\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    shown = set(re.findall(r"\bmake ([a-z][\w-]*)", re.sub(r"#.*", "", "".join(blocks))))
    named = set(re.findall(r"`make ([a-z][\w-]*)`", readme))
    faults = [f"Makefile has no target {name}, which the README shows" for name in sorted((shown | named) - targets)]
    return faults + [f"README shows no `make {name}` in a block" for name in ("demo", "test") if name not in shown]


# ---- the rules, over this repository --------------------------------------------------------------------------


def test_imports_point_one_way():
    assert import_faults(SRC) == []


def test_the_core_is_pure():
    assert purity_faults(SRC) == []


def test_files_and_functions_are_small():
    assert size_faults(ROOT) == []


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
        ("physics/a.py", "def f():\n    from throttllem.engine.batcher import B", False),
        ("engine/a.py", "from ..gpu.simulated import G\nfrom ..physics import p", True),
        ("sim/a.py", "from throttllem.learn import profile", True),
        ("learn/a.py", "from throttllem.sim import traces", False),
        ("learn/a.py", "from throttllem import sim", False),
        ("sim/a.py", "import throttllem.gateway.driver", False),
        ("gateway/a.py", "import importlib\nimportlib.import_module('throttllem.sim.traces')", False),
        ("report/a.py", "from throttllem.sim.result import RunResult", True),
        ("report/a.py", "from throttllem.cli import main", False),
        ("files.py", "from throttllem.core import types", False),
        ("cli.py", "from throttllem.report import html", True),
        ("helpers.py", "", False),
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


def test_size_rule_sees(tmp_path):
    put(tmp_path, "src/fine.py", "def f():\n" + "    pass\n" * 59 + "\n" * 240)
    assert size_faults(tmp_path) == []
    put(tmp_path, "src/long.py", "\n" * 301)
    put(tmp_path, "tests/wide.py", "class C:\n    async def f(self):\n" + "        pass\n" * 60)
    assert size_faults(tmp_path) == ["src/long.py: 301 lines", "tests/wide.py:2: f has 61 lines"]


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
