"""One GPU from outside: what is true of it, and what happens to it. Knows nothing of NVML's calls."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from .layout import BY_OTHER, PIDS, Control, Op, Truth
from .state import MachineError, State


class FakeGpu:
    """One GPU. Reading changes nothing; methods change what their name says, until they or `reset` change it back."""

    def __init__(self, state: State, index: int) -> None:
        self._state, self.index = state, index

    # ---- what is true ----

    @property
    def uuid(self) -> str:
        """As NVML reports it."""
        return str(self._state.layout.gpus[self.index].part.uuid.decode())

    @property
    def lock(self) -> tuple[int, int] | None:
        """The range that the clocks are locked to, in MHz, from the moment of the write on. NVML has no call for it."""
        truth = self.truth
        return (truth.low_mhz, truth.high_mhz) if truth.locked else None

    @property
    def truth(self) -> Truth:
        """All of it at one moment."""
        return self._state.truth(self.index)

    @property
    def clock_mhz(self) -> int:
        """Now."""
        return int(self.truth.clock_mhz)

    @property
    def watts(self) -> float:
        """Now."""
        return float(self.truth.watts)

    @property
    def energy_j(self) -> float:
        """Exactly, since creation or reset."""
        return float(self.truth.energy_j)

    @property
    def attempted(self) -> int:
        """Calls of NVML that wanted to write, also those that failed or did not live to."""
        return int(self.control.attempted)

    @property
    def effective(self) -> int:
        """Writes of NVML that took effect, counted with the effect itself."""
        return int(self.truth.effective)

    # ---- what happens to it ----

    def lock_by_other(self, low_mhz: int, high_mhz: int) -> None:
        """Another controller locks the clocks: neither logged nor counted."""
        self.change(Op.LOCK | BY_OTHER, low_mhz, high_mhz)

    def unlock_by_other(self) -> None:
        """Another controller unlocks them."""
        self.change(Op.UNLOCK | BY_OTHER)

    def work(self, util: float, valid_s: float) -> None:
        """Busy by 0 to 1.5 for `valid_s`, as `fake_nvml_work` does."""
        self.change(Op.WORK, util, valid_s)

    def limit_w(self, watts: float | None) -> None:
        """The enforced power limit falls (a power brake, a data centre's cap); None takes that back."""
        self.change(Op.ENFORCE, 0 if watts is None else round(watts * 1000))

    def thermal(self, mhz: int | None, *, hardware: bool = False) -> None:
        """Heat: no clock above that; None: it has cooled down."""
        self.change(Op.THERMAL, mhz or 0, hardware)

    def context(self, keeps_clock: bool) -> None:
        """Whether a context keeps the clock of the idle GPU up."""
        self.change(Op.CONTEXT, keeps_clock)

    def reset_energy_counter(self) -> None:
        """NVML's counter begins at 0 again; `energy_j` goes on."""
        self.change(Op.COUNTER)

    def permission(self, granted: bool) -> None:
        """Whether writes are permitted to anybody."""
        self.control.permission_denied = not granted

    def root_only(self, only: bool) -> None:
        """Whether writes need root; they do unless set otherwise."""
        self.control.root_only = only

    def lost(self, lost: bool) -> None:
        """Off the bus, or back."""
        self.control.lost = lost

    def mig(self, on: bool) -> None:
        """Cut into instances."""
        self.control.mig = on

    def mps(self, pids: Sequence[int]) -> None:
        """Clients of MPS."""
        control = self.control
        control.mps_count = _put(control.mps_pids, pids)

    def processes(self, pids: Sequence[int]) -> None:
        """The processes that compute on it."""
        control = self.control
        control.process_count = _put(control.process_pids, pids)

    def energy_counter(self, there: bool) -> None:
        """Whether NVML has one."""
        self.control.no_energy = not there

    def counter_of_module(self, watts: float) -> None:
        """The energy counter counts so much beside the GPU, as that of a GH200 does; 0: it counts the GPU alone."""
        self.control.module_mw = round(watts * 1000)

    def counter_stands(self, stands: bool) -> None:
        """Whether the energy counter stands still."""
        self.control.counter_stands_mj = round(self.energy_j * 1000) + 1 if stands else 0

    def power_reading(self, there: bool) -> None:
        """Whether NVML has one."""
        self.control.no_power = not there

    def temperature(self, celsius: int) -> None:
        """What NVML reads; it has no effect on clocks (see `thermal`)."""
        self.control.temperature_c = celsius

    def memory_used(self, used_bytes: int) -> None:
        """What NVML reads."""
        self.control.memory_used_bytes = used_bytes

    @property
    def control(self) -> Control:
        """The words in the file. Keep no reference."""
        found: Control = self._state.layout.gpus[self.index].control
        return found

    def change(self, op: int, first: float = 0, second: float = 0) -> None:
        """One change of `layout.Op`. Raises MachineError."""
        self._state.change(self.index, op, first, second)


def _put(into: ctypes.Array[ctypes.c_uint32], pids: Sequence[int]) -> int:
    if len(pids) > PIDS:
        raise MachineError(f"{len(pids)} processes: {PIDS} at most")
    into[: len(pids)] = list(pids)
    return len(pids)
