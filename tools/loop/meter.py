"""Reads a GPU's counter through pynvml, as anybody would, and the processor time of some processes; a line each time.

`python -m tools.loop.meter UUID FILE PID...`: seconds since 1970, joules, watts, MHz, and each process's processor
seconds. Ends with SIGTERM.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pynvml

EVERY_S = 0.1
TICK_S = 1.0 / os.sysconf("SC_CLK_TCK")


def main(uuid: str, file: Path, pids: list[int]) -> None:
    """Until it is ended."""
    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
    with file.open("w", buffering=1) as out:
        while True:
            energy_j = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
            watts = pynvml.nvmlDeviceGetPowerUsage(handle) / 1e3
            mhz = pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)
            line = [time.time(), energy_j, watts, mhz, *map(used_s, pids)]
            out.write(",".join(f"{value:.6f}" for value in line) + "\n")
            time.sleep(EVERY_S)


def used_s(pid: int) -> float:
    """Processor seconds of a process so far, all its threads; 0 if it is gone."""
    try:
        # pid (command) state parent group ...; a command may hold spaces and brackets.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) * TICK_S


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), [int(pid) for pid in sys.argv[3:]])
