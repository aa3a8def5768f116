"""The rules of the house that no linter knows, as functions from sources to a list of faults."""

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
    "openai_api": set(),
    "physics": {"core"},
    "gpu": {"core", "physics"},
    "keeper": {"gpu"},
    "agent": {"gpu"},
    "doctor": {"gpu", "keeper", "physics"},
    "engines": {"core", "physics", "gpu", "openai_api"},
    "launchers": set(),
    "profiling": {"core", "physics", "gpu", "openai_api", "engines"},
    "calibrate": {"core", "physics", "profiling"},
    "sim": {"core", "physics", "gpu", "openai_api", "engines", "profiling"},
    "gateway": {"core", "physics", "gpu", "agent", "openai_api", "engines", "launchers", "profiling"},
    "report": {"core", "physics", "gpu", "openai_api", "engines", "profiling", "sim", "gateway"},
    "arena": {"core", "physics", "gpu", "engines", "profiling", "sim", "report"},
    "reproduce": {"core", "physics", "gpu", "engines", "profiling", "sim", "report"},
}
"""What each layer may import besides itself. Outside: `cli` and its parts; the foundation serves all but core;
`vllm_stats` runs inside vLLM."""
FOUNDATION = {"config", "did_you_mean", "files", "option_sources", "printable"}
CLI = {"cli", "vllm_stats"}
SETS_CLOCKS = "throttllem.gpu.locks"
MAY_SET_CLOCKS = {"keeper", "doctor"}
"""Whoever else reads GPUs has no way to their locks."""
COMPILES = Path("throttllem/core/compiled.py")


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
        if layer in CLI:
            continue
        allowed = BELOW.get(layer, set()) | {layer}
        if layer != "core":
            allowed |= FOUNDATION
        if layer in {"config", "option_sources"}:
            allowed |= {"core"}
        if layer not in BELOW.keys() | FOUNDATION | {"__init__"}:
            faults.append(f"{path.relative_to(src)}: is in no layer")
        for line, module in imports(path, src):
            target = layer_of(module.split("."))
            # `from throttllem import __version__` names no layer.
            if target is not None and not target.startswith("__") and target not in allowed:
                faults.append(f"{path.relative_to(src)}:{line}: {layer} imports {module}")
            if module.startswith(SETS_CLOCKS) and layer not in MAY_SET_CLOCKS:
                faults.append(f"{path.relative_to(src)}:{line}: {layer} could set clocks")
            if module.split(".")[0] == "numba" and path != src / COMPILES:
                faults.append(f"{path.relative_to(src)}:{line}: numba is for {COMPILES} alone")
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
            known = ours or parts[0] in {"numpy", "numba"} or parts[0] in sys.stdlib_module_names
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


def kernel_faults(src):
    """What kernels use of other files of ours: machine code on disk is not renewed when those change."""
    faults = []
    for path in sorted((src / "throttllem").rglob("*.py")):
        tree = ast.parse(path.read_text(), str(path))
        ours = {
            alias.asname or alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and (node.level or str(node.module).split(".")[0] == "throttllem")
            for alias in node.names
        }
        for function in ast.walk(tree):
            decorated = isinstance(function, ast.FunctionDef) and any(
                getattr(decorator, "id", "") == "compiled" for decorator in function.decorator_list
            )
            if decorated:
                used = {node.id for part in function.body for node in ast.walk(part) if isinstance(node, ast.Name)}
                faults += [
                    f"{path.relative_to(src)}:{function.lineno}: kernel {function.name} uses {name} of another file"
                    for name in sorted(used & ours)
                ]
    return faults


def crowded_folders(src, most_files=12):
    """Folders with more files than a reader takes in at once; each asks for sub-packages."""
    folders = (path for path in sorted((src / "throttllem").rglob("*")) if path.is_dir())
    counts = {folder: sum(1 for file in folder.glob("*.py") if file.name != "__init__.py") for folder in folders}
    return [f"{folder.relative_to(src)}: {count} files" for folder, count in counts.items() if count > most_files]


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
