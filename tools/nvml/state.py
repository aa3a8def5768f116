"""One mapped state file and the library that knows what its moments mean. Knows nothing of faults and GPUs' names."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

from . import build
from .layout import MachineLayout, Truth

SIZE = ctypes.sizeof(MachineLayout)


class MachineError(Exception):
    """A state file that cannot be used, or a change that no GPU can make; the message names it."""


class State:
    """A state file of the right size, mapped until it is closed. `library`: a folder made by `build.library`."""

    def __init__(self, file: Path, library: Path) -> None:
        self.file, self.library_folder = file, library
        with file.open("r+b") as opened:
            self._mapped = mmap.mmap(opened.fileno(), SIZE)
        self._layout: MachineLayout | None = MachineLayout.from_buffer(self._mapped)
        self.library = _functions(library)

    @property
    def layout(self) -> MachineLayout:
        """The file itself. Keep no part of it: it could not be unmapped. Raises MachineError when closed."""
        if self._layout is None:
            raise MachineError(f"{self.file}: closed")
        return self._layout

    def close(self) -> None:
        """Unmaps; the file stays."""
        if self._layout is not None:
            self._layout = None
            self._mapped.close()

    def change(self, gpu: int, op: int, first: float, second: float) -> None:
        """One change of a GPU (`layout.Op`). Raises MachineError."""
        error = self.library.fake_nvml_change(ctypes.addressof(self.layout), gpu, op, first, second)
        if error:
            raise MachineError(f"GPU {gpu}: change {op} ({first:g}, {second:g}): NVML error {error}")

    def truth(self, gpu: int) -> Truth:
        """What is true of a GPU now."""
        truth = Truth()
        self.library.fake_nvml_truth(ctypes.addressof(self.layout), gpu, ctypes.byref(truth))
        return truth


def _functions(folder: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(folder / build.NAME))
    library.fake_nvml_change.argtypes = (
        ctypes.c_void_p,
        ctypes.c_uint,
        ctypes.c_int,
        ctypes.c_double,
        ctypes.c_double,
    )
    library.fake_nvml_truth.argtypes = (ctypes.c_void_p, ctypes.c_uint, ctypes.c_void_p)
    library.fake_nvml_truth.restype = None
    return library
