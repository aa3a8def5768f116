"""What README and docs show runs: commands are accepted, blocks run, published figures are what comes out."""

import json
import re
import shlex

import pytest
import typer
from pages import (
    DOCS,
    GUIDES,
    PAGES,
    README,
    blocks_of,
    command_lines,
    environment,
    name_of,
    parted,
    run_in,
    serving,
    table_rows,
)

from throttllem.cli.app import app
from tools.numbers import claims

SAVINGS = DOCS / "evaluation/savings.md"
MOST_WORDS = 800


def command_fault(words):
    """What the real command line answers to these words, parsed but not run; None if it accepts them."""
    command = typer.main.get_command(app).commands.get(words[0])
    if command is None:
        return f"there is no command {words[0]}"
    try:
        with command.make_context(words[0], words[1:]):
            return None
    except typer.exceptions.TyperException as error:
        return f"{shlex.join(words)}: {error}"


# ---- the rules, over this repository --------------------------------------------------------------------------


def test_readme_is_short():
    assert len(README.read_text().split()) <= MOST_WORDS


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_are_accepted(page):
    examples = [words for block in blocks_of(page, "bash", "sh") for words in command_lines(block)]
    assert [fault for words in examples if (fault := command_fault(words))] == []


def test_every_command_is_shown():
    pages = [page for page in PAGES if "reference" not in page.parts]
    shown = {words[0] for page in pages for block in blocks_of(page, "bash", "sh") for words in command_lines(block)}
    shown |= {name for page in pages for name in re.findall(r"`throttllem (\w+)", page.read_text())}
    assert set(typer.main.get_command(app).commands) - shown == set()


def test_commands_named_in_passing_exist():
    commands = typer.main.get_command(app).commands
    named = {name for page in PAGES for name in re.findall(r"`throttllem ([a-z]+)[ `]", page.read_text())}
    assert named - set(commands) == set()


def test_options_named_in_passing_exist():
    commands = typer.main.get_command(app).commands.values()
    known = {name for command in commands for parameter in command.params for name in parameter.opts}
    of_vllm = {"--enable-prompt-tokens-details", "--scheduling-policy"}
    named = {name for page in (README, *GUIDES) for name in re.findall(r"`(--[a-z0-9-]+)", page.read_text())}
    assert named - known == of_vllm


def between(file, begin, end):
    """What stands between two marks."""
    return file.read_text().partition(begin)[2].partition(end)[0].strip()


def test_readme_quotes_the_saving_that_its_page_shows():
    rows = table_rows(SAVINGS.read_text(), "policy | energy kJ")
    (ours,) = [energy for policy, energy, *_ in rows if policy.startswith("`least-energy`")]
    (quoted,) = re.findall(r"`least-energy` ends ([\d.]+) % below the energy", README.read_text())
    assert f"(−{quoted} %" in ours


def test_the_score_and_the_claims_are_those_of_the_last_run():
    found = json.loads((README.parent / claims.RESULTS).read_text())
    assert between(README, claims.BEGIN, claims.END) == claims.score(found).strip()
    assert between(README.parent / claims.PAGE, claims.BEGIN, claims.END) == claims.page(found).strip()


def test_no_page_has_a_saving_that_is_simulated_as_its_headline():
    assert [page.name for page in PAGES if re.search(r"^#.*(less energy|saves)", page.read_text(), re.M)] == []
    assert "less energy" not in README.read_text()


@pytest.mark.slow
def test_examples_run(tmp_path):
    # The figures' page is run by its own test below.
    pages = [page for page in PAGES if page != SAVINGS]
    blocks = [block for page in pages for block in blocks_of(page, "bash") if command_lines(block)]
    assert blocks
    folder = tmp_path / "examples"
    folder.mkdir()
    for block in blocks:
        if parted(block)[1] is None:
            run_in(folder, block, environment(folder, tmp_path / "cache"))
    assert (folder / "out/my/report.html").stat().st_size > 100_000


@pytest.mark.slow
def test_served_examples_run(tmp_path):
    served = {}
    for page in PAGES:
        found = [parts for block in blocks_of(page, "bash") if (parts := parted(block))[1] is not None]
        if found:
            served[page] = found
    assert README in served
    clients = 0
    for page, found in served.items():
        ((before, command, then),) = found
        assert before == ""
        variables = environment(tmp_path, tmp_path / "cache")
        with serving(tmp_path, command, variables):
            stream = run_in(tmp_path, then, variables)
            assert stream.rstrip().endswith("data: [DONE]")
            assert '"energy_joules":' in stream
            for client in blocks_of(page, "python"):
                assert "energy_joules" in run_in(tmp_path, f"python - <<'END'\n{client}END", variables)
                clients += 1
    assert clients


@pytest.mark.slow
def test_published_figures_are_what_comes_out(tmp_path):
    text = SAVINGS.read_text()
    (sized,) = (block for block in blocks_of(SAVINGS, "bash") if "--sizes" in block)
    demo = "throttllem simulate --trace azure-conv-like:seconds=1800 --peak-rps max"  # what `throttllem demo` runs
    for nth, command in enumerate((demo, sized.strip())):
        run_in(tmp_path, f"{command} --json {nth}.json", environment(tmp_path, tmp_path / "cache"))
        runs = json.loads((tmp_path / f"{nth}.json").read_text())["runs"]
        rows = table_rows(text, "policy | energy kJ", nth)
        assert len(rows) == len(runs)
        for run, (policy, *cells) in zip(runs, rows, strict=True):
            shown = [float(cell.replace(",", "").split()[0]) for cell in cells[:3]]
            ours = [run["energy_j"] / 1e3, run["tokens_per_joule"], 100 * run["slo"]["attainment"]]
            shown.append(float(cells[5].replace(" s", "").split(", ")[1]))
            ours.append(run["e2e_s"]["p99"])
            assert policy.startswith(f"`{run['policy']}`")
            assert shown == pytest.approx(ours, rel=0.02), policy


# ---- the rules, over lines that break them --------------------------------------------------------------------


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


def test_a_command_that_serves_is_told_from_one_that_checks():
    assert parted("cd a\nthrottllem serve \\\n  --port 1 # stay\ncurl b") == (
        "cd a",
        "throttllem serve    --port 1 # stay",
        "curl b",
    )
    assert parted("throttllem serve --check") == ("throttllem serve --check", None, "")
