"""The documentation: the site builds and loads nothing from elsewhere, and what can drift is compared with the code."""

import ast
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections import defaultdict
from html.parser import HTMLParser
from importlib.metadata import version
from pathlib import Path

import httpx
import pytest
from core.toy import sequence, spec
from pages import DOCS, FENCE, PAGES, ROOT, blocks_of, environment, name_of, serving, table_rows

from throttllem.core.forecast.projection import project
from throttllem.core.scoreboard import Scoreboard
from throttllem.gateway.http import openapi
from throttllem.gateway.http.slo_headers import CLASS_HEADER, TARGETS
from throttllem.gateway.http.uncontrolled import ELSEWHERE

LIFE = DOCS / "life-of-a-request.md"
HTTP_API = DOCS / "reference/http-api.md"
STRUCTURE = DOCS / "structure.svg"
SRC = ROOT / "src/throttllem"
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


# ---- links and words ------------------------------------------------------------------------------------------


def anchor(heading):
    """As forges make it: lower case, punctuation dropped, spaces to hyphens."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def link_faults(page):
    faults = []
    for target in _LINK.findall(FENCE.sub("", page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, fragment = target.partition("#")
        there = page.parent / name if name else page
        if not there.exists():
            faults.append(f"{page.name}: {target} is not there")
        elif fragment and fragment not in map(anchor, re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE)):
            faults.append(f"{page.name}: {target} is no heading of {there.name}")
    return faults


WORDS = re.compile(
    r"\b(?:promis(?:e[sd]?|ing)|visit(?:s|ed)?|ticket|entrance|turned away|whoever|somebody|nobody|everybody|aloud|anew"
    r"|foresight|wish(?:es)?|doomed|hopeless|stranger|witness|hung up|hangs? up|gives? back|given back|of its own)\b",
    re.IGNORECASE,
)
"""Words that the house style replaces by the field's terms."""


def word_faults(page):
    lines = FENCE.sub("", page.read_text()).splitlines()
    return [f"{name_of(page)}: {found[0]}: {line[:80]}" for line in lines if (found := WORDS.search(line))]


def is_recorded(page):
    """A page that a tool wrote from a run; its words change with the next run."""
    return re.search(r"^Written by `", page.read_text(), re.MULTILINE) is not None


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    assert link_faults(page) == []


@pytest.mark.parametrize("page", [page for page in PAGES if not is_recorded(page)], ids=name_of)
def test_words_are_the_fields(page):
    assert word_faults(page) == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_named_in_passing_exist(page):
    named = set(re.findall(r"`([\w.-]+(?:/[\w.-]+)+\.(?:py|toml|html|svg|yml))`", FENCE.sub("", page.read_text())))
    assert {name for name in named if not any((base / name).exists() for base in (ROOT, SRC))} == set()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_data_blocks_can_be_read(page):
    for block in blocks_of(page, "toml"):
        tomllib.loads(block)
    for block in blocks_of(page, "json"):
        json.loads(block)


def test_metrics_named_in_passing_exist():
    known = set(re.findall(r"^\| `(\w+)`", (DOCS / "reference/metrics.md").read_text(), re.MULTILINE))
    named = {name for page in PAGES for name in re.findall(r"`((?:throttllem|gen_ai)_\w+)", page.read_text())}
    named -= set(re.findall(r"`(gen_ai_\w+)`", (DOCS / "reference/metrics.md").read_text()))  # labels
    assert {re.sub(r"_bucket$", "", name) for name in named} - known - {"throttllem_drift_"} == set()


def test_link_rule_sees(tmp_path):
    page = tmp_path / "a.md"
    page.write_text("# Where to go?\n[a](b.md) [c](#where-to-go) [d](#nowhere) [e](https://x.example) ![f](a.md)\n")
    assert link_faults(page) == ["a.md: b.md is not there", "a.md: #nowhere is no heading of a.md"]


# ---- the site -------------------------------------------------------------------------------------------------


class Loads(HTMLParser):
    """Addresses that a browser requests to show a page, on other hosts; where a link leads is none of them."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        named = dict(attrs)
        loads = [named.get("src")]
        if tag == "link" and named.get("rel") not in {"canonical", "prev", "next"}:
            loads.append(named.get("href"))
        self.found += [address for address in loads if address and re.match(r"(?:https?:)?//", address)]


def loaded_from_elsewhere(html):
    parser = Loads()
    parser.feed(html)
    return parser.found


def site(source, folder):
    """Built as `make docs` does. Not with --quiet: that hides the warnings which --strict counts."""
    pytest.importorskip("material", reason="the site needs mkdocs-material")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=source, env=quiet, capture_output=True, text=True, check=False, timeout=120)


def test_site_builds_strictly_and_loads_nothing_from_elsewhere(tmp_path):
    built = site(ROOT, tmp_path)
    assert built.returncode == 0, built.stderr
    pages = sorted(tmp_path.rglob("*.html"))
    assert len(pages) > len(list(DOCS.rglob("*.md")))
    assert {page.name: found for page in pages if (found := loaded_from_elsewhere(page.read_text()))} == {}
    styles = [sheet for sheet in tmp_path.rglob("*.css") if re.search(r"url\(['\"]?(?:https?:)?//", sheet.read_text())]
    assert styles == []


def test_site_with_a_broken_link_is_an_error(tmp_path):
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    shutil.copytree(DOCS, tmp_path / "docs")
    (tmp_path / "docs/energy.md").write_text("# Energy\n[to nowhere](nowhere.md)\n")
    built = site(tmp_path, tmp_path / "site")
    assert built.returncode != 0
    assert "nowhere.md" in built.stderr


def test_loading_rule_sees():
    html = '<a href="https://a.example"></a><script src="//b.example/x.js"></script><img src="c.png">'
    html += '<link rel="stylesheet" href="https://d.example/e.css"><link rel="canonical" href="https://f.example">'
    assert loaded_from_elsewhere(html) == ["//b.example/x.js", "https://d.example/e.css"]


@pytest.mark.parametrize("name", ["report", "dashboard"])
def test_picture_is_small(name):
    picture = (DOCS / f"{name}.png").read_bytes()
    assert len(picture) < 300_000
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(picture[16:20], "big") == 1200


# ---- the life of a request ------------------------------------------------------------------------------------


def test_names_in_the_life_of_a_request_exist():
    named = re.findall(r"\b([\w/]+)\.py::([\w.]+)", LIFE.read_text())
    assert len(named) > 60
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
            one.dispatch(sequence(key, prompt, answer, earliest=start))
            if start <= first:
                one.begin(key, start, 0.0)
        alone.append(project(mine, engine, first=first).kv_blocks.tolist())
    ours = project(board, engine, first=first)
    blocks = [[*own, *[0] * ours.horizon][: ours.horizon] for own in alone]
    columns = [range(first, first + ours.horizon), *blocks, ours.batch, ours.kv_blocks, ours.prefill_tokens]
    assert by_hand == [list(map(int, cells)) for cells in zip(*columns, strict=True)]


# ---- the picture of the packages ------------------------------------------------------------------------------


def drawn():
    """Packages and arrows of the picture."""
    text = STRUCTURE.read_text()
    return set(re.findall(r'data-package="(\w+)"', text)), re.findall(r'data-imports="(\w+) (\w+)"', text)


def below(arrows):
    """What each package may import by the arrows, directly or through others. Fails on a circle."""
    direct = defaultdict(set)
    for upper, lower in arrows:
        direct[upper].add(lower)
    found = {}

    def reach(package, above=()):
        assert package not in above, f"a circle: {' -> '.join((*above, package))}"
        if package not in found:
            lower = direct[package]
            found[package] = lower.union(*(reach(one, (*above, package)) for one in lower))
        return found[package]

    for package in list(direct):
        reach(package)
    return found


def imports():
    """(package, package) for every import in the source that crosses packages."""
    for path in SRC.rglob("*.py"):
        upper = path.relative_to(SRC).parts[0]
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("throttllem."):
                lower = node.module.split(".")[1]
                if upper != lower:
                    yield upper, lower


def test_picture_shows_every_package():
    packages, _ = drawn()
    assert packages == {folder.name for folder in SRC.iterdir() if (folder / "__init__.py").exists()}


def test_arrows_are_the_imports():
    packages, arrows = drawn()
    crossing = {pair for pair in imports() if set(pair) <= packages}
    reached = below(arrows)
    assert {pair for pair in crossing if pair[1] not in reached.get(pair[0], set())} == set()
    assert set(arrows) - crossing == set()


def test_circles_are_found():
    with pytest.raises(AssertionError, match="a -> b -> a"):
        below([("a", "b"), ("b", "a")])


# ---- the HTTP API ---------------------------------------------------------------------------------------------


def references(node):
    match node:
        case dict():
            for key, value in node.items():
                yield from [value] if key == "$ref" else references(value)
        case list():
            for value in node:
                yield from references(value)


def test_copy_of_the_openapi_document_is_current():
    """`python -m throttllem.gateway.http.openapi > docs/reference/openapi.json` renews it."""
    assert (DOCS / "reference/openapi.json").read_bytes() == openapi.body(version("throttllem"))


def test_references_of_the_openapi_document_lead_somewhere():
    document = openapi.document("1")
    for reference in references(document):
        found = document
        for part in reference.removeprefix("#/").split("/"):
            assert part in found, reference
            found = found[part]


def codes_in_the_source():
    """Every literal `code=...` of an error in the gateway."""
    for path in (*(SRC / "gateway").rglob("*.py"), *(SRC / "openai_api").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.keyword(arg="code", value=ast.Constant(value=str(code))) if path != Path(openapi.__file__):
                    yield code


def test_error_codes_are_those_of_the_code():
    named = {case.code for case in openapi.ERRORS if case.code}
    of_engines = {"not_found"}  # Raised for a path that the gateway passes on to an engine.
    assert set(codes_in_the_source()) - named == of_engines
    elsewhere = {"engine_lost", "engine_error", "own_limit"}  # made of the core's reason; of errors of engines
    assert named - set(codes_in_the_source()) <= elsewhere


def test_page_shows_the_same_errors():
    rows = table_rows(HTTP_API.read_text(), "status")
    shown = {(int(status), code) for status, codes, _ in rows for code in re.findall(r"`(\w+)`", codes) or [None]}
    assert shown == {(case.status, case.code) for case in openapi.ERRORS}


def test_page_shows_the_same_paths():
    text = HTTP_API.read_text()
    concrete = {path for path in openapi.document("1")["paths"] if "{" not in path}
    assert {path for path in concrete if f"`{path}`" not in text} == set()


def test_gateway_serves_what_the_document_describes(tmp_path):
    document = openapi.document("1")
    variables = environment(tmp_path, tmp_path / "cache")
    base = f"http://127.0.0.1:{variables['THROTTLLEM_SERVER__PORT']}"
    known = {(case.status, case.code) for case in openapi.ERRORS}
    with serving(tmp_path, "throttllem serve --policy triton", variables), httpx.Client(base_url=base) as client:
        for template, methods in document["paths"].items():
            path = template.format(name="llama-3-8b", path="files")
            for method in ("get", "post", "delete", "put"):
                reply = client.request(method, path, content=b"{" if method == "post" else None)
                error = reply.json()["error"] if reply.status_code >= 400 else None
                # What is passed on may get an error of the engine.
                if error is not None and "{path}" not in template and template not in ELSEWHERE:
                    assert (reply.status_code, error.get("code")) in known or path.startswith("/v1/messages"), (
                        method,
                        path,
                    )
                refused = reply.status_code == 405 or (error is not None and error.get("code") == "unknown_url")
                assert refused == (method not in methods), (method, path, reply.text)
        body = {"model": "llama-3-8b", "prompt": "x", "max_tokens": 1}
        for header in (*TARGETS, CLASS_HEADER):
            reply = client.post("/v1/completions", json=body, headers={header: "none"})
            assert (reply.status_code, reply.json()["error"]["param"]) == (400, header)
        reply = client.post("/v1/completions", json=body, headers={"x-throttllem-metrics": "1"})
        assert reply.json()["metrics"].keys() <= document["components"]["schemas"]["Metrics"]["properties"].keys()
        served = client.get("/openapi.json")
        assert served.json() == json.loads((DOCS / "reference/openapi.json").read_text())


# ---- the forge's workflow -------------------------------------------------------------------------------------


def made(text):
    """The `make` targets that a script runs; what follows them are variables."""
    calls = re.findall(r"\bmake ((?:[a-z][\w-]*(?![\w=-]) ?)+)", re.sub(r"#.*", "", text))
    return {target for call in calls for target in call.split()}


def test_workflow_runs_the_same_targets():
    ours, forge = ((ROOT / name).read_text() for name in (".ci/run", ".github/workflows/ci.yml"))
    assert made(forge) == made(ours)


def test_pages_name_only_targets_that_exist():
    targets = set(re.findall(r"^([a-z][\w-]*):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {name for page in PAGES for name in re.findall(r"`make ([a-z][\w-]*)", page.read_text())}
    assert named - targets == set()
