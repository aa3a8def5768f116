"""The engine as the GPUs feel it: a process that keeps them busy, now more, now less, as long as it lives."""

from __future__ import annotations

import ctypes
import random
import time
from typing import Any

from tools.nvml.build import NAME

EVERY_S, HOLDS_S = 0.06, 0.15


def run(told: dict[str, Any]) -> None:
    """For ever. `told`: "gpus", their numbers, "library", the folder of NVML, and a "seed"."""
    library = ctypes.CDLL(f"{told['library']}/{NAME}")
    library.fake_nvml_work.argtypes = (ctypes.c_uint, ctypes.c_double, ctypes.c_double)
    load = random.Random(told["seed"])
    while True:
        for gpu in told["gpus"]:
            library.fake_nvml_work(gpu, load.choice((0.0, 0.3, 0.7, 1.0)), HOLDS_S)
        time.sleep(EVERY_S)
