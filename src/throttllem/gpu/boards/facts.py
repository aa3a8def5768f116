"""Reads what a driver reports of a GPU, and recognises its kind. Knows nothing of engines."""

from __future__ import annotations

from collections.abc import Sequence

import pynvml

from throttllem.gpu.hardware import found_gpu
from throttllem.gpu.nvml import Nvml, NvmlError, NvmlGpu, Trouble
from throttllem.physics.catalogue import Catalogue
from throttllem.physics.recognition import Board, Recognised, recognise

_CORES = {"7.0": 64, "7.5": 64, "8.0": 64}
"""By compute capability, CUDA cores of a multiprocessor; 128 on all others."""


def read_board(gpu: NvmlGpu) -> Board:
    """The facts by which a GPU is recognised. Raises NvmlError; what is not supported is left out."""
    memory = gpu.optional("memory", pynvml.nvmlDeviceGetMemoryInfo)
    limit_mw = gpu.optional("default power limit", pynvml.nvmlDeviceGetPowerManagementDefaultLimit)
    capability = gpu.optional("compute capability", pynvml.nvmlDeviceGetCudaComputeCapability)
    capability = None if capability is None else "{}.{}".format(*capability)
    cores = gpu.optional("cores", pynvml.nvmlDeviceGetNumGpuCores)
    bits = gpu.optional("memory bus", pynvml.nvmlDeviceGetMemoryBusWidth)
    memory_mhz = gpu.optional("memory clock", pynvml.nvmlDeviceGetMaxClockInfo, arguments=(pynvml.NVML_CLOCK_MEM,))
    try:
        clocks_mhz = gpu.clocks_mhz()
    except NvmlError as error:
        if error.trouble is not Trouble.UNSUPPORTED:
            raise
        clocks_mhz = ()
    return Board(
        name=gpu.name(),
        memory_bytes=float(memory.total) if memory and memory.total else None,
        clocks_mhz=clocks_mhz,
        limit_w=float(limit_mw) / 1e3 if limit_mw else gpu.limit_w(),
        compute_capability=capability,
        bandwidth_bytes_per_s=2e6 * memory_mhz * bits / 8 if bits and memory_mhz else None,
        multiprocessors=round(cores / _CORES.get(capability or "", 128)) if cores else None,
    )


def recognised(names: Sequence[str], catalogue: Catalogue) -> tuple[Recognised, ...]:
    """The kinds of GPUs, which are named by UUID or number. Raises NvmlError if NVML or a GPU cannot be read,
    ValueError for a GPU that is not here.
    """
    with Nvml() as nvml:
        return tuple(recognise(read_board(found_gpu(nvml, name)), catalogue) for name in names)
