"""Reads a GPU's counter through pynvml, as anybody would, and the processor time of some processes; a line each time.

`python -m tools.loop.meter UUID FILE PID...`: seconds since 1970, joules, watts, MHz, and each process's processor
seconds. Ends with SIGTERM.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pynvml

from tools.testbed.processes import cpu_s

EVERY_S = 0.1


def main(uuid: str, file: Path, pids: list[int]) -> None:
    """Until it is ended."""
    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
    with file.open("w", buffering=1) as out:
        while True:
            energy_j = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
            watts = pynvml.nvmlDeviceGetPowerUsage(handle) / 1e3
            mhz = pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)
            line = [time.time(), energy_j, watts, mhz, *map(cpu_s, pids)]
            out.write(",".join(f"{value:.6f}" for value in line) + "\n")
            time.sleep(EVERY_S)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), [int(pid) for pid in sys.argv[3:]])
