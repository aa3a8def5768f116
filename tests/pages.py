"""README and docs as tests read them: their code blocks, commands, links and tables; and a shell to run blocks in."""

import itertools
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
DOCS = ROOT / "docs"
GUIDES = (DOCS / "getting-started.md", *sorted((DOCS / "guides").glob("*.md")))
PAGES = (
    README,
    ROOT / "CHANGELOG.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "examples/README.md",
    *sorted(DOCS.rglob("*.md")),
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def name_of(page):
    return str(page.relative_to(ROOT))


def blocks_of(page, *languages):
    """`bash`: commands that run anywhere, and do in a test. `sh`: commands that need an engine or rights."""
    return [body for language, body in FENCE.findall(page.read_text()) if language in languages]


def parted(block):
    """The commands before one that serves, that one (None: there is none), and those to run while it does."""
    lines = block.replace("\\\n", " ").splitlines()
    for number, line in enumerate(lines):
        if line.startswith("throttllem serve") and "--check" not in shlex.split(line, comments=True):
            return "\n".join(lines[:number]), line, "\n".join(lines[number + 1 :])
    return block, None, ""


def command_lines(block):
    """The `throttllem ...` lines of a block as lists of words, up to `||`; a backslash at its end continues a line."""
    lines = block.replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("throttllem ")]
    return [list(itertools.takewhile(lambda word: word != "||", line)) for line in words]


def table_rows(text, header, nth=0):
    """Cells of the nth table whose header begins so, header left out."""
    lines = text.splitlines()
    begin = [number for number, line in enumerate(lines) if line.startswith(f"| {header} |")][nth]
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[begin + 2 :])
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def environment(folder, cache):
    """A shell's, whose throttllem is this one and writes nothing outside the folder."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    ours = {"THROTTLLEM_CACHE_DIR": str(cache), "THROTTLLEM_STATE_DIR": str(folder / "state")}
    return os.environ | {"PATH": path, "THROTTLLEM_SERVER__PORT": str(free_port())} | ours


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def run_in(folder, block, variables):
    """Run a block of a shell and return what it printed. Ports that a page names are replaced by free ones."""
    block = block.replace(":8000", f":{variables['THROTTLLEM_SERVER__PORT']}").replace(" 9090", f" {free_port()}")
    bash = ["bash", "-euo", "pipefail", "-c", block]
    done = subprocess.run(bash, cwd=folder, env=variables, capture_output=True, check=False, text=True, timeout=900)
    assert done.returncode == 0, f"{block}\n{done.stderr}"
    return done.stdout


@contextmanager
def serving(folder, command, variables):
    """The gateway of this command while in the block, ended by SIGTERM."""
    health = f"http://127.0.0.1:{variables['THROTTLLEM_SERVER__PORT']}/health"
    with (folder / "serve.log").open("wb") as log:
        process = subprocess.Popen(
            ["bash", "-c", f"exec {command}"], cwd=folder, env=variables, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        for _ in range(1200):
            try:
                with urllib.request.urlopen(health, timeout=5):
                    break
            except (urllib.error.URLError, OSError):
                assert process.poll() is None, (folder / "serve.log").read_text()
                time.sleep(0.1)
        yield
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, (folder / "serve.log").read_text()
    finally:
        process.kill()
        process.wait()
