"""Reads what a driver reports of a GPU, and recognises its kind. Knows nothing of engines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pynvml

from throttllem.gpu.hardware import found_gpu
from throttllem.gpu.nvml import Nvml, NvmlError, NvmlGpu, Trouble
from throttllem.physics.catalogue import Catalogue, Gpu
from throttllem.physics.recognition import Board, contradiction, recognise

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """The kind of an engine's GPUs, and what is to be known of it."""

    gpu: Gpu
    notes: tuple[str, ...] = ()


def boards_here(names: Sequence[str] | None = None) -> dict[str, Board]:
    """By name (a UUID or number), the boards of GPUs; None: of all that can be read. Raises NvmlError if NVML or a GPU
    cannot be read, ValueError for a GPU that is not here.
    """
    with Nvml() as nvml:
        if names is None:
            names = [uuid for uuid in nvml.gpus().values() if isinstance(uuid, str)]
        return {name: read_board(found_gpu(nvml, name)) for name in names}


def knowing(catalogue: Catalogue, name: str) -> Catalogue:
    """The catalogue, with the unlisted GPU of that name if a board of this machine is one, as `profile` named it."""
    if name in catalogue.gpus:
        return catalogue
    try:
        found = [recognise(board, catalogue).gpu for board in boards_here().values()]
    except NvmlError:
        return catalogue
    return next((catalogue.having(gpu) for gpu in found if gpu.name == name), catalogue)


def kind_of(names: Sequence[str], given: str | None, catalogue: Catalogue, *, only_warn: bool = False) -> Kind:
    """The kind of an engine's GPUs: the one that was named, unless a board contradicts it, else that of the boards.
    `only_warn`: a contradiction is a note, where no clock will be set. Raises ValueError, and as `boards_here`.
    """
    boards = boards_here(names)
    found = {name: recognise(board, catalogue) for name, board in boards.items()}
    if given is not None:
        gpu = catalogue.gpu(given)
        refused = [
            f"GPU {name}: {no}" for name, board in boards.items() if (no := contradiction(board, gpu, catalogue))
        ]
        if refused and not only_warn:
            raise ValueError(f"engines: gpus: {refused[0]}")
        notes = refused or [f"{one.note}; it is used as {given}, as named" for one in found.values() if one.note]
        return Kind(gpu=gpu, notes=tuple(dict.fromkeys(notes)))
    kinds = {one.gpu.name: one for one in found.values()}
    if len(kinds) > 1:
        are = ", ".join(f"{name} = {one.gpu.name}" for name, one in found.items())
        raise ValueError(
            f"engines: gpus: one engine, and GPUs of several kinds: {are}; an engine needs GPUs of one kind"
        )
    one = next(iter(kinds.values()))
    return Kind(gpu=one.gpu, notes=(one.note,) if one.note else ())
