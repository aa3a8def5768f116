"""README and docs say what is so: links lead somewhere, commands are accepted, examples run, figures are computed."""

import importlib
import itertools
import json
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

import pytest
import typer
from core.toy import row, spec

from throttllem.cli.app import app
from throttllem.core.forecast.projection import project
from throttllem.core.scoreboard import Scoreboard

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md")))
LIFE = ROOT / "docs/life-of-a-request.md"
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def bash_blocks(text, languages=("bash", "sh")):
    """Blocks of commands: those that run anywhere (bash), and those that need an engine of the reader's (sh)."""
    return [body for language, body in _FENCE.findall(text) if language in languages]


def parted(block):
    """The commands before one that serves, that one (None: there is none), and those to be given while it does."""
    lines = block.replace("\\\n", " ").splitlines()
    for number, line in enumerate(lines):
        if line.startswith("throttllem serve") and "--check" not in shlex.split(line, comments=True):
            return "\n".join(lines[:number]), line, "\n".join(lines[number + 1 :])
    return block, None, ""


def command_lines(block):
    """The `throttllem ...` lines of a block as lists of words, up to `||`; a backslash at its end: it goes on."""
    lines = block.replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("throttllem ")]
    return [list(itertools.takewhile(lambda word: word != "||", line)) for line in words]


def anchor(heading):
    """As GitHub makes it: lower case, punctuation dropped, spaces to hyphens."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def link_faults(page):
    faults = []
    for target in _LINK.findall(_FENCE.sub("", page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, fragment = target.partition("#")
        there = page.parent / name if name else page
        if not there.exists():
            faults.append(f"{page.name}: {target} is not there")
        elif fragment and fragment not in map(anchor, re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE)):
            faults.append(f"{page.name}: {target} is no heading of {there.name}")
    return faults


def command_fault(words):
    """What the real command line says against these words, parsed but not run; None if it takes them."""
    command = typer.main.get_command(app).commands.get(words[0])
    if command is None:
        return f"there is no command {words[0]}"
    try:
        with command.make_context(words[0], words[1:]):
            return None
    except typer.exceptions.TyperException as error:
        return f"{shlex.join(words)}: {error}"


def table_rows(text, header, nth=0):
    """Cells of the nth table whose header begins so, header left out."""
    lines = text.splitlines()
    begin = [number for number, line in enumerate(lines) if line.startswith(f"| {header} |")][nth]
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[begin + 2 :])
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def environment(folder, cache):
    """A shell's, whose throttllem is ours and keeps nothing outside the folder."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    ours = {"THROTTLLEM_CACHE_DIR": str(cache), "THROTTLLEM_STATE_DIR": str(folder / "state")}
    return os.environ | {"PATH": path, "THROTTLLEM_SERVER__PORT": str(free_port())} | ours


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def run_in(folder, block, cache, variables=None):
    """Run a block of a shell; what it printed. Ports that a page names are free ones here."""
    variables = variables or environment(folder, cache)
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


# ---- the rules, over this repository --------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    assert link_faults(page) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_accepted(page):
    examples = [words for block in bash_blocks(page.read_text()) for words in command_lines(block)]
    assert [fault for words in examples if (fault := command_fault(words))] == []


def test_every_command_is_shown():
    readme = (ROOT / "README.md").read_text()
    shown = {words[0] for block in bash_blocks(readme) for words in command_lines(block)}
    shown |= set(re.findall(r"`throttllem (\w+)", readme)) | set(re.findall(r"^make (\w+)", readme, re.MULTILINE))
    assert set(typer.main.get_command(app).commands) - shown == set()


def test_commands_named_in_passing_exist():
    commands = typer.main.get_command(app).commands
    named = {name for page in PAGES for name in re.findall(r"`throttllem ([a-z]+)[ `]", page.read_text())}
    assert named - set(commands) == set()


def test_options_named_in_passing_exist():
    commands = typer.main.get_command(app).commands.values()
    known = {name for command in commands for parameter in command.params for name in parameter.opts}
    named = set(re.findall(r"`(--[a-z0-9-]+)", (ROOT / "README.md").read_text()))
    assert named - known == set()


def test_names_in_the_life_of_a_request_exist():
    named = re.findall(r"`([\w/]+)\.py::([\w.]+)`", LIFE.read_text())
    assert len(named) > 30
    for file, name in named:
        found = importlib.import_module(f"throttllem.{file.replace('/', '.')}")
        for part in name.split("."):
            assert hasattr(found, part), f"{file}.py has no {name}"
            found = getattr(found, part)


def test_projection_by_hand_is_what_the_code_projects():
    text = LIFE.read_text()
    requests = {name: (int(q), int(r), int(s)) for name, q, r, s in table_rows(text, "request")}
    by_hand = [[int(cell) for cell in cells] for cells in table_rows(text, "k")]
    first = by_hand[0][0]
    engine = spec(block_tokens=4, chunked=False)
    board, alone = Scoreboard(engine.block_tokens), []
    for key, (prompt, answer, start) in enumerate(requests.values()):
        mine = Scoreboard(engine.block_tokens)
        for one in (board, mine):
            one.dispatch(row(key, prompt, answer, earliest=start))
            if start <= first:
                one.begin(key, start, 0.0)
        alone.append(project(mine, engine, first=first).kv_blocks.tolist())
    ours = project(board, engine, first=first)
    blocks = [[*own, *[0] * ours.horizon][: ours.horizon] for own in alone]
    columns = [range(first, first + ours.horizon), *blocks, ours.batch, ours.kv_blocks, ours.prefill_tokens]
    assert by_hand == [list(map(int, cells)) for cells in zip(*columns, strict=True)]


@pytest.mark.parametrize("name", ["report", "dashboard"])
def test_picture_is_small(name):
    picture = (ROOT / f"docs/{name}.png").read_bytes()
    assert len(picture) < 300_000
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(picture[16:20], "big") == 1200


@pytest.mark.slow
def test_examples_run(tmp_path):
    blocks = [block for page in PAGES for block in bash_blocks(page.read_text(), ("bash",)) if command_lines(block)]
    assert blocks
    folder = tmp_path / "examples"
    folder.mkdir()
    for block in blocks:
        if parted(block)[1] is None:
            run_in(folder, block, tmp_path / "cache")
    assert (folder / "out/my/report.html").stat().st_size > 100_000


@pytest.mark.slow
def test_served_examples_run(tmp_path):
    readme = (ROOT / "README.md").read_text()
    (served,) = [parts for block in bash_blocks(readme, ("bash",)) if (parts := parted(block))[1] is not None]
    (client,) = bash_blocks(readme, ("python",))
    before, command, then = served
    assert before == ""
    variables = environment(tmp_path, tmp_path / "cache")
    with serving(tmp_path, command, variables):
        stream = run_in(tmp_path, then, None, variables)
        assert stream.rstrip().endswith("data: [DONE]")
        assert '"energy_joules":' in stream
        assert "energy_joules" in run_in(tmp_path, f"python - <<'END'\n{client}END", None, variables)


@pytest.mark.slow
def test_published_figures_are_what_comes_out(tmp_path):
    readme = (ROOT / "README.md").read_text()
    (sized,) = (block for block in bash_blocks(readme) if "--sizes" in block)
    demo = "throttllem simulate --trace azure-conv-like:seconds=1800 --peak-rps max"  # what `throttllem demo` runs
    for nth, command in enumerate((demo, sized.strip())):
        run_in(tmp_path, f"{command} --json {nth}.json", tmp_path / "cache")
        runs = json.loads((tmp_path / f"{nth}.json").read_text())["runs"]
        rows = table_rows(readme, "policy | energy kJ", nth)
        assert len(rows) == len(runs)
        for run, (policy, *cells) in zip(runs, rows, strict=True):
            shown = [float(cell.replace(",", "").split()[0]) for cell in cells]
            ours = [run["energy_j"] / 1e3, run["tokens_per_joule"], 100 * run["slo"]["attainment"], run["e2e_s"]["p99"]]
            assert policy.startswith(f"`{run['policy']}`")
            assert shown == pytest.approx(ours, rel=0.02), policy


# ---- the rules, over pages that break them --------------------------------------------------------------------


def test_link_rule_sees(tmp_path):
    page = tmp_path / "a.md"
    page.write_text("# Where to go?\n[a](b.md) [c](#where-to-go) [d](#nowhere) [e](https://x.example) ![f](a.md)\n")
    assert link_faults(page) == ["a.md: b.md is not there", "a.md: #nowhere is no heading of a.md"]


@pytest.mark.parametrize(
    ("line", "fine"),
    [
        ("throttllem simulate --trace my.csv \\\n    --slo-e2e 15  # seconds", True),
        ("throttllem estimate --clock 1050 --batch 3 --context 9", True),
        ("throttllem simulate --tracy my.csv", False),
        ("throttllem serve --check || test $? = 1", True),
        ("throttllem serve --chek || test $? = 1", False),
        ("throttllem simulate --seed soon", False),
        ("throttllem estimate --clock 1050", False),
        ("throttllem emulate", False),
    ],
)
def test_command_rule_sees(line, fine):
    (words,) = command_lines(line)
    assert (command_fault(words) is None) is fine


def test_what_serves_is_told_from_what_checks():
    assert parted("cd a\nthrottllem serve \\\n  --port 1 # stay\ncurl b") == (
        "cd a",
        "throttllem serve    --port 1 # stay",
        "curl b",
    )
    assert parted("throttllem serve --check") == ("throttllem serve --check", None, "")
