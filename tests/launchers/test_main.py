"""The launcher's process where it cannot start: it says why. With a real Ray: tests/real/test_ray.py."""

import subprocess
import sys


def test_without_ray_it_says_what_to_install(tmp_path):
    words = [sys.executable, "-m", "throttllem.launchers", "--ray", "auto", "--socket", tmp_path / "launcher.sock"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"install Ray, of the cluster's version, in the environment of {sys.executable}" in done.stderr
    assert not (tmp_path / "launcher.sock").exists()
