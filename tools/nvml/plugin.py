"""A pytest plug-in: fake GPUs behind the real NVML calls. README.md beside it shows how to use it.

Knows nothing of any project: what a GPU is made of comes with the `Part`.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from .build import NAME, library
from .machine import STATE, Machine
from .part import Part

MakeGpus = Callable[..., Machine]


@pytest.fixture(scope="session")
def nvml_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the library, compiled once for all workers of pytest-xdist. Needs a C compiler named cc."""
    base = tmp_path_factory.getbasetemp()
    return library((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "libnvidia-ml")


@pytest.fixture
def make_gpus(nvml_library: Path, tmp_path: Path) -> Iterator[MakeGpus]:
    """`make_gpus(*parts, name="gpus")`: a machine with these GPUs, for processes that get `machine.environment()`."""
    with ExitStack() as stack:

        def make(*parts: Part, name: str = "gpus") -> Machine:
            return stack.enter_context(Machine.create(tmp_path / name, parts, library=nvml_library))

        yield make


@pytest.fixture
def make_gpus_here(make_gpus: MakeGpus, nvml_library: Path, monkeypatch: pytest.MonkeyPatch) -> MakeGpus:
    """The same, and this process's own NVML sees the GPUs, too, with the processes that it starts.

    Its user may set clocks. The library stays loaded: a process has either this NVML or a real one.
    """
    ctypes.CDLL(str(nvml_library / NAME))  # pynvml finds it by its name from now on

    def make(*parts: Part, name: str = "gpus") -> Machine:
        machine = make_gpus(*parts, name=name)
        for variable, value in machine.environment().items():
            monkeypatch.setenv(variable, value)
        for gpu in machine.gpus:
            gpu.root_only(os.geteuid() == 0)
        return machine

    return make


__all__ = ["STATE", "make_gpus", "make_gpus_here", "nvml_library"]
