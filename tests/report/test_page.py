from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from plotly.offline import get_plotlyjs

from throttllem.report import page
from throttllem.report.page import write_report

from .factory import SCENARIO, make_run, make_runs

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&$title${x}"


class Reader(HTMLParser):
    """Collects what a browser would act on."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.styles: list[str] = []
        self.scripts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        last = self.tags[-1][0] if self.tags else ""
        {"script": self.scripts, "style": self.styles}.get(last, self.text).append(data)


@pytest.fixture(autouse=True)
def little_javascript(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plotly's five megabytes only in the tests that need them."""
    monkeypatch.setattr(page, "get_plotlyjs", lambda: "Plotly = {}")


def read(path: Path) -> Reader:
    return parse(path.read_text(encoding="utf-8"))


def parse(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    return reader


def test_it_loads_nothing_from_anywhere(tmp_path: Path) -> None:
    path = write_report(tmp_path, SCENARIO, make_runs())
    reader = read(path)
    for tag, attributes in reader.tags:
        assert tag not in {"link", "iframe", "object", "embed", "base", "img"}
        assert not {"src", "href", "srcset", "action", "data", "poster"} & set(attributes), (tag, attributes)
    assert not re.search(r"@import|url\(", "".join(reader.styles))
    policy = next(attributes["content"] for tag, attributes in reader.tags if "http-equiv" in attributes)
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy


def test_it_holds_every_policy_plotly_once_and_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "get_plotlyjs", get_plotlyjs)
    runs = make_runs()
    path = write_report(tmp_path / "made" / "where absent", SCENARIO, runs)
    assert path.name == "report.html"
    reader = read(path)
    text = "".join(reader.text)
    for run in runs:
        assert run.policy in text
    assert path.stat().st_size < 7_000_000
    assert reader.scripts.count(get_plotlyjs()) == 1
    assert "azure-conv-like:seconds=1800" in text
    assert "versions.numpy" in text
    assert "41 because the queue is full" in text
    above = text.split("Plots")[0]
    assert "simulated" in above and "Nothing: no request was served, and no clock was set." in above
    assert "less energy" not in text


def test_the_same_runs_make_the_same_bytes(tmp_path: Path) -> None:
    one, other = (write_report(tmp_path / name, SCENARIO, make_runs()) for name in ("one", "other"))
    assert one.read_bytes() == other.read_bytes()


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    plain = read(write_report(tmp_path / "plain", {"trace": "x", "x": 1, "model": "m"}, [make_run("x")]))
    run = replace(make_run(HOSTILE, rejected=2), rejections={HOSTILE: 2})
    scenario: dict[str, object] = {"trace": HOSTILE, HOSTILE: [HOSTILE], "model": HOSTILE}
    reader = read(write_report(tmp_path / "hostile", scenario, [run]))
    assert {tag for tag, _ in reader.tags} == {tag for tag, _ in plain.tags} | {"li", "ul"}
    assert len(reader.scripts) == len(plain.scripts)
    assert not any(name.startswith("on") for _, attributes in reader.tags for name in attributes)
    assert HOSTILE in "".join(reader.text), "shown as it is, not cut and not filled in"


def test_names_are_text_to_plotly_too(tmp_path: Path) -> None:
    reader = read(write_report(tmp_path, {}, [make_run("triton"), make_run('<a href="x">#1b2129</a>', energy=0.7)]))
    drawn = next(script for script in reader.scripts if script.startswith('{"energy"'))
    figures = json.loads(drawn)
    assert "<" not in drawn
    names = [trace["name"] for trace in figures["e2e"]["data"]]
    assert names == ["triton", '&lt;a href="x"&gt;#1b2129&lt;/a&gt;']


def test_what_is_not_a_number_does_not_break_the_page(tmp_path: Path) -> None:
    run = make_run("triton")
    power = [float("nan"), float("inf"), *run.series.power_w[2:]]
    reader = read(write_report(tmp_path, {}, [replace(run, series=replace(run.series, power_w=power))]))
    figures = json.loads(next(script for script in reader.scripts if script.startswith('{"energy"')))
    assert figures["power"]["data"][0]["y"][:2] == [None, None]
    assert all(math.isfinite(value) for value in figures["power"]["layout"]["yaxis"]["range"])


def test_nothing_half_written_where_rendering_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = write_report(tmp_path, SCENARIO, make_runs()).read_bytes()

    def fail(runs: object) -> None:
        raise RuntimeError("cannot draw")

    monkeypatch.setattr(page, "all_plots", fail)
    with pytest.raises(RuntimeError, match="cannot draw"):
        write_report(tmp_path, SCENARIO, make_runs())
    assert (tmp_path / "report.html").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_nothing_half_written_where_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(self: Path, *args: object, **settings: object) -> None:
        self.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_report(tmp_path, SCENARIO, make_runs())
    assert list(tmp_path.iterdir()) == []


def test_no_runs_are_an_error_and_leave_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no runs"):
        write_report(tmp_path / "out", SCENARIO, [])
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
@pytest.mark.parametrize("name", ["triton+x", HOSTILE])
def test_a_browser_draws_every_plot(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "get_plotlyjs", get_plotlyjs)
    path = write_report(tmp_path, SCENARIO, [*make_runs(), make_run(name, energy=0.9)])
    dom, log = browse(path, tmp_path / "profile")
    assert "CONSOLE" not in log, "an error of a script, a colour that is none, or a load that the policy refused"
    reader = parse(dom)
    assert len([tag for tag, _ in reader.tags if tag == "script"]) == 4
    drawn = re.findall(r'<div class="plot js-plotly-plot" id="plot-(\w+)"', dom)
    assert drawn == ["energy", "attainment", "clock", "power", "e2e", "tpot", "tbt", "size", "batch", "kv"]
    # Plotly lays two or three drawings over one another in each plot.
    assert len([1 for tag, attributes in reader.tags if "main-svg" in (attributes.get("class") or "")]) >= 2 * len(
        drawn
    )
    assert "scatterlayer" in dom and "barlayer" in dom
    assert not any(tag == "img" or "onerror" in attributes for tag, attributes in reader.tags)


def browse(path: Path, profile: Path) -> tuple[str, str]:
    """The page as the browser has it after its scripts ran, and what it logged."""
    quiet = ["--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update"]
    done = subprocess.run(
        [
            str(CHROMIUM),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-sync",
            "--enable-logging=stderr",
            *quiet,
            f"--user-data-dir={profile}",
            "--virtual-time-budget=10000",
            "--dump-dom",
            path.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout, done.stderr
