"""The mapped file of machine.h for ctypes; a test compares sizes and offsets. Knows nothing of what fields mean."""

from __future__ import annotations

import ctypes
from ctypes import c_char, c_double, c_int32, c_int64, c_uint32, c_uint64
from enum import IntEnum

MAGIC = 0x4C4D564E454B4146
VERSION = 3
GPUS = 16
CLOCKS = 256
PIDS = 16
SLOTS = 32
FAULTS = 64
WRITES = 1024
BY_OTHER = 0x100


class Op(IntEnum):
    """What changes a GPU; the first four are NVML's writes."""

    LOCK = 1
    UNLOCK = 2
    POWER_LIMIT = 3
    PERSISTENCE = 4
    WORK = 5
    ENFORCE = 6
    THERMAL = 7
    CONTEXT = 8
    COUNTER = 9
    DRIVER = 10
    RESET = 11


class Moment(ctypes.Structure):
    """`struct moment`."""

    _fields_ = (
        ("at_ns", c_int64),
        ("origin_ns", c_int64),
        ("energy_mj", c_double),
        ("published_mj", c_double),
        ("counter_base_mj", c_double),
        ("average_w", c_double),
        ("util", c_double),
        ("busy_until_ns", c_int64),
        ("switch_at_ns", c_int64),
        ("cap_ns", c_int64),
        ("thermal_ns", c_int64),
        ("effective", c_uint64),
        ("clock", c_uint32),
        ("target", c_uint32),
        ("locked", c_uint32),
        ("low", c_uint32),
        ("high", c_uint32),
        ("thermal_mhz", c_uint32),
        ("thermal_hardware", c_uint32),
        ("context", c_uint32),
        ("limit_mw", c_uint32),
        ("enforced_mw", c_uint32),
        ("persistence", c_uint32),
        ("unused", c_uint32),
    )


class Slot(ctypes.Structure):
    """`struct slot`."""

    _fields_ = (("owner", c_uint64), ("version", c_uint64), ("moment", Moment))


class PartLayout(ctypes.Structure):
    """`struct part`."""

    _fields_ = (
        ("uuid", c_char * 48),
        ("name", c_char * 96),
        ("serial", c_char * 32),
        ("bus_id", c_char * 32),
        ("pci_device_id", c_uint32),
        ("clocks", c_uint32),
        ("memory_mhz", c_uint32),
        ("idle_clock", c_uint32),
        ("architecture", c_uint32),
        ("capability_major", c_uint32),
        ("capability_minor", c_uint32),
        ("limit_mw", c_uint32),
        ("limit_min_mw", c_uint32),
        ("limit_max_mw", c_uint32),
        ("context", c_uint32),
        ("boost_clock", c_uint32),
        ("cores", c_uint32),
        ("memory_bus_bits", c_uint32),
        ("memory_bytes", c_uint64),
        ("refresh_ns", c_int64),
        ("idle_w", c_double),
        ("clock_mhz", c_uint32 * CLOCKS),
        ("busy_w", c_double * CLOCKS),
        ("switch_ns", c_int64 * CLOCKS),
    )


class Control(ctypes.Structure):
    """`struct control`."""

    _fields_ = (
        ("attempted", c_uint64),
        ("memory_used_bytes", c_uint64),
        ("counter_stands_mj", c_uint64),
        ("permission_denied", c_uint32),
        ("root_only", c_uint32),
        ("lost", c_uint32),
        ("mig", c_uint32),
        ("no_energy", c_uint32),
        ("no_power", c_uint32),
        ("temperature_c", c_uint32),
        ("process_count", c_uint32),
        ("mps_count", c_uint32),
        ("process_pids", c_uint32 * PIDS),
        ("mps_pids", c_uint32 * PIDS),
        ("module_mw", c_uint32),
    )


class Gpu(ctypes.Structure):
    """`struct gpu`."""

    _fields_ = (("part", PartLayout), ("control", Control), ("head", c_uint64), ("slots", Slot * SLOTS))


class FaultLayout(ctypes.Structure):
    """`struct fault`."""

    _fields_ = (
        ("active", c_uint32),
        ("gpu", c_int32),
        ("pid", c_int32),
        ("error", c_int32),
        ("kill", c_uint32),
        ("times", c_int32),
        ("sleep_ns", c_int64),
        ("nth", c_uint64),
        ("seen", c_uint64),
        ("call", c_char * 64),
    )


class WriteLayout(ctypes.Structure):
    """`struct write`."""

    _fields_ = (
        ("number", c_uint64),
        ("at_ns", c_int64),
        ("pid", c_int32),
        ("gpu", c_int32),
        ("op", c_int32),
        ("low", c_uint32),
        ("high", c_uint32),
        ("result", c_int32),
    )


class MachineLayout(ctypes.Structure):
    """`struct machine`: the whole file."""

    _fields_ = (
        ("magic", c_uint64),
        ("nonce", c_uint64),
        ("version", c_uint32),
        ("size", c_uint32),
        ("gpu_count", c_uint32),
        ("cuda_version", c_uint32),
        ("driver", c_uint64),
        ("driver_version", c_char * 32),
        ("nvml_version", c_char * 32),
        ("stop_inside_pid", c_uint32),
        ("faults_active", c_uint32),
        ("write_count", c_uint64),
        ("faults", FaultLayout * FAULTS),
        ("writes", WriteLayout * WRITES),
        ("gpus", Gpu * GPUS),
    )


class Truth(ctypes.Structure):
    """`struct truth`: no part of the file."""

    _fields_ = (
        ("energy_j", c_double),
        ("watts", c_double),
        ("average_w", c_double),
        ("util", c_double),
        ("effective", c_uint64),
        ("reasons", c_uint64),
        ("clock_mhz", c_uint32),
        ("target_mhz", c_uint32),
        ("locked", c_uint32),
        ("low_mhz", c_uint32),
        ("high_mhz", c_uint32),
        ("limit_mw", c_uint32),
        ("enforced_mw", c_uint32),
        ("persistence", c_uint32),
    )


STRUCTURES: dict[str, type[ctypes.Structure]] = {
    "moment": Moment,
    "slot": Slot,
    "part": PartLayout,
    "control": Control,
    "gpu": Gpu,
    "fault": FaultLayout,
    "write": WriteLayout,
    "machine": MachineLayout,
    "truth": Truth,
}
"""By their names in C."""
