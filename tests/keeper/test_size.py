"""The keeper stays small enough to be read by whoever lets it run as root, and loads nothing else."""

import ast
import io
import json
import subprocess
import sys
import tokenize
from pathlib import Path

KEEPER = Path(__file__).parents[2] / "src/throttllem/keeper"
MOST_LINES = 300
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
OURS = {
    "throttllem",
    "throttllem.files",
    "throttllem.gpu",
    "throttllem.gpu.locks",
    "throttllem.gpu.nvml",
    "throttllem.keeper",
    "throttllem.keeper.__main__",
    "throttllem.keeper.journal",
    "throttllem.keeper.leases",
}


def code_lines(text):
    """Numbers of the lines that hold code: neither blank, nor comment, nor docstring."""
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in NO_CODE:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                lines -= set(range(first.lineno, first.end_lineno + 1))
    return lines


def test_the_keeper_stays_small():
    counted = {path.name: len(code_lines(path.read_text())) for path in KEEPER.glob("*.py")}
    assert sum(counted.values()) <= MOST_LINES, counted


SOURCE = """\
'A module.

More words.'

# Why.
X = 1  # one


def f():
    'Words.'
    return (
        X
    )
"""


def test_lines_of_code_are_counted_as_said():
    assert sorted(code_lines(SOURCE.replace("A module.\n\nMore words.", "A module."))) == [4, 7, 9, 10, 11]
    assert sorted(code_lines(SOURCE.replace("'A", "'''A").replace("words.'", "words.'''"))) == [6, 9, 11, 12, 13]


def test_the_process_is_the_keeper_and_nothing_else():
    code = "import json, sys, throttllem.keeper.__main__; print(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, check=True, text=True)
    loaded = set(json.loads(done.stdout))
    assert {name for name in loaded if name.split(".")[0] == "throttllem"} == OURS
    foreign = {name.split(".")[0] for name in loaded} - set(sys.stdlib_module_names)
    assert {name for name in foreign if not name.startswith("_")} <= {"throttllem", "pynvml", "sitecustomize"}
    assert not loaded & {"http", "http.client", "http.server", "urllib.request", "email", "pickle", "multiprocessing"}
