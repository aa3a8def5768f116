"""Every file in examples/ does what its comments say."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from pages import ROOT, environment, serving

EXAMPLES = ROOT / "examples"
UUID = "GPU-cfbd6ca2-5f85-43b7-dcc7-dd4f6c1cf3df"


def run(folder, *words, status=0):
    done = subprocess.run(
        list(map(str, words)),
        cwd=folder,
        env=environment(folder, folder / "cache"),
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


def test_readme_names_every_file():
    named = set(re.findall(r"\[([\w.]+)\]\(\1\)", (EXAMPLES / "README.md").read_text()))
    assert named == {path.name for path in EXAMPLES.iterdir()} - {"README.md"}


def test_configuration_is_accepted(tmp_path):
    # 1: the engine is not up.
    checked = run(tmp_path, "throttllem", "serve", "--config", EXAMPLES / "vllm.toml", "--check", status=1)
    assert "would start all the same" in checked
    for section, values in tomllib.loads((EXAMPLES / "vllm.toml").read_text()).items():
        if section == "limits":
            assert all(f"{section}.{name} = " in checked for name in values)


@pytest.mark.slow
def test_trace_is_simulated(tmp_path):
    run(tmp_path, EXAMPLES / "simulate.sh", EXAMPLES / "trace.csv", tmp_path / "out")
    runs = json.loads((tmp_path / "out/result.json").read_text())["runs"]
    assert [(one["policy"], one["completed"]) for one in runs] == [
        (policy, 8) for policy in ("triton", "throttllem", "least-energy")
    ]
    assert (tmp_path / "out/report.html").stat().st_size > 100_000


@pytest.mark.slow
def test_own_policy_is_simulated(tmp_path):
    shutil.copy(EXAMPLES / "own_policy.py", tmp_path)
    policies = "triton,own_policy:LowestInTime"
    words = ["throttllem", "simulate", "--policy", policies, "--seconds", "60", "--json", "result.json"]
    run(tmp_path, *words)
    top, own = json.loads((tmp_path / "result.json").read_text())["runs"]
    assert own["completed"] == top["completed"]
    assert own["energy_j"] < top["energy_j"]
    assert own["clock_switches"] > 0


def test_client_sets_slos_and_reads_its_metrics(tmp_path):
    variables = environment(tmp_path, tmp_path / "cache")
    with serving(tmp_path, "throttllem serve --policy triton", variables):
        base_url = f"http://127.0.0.1:{variables['THROTTLLEM_SERVER__PORT']}/v1"
        printed = run(tmp_path, sys.executable, EXAMPLES / "client.py", base_url)
    assert re.search(r"^energy_joules: [\d.]+$", printed, re.MULTILINE)
    assert re.search(r"^time_to_first_token_ms: [\d.]+$", printed, re.MULTILINE)


def test_keeper_unit_is_printed(tmp_path):
    user = "nobody"
    unit = run(tmp_path, EXAMPLES / "keeper.sh", user, f"{UUID}=600-1410")
    assert "[Service]" in unit
    assert f"{UUID}=600-1410" in unit


def test_gateway_unit_is_accepted_by_systemd(tmp_path):
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed")
    unit = tmp_path / "throttllem.service"
    text = (EXAMPLES / "throttllem.service").read_text()
    # systemd checks that the program exists.
    unit.write_text(text.replace("/opt/throttllem/bin/throttllem", str(Path(sys.executable).parent / "throttllem")))
    done = subprocess.run(
        [analyze, "verify", "--man=no", str(unit)],
        env=os.environ | {"SYSTEMD_UNIT_PATH": f"{tmp_path}:"},
        capture_output=True,
        text=True,
        check=False,
    )
    faults = [line for line in done.stderr.splitlines() if "throttllem.service" in line]
    assert faults == [], done.stderr
