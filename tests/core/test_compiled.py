"""Kernels: the same as in plain Python, kept on disk where that can be, compiled all the same where it cannot."""

import os
import subprocess
import sys

import numba
import numpy as np

from throttllem.core.compiled import compiled


@compiled
def _squared(value: float) -> float:
    return value * value


@compiled
def _sum_of_squares(values: np.ndarray) -> float:
    total = 0.0
    for value in values:
        total += _squared(value)
    return total


def test_a_kernel_adds_in_the_order_that_is_written():
    values = np.random.default_rng(0).lognormal(sigma=3.0, size=10_000)
    assert _sum_of_squares(values) == _sum_of_squares.function(values) == np.cumsum(values * values)[-1]
    assert _sum_of_squares(values) != (values * values).sum()  # numpy's sum adds in pairs: here the order shows


def test_it_runs_as_machine_code():
    assert _sum_of_squares(np.ones(3)) == 3.0
    assert isinstance(_sum_of_squares.machine(), numba.core.dispatcher.Dispatcher)
    assert _sum_of_squares.__name__ == "_sum_of_squares"


KERNEL = """
from throttllem.core.compiled import compiled

@compiled
def double(value: int) -> int:
    return 2 * value

@compiled
def fourfold(value: int) -> int:
    return double(double(value))
"""
RUN = "import kernel; assert kernel.fourfold(3) == 12; print(sum(kernel.fourfold.machine().stats.cache_hits.values()))"


def _run(folder, **environment):
    kept = {key: value for key, value in os.environ.items() if not key.startswith("NUMBA")}
    done = subprocess.run(
        [sys.executable, "-c", RUN], cwd=folder, env=kept | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_machine_code_is_kept_for_the_next_process(tmp_path):
    (tmp_path / "kernel.py").write_text(KERNEL)
    assert _run(tmp_path) == 0
    assert _run(tmp_path) == 1
    (tmp_path / "kernel.py").write_text(KERNEL + "\n")  # the file changed: it is compiled again
    assert _run(tmp_path) == 0


def test_without_a_folder_to_write_in_it_is_compiled_all_the_same(tmp_path):
    (tmp_path / "kernel.py").write_text(KERNEL)
    (tmp_path / "file").write_text("")
    # A path below a file can be written by nobody, root included.
    (tmp_path / "__pycache__").write_text("")
    assert _run(tmp_path, HOME=str(tmp_path / "file"), XDG_CACHE_HOME=str(tmp_path / "file")) == 0
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


def test_a_cache_that_cannot_be_written_after_all_costs_the_cache_alone(monkeypatch):
    @compiled
    def triple(value: int) -> int:
        return 3 * value

    class FullDisk:
        def load_overload(self, *_):
            return None

        def save_overload(self, *_):
            raise OSError("no space left on the device")

    triple.machine()._cache = FullDisk()
    assert triple(2) == 6


def test_importing_a_kernel_imports_no_numba():
    script = "import sys, throttllem.cli.app, throttllem.keeper.__main__, throttllem.core.controller\n"
    script += "assert not any(name.startswith('numba') for name in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
