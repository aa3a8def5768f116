"""All that schedules need before the first one: NVML compiled, a folder in memory, lanes that wait."""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pynvml

from tools.nvml import build
from tools.soak.crew import Crew, crew

MEMORY = Path("/dev/shm")
"""There the disk is never slow, but where a fault makes it so."""


@contextmanager
def stage(lanes: int, library: Path | None = None) -> Iterator[Crew]:
    """So many lanes; `library` is where NVML is compiled (None: a folder that goes away)."""
    with ExitStack() as stack:
        folder = _folder(stack, MEMORY if os.access(MEMORY, os.W_OK) else None)
        built = build.library(library or _folder(stack, None))
        pynvml.nvmlLib = ctypes.CDLL(str(built / build.NAME))  # as if LD_LIBRARY_PATH had named it from the beginning
        yield stack.enter_context(crew(lanes, folder, built))


def _folder(stack: ExitStack, where: Path | None) -> Path:
    """A new one, which other users may pass through."""
    made = tempfile.TemporaryDirectory(dir=where, prefix="soak-", ignore_cleanup_errors=True)
    folder = Path(stack.enter_context(made))
    folder.chmod(0o755)
    return folder
