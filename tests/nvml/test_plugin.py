"""The plug-in in another project: installed as its README says, with the README's own test."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parents[2] / "tools/nvml"


@pytest.mark.slow
def test_the_readmes_example_runs_without_this_repository(tmp_path):
    source, target, project = tmp_path / "source", tmp_path / "target", tmp_path / "project"
    shutil.copytree(HERE, source, ignore=shutil.ignore_patterns("__pycache__"))
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", target, source]
    subprocess.run([sys.executable, *install], check=True, timeout=120)
    (example,) = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    project.mkdir()
    (project / "test_example.py").write_text(example)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", project],
        env=os.environ | {"PYTHONPATH": str(target)},
        cwd=project,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr
