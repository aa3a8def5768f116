"""C and Python agree on the file, and the library offers nothing that the real one has not."""

import ctypes
import re
import subprocess
from pathlib import Path

import pynvml
import pytest

from tools.nvml import build
from tools.nvml.layout import MAGIC, STRUCTURES, VERSION
from tools.nvml.machine import Machine, MachineError, PartError, a100, h100


def in_c(folder):
    library, index, value, found = ctypes.CDLL(str(folder / build.NAME)), 0, ctypes.c_size_t(), {}
    library.fake_nvml_layout.restype = ctypes.c_char_p
    while name := library.fake_nvml_layout(index, ctypes.byref(value)):
        found[name.decode()] = value.value
        index += 1
    return found


def test_sizes_and_offsets_are_those_of_c(nvml_library):
    found = in_c(nvml_library)
    assert (found.pop("magic"), found.pop("version")) == (MAGIC, VERSION)
    assert len(found) > 30
    for name, value in found.items():
        _, structure, field = re.fullmatch(r"(struct) (\w+)(?:\.(\w+))?", name).groups()
        ours = STRUCTURES[structure]
        assert value == (getattr(ours, field).offset if field else ctypes.sizeof(ours)), name


def symbols(library):
    command = ["nm", "-D", "--defined-only", str(library / build.NAME)]
    listed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    return {line.split()[-1] for line in listed.splitlines()}


def test_every_symbol_is_one_that_nvidia_ml_py_knows(nvml_library):
    known = set(re.findall(r'_nvmlGetFunctionPointer\("(\w+)"\)', Path(pynvml.__file__).read_text()))
    ours = {name for name in symbols(nvml_library) if not name.startswith("fake_nvml_")}
    assert ours - known == {"nvmlInit_v2"}  # it initialises with flags
    assert not [name for name in ours if re.search(r"Get\w*Locked|MemoryLocked|ApplicationsClock", name)]


def test_the_second_build_is_the_first(nvml_library, tmp_path):
    library = nvml_library
    before = (library / build.NAME).stat().st_mtime_ns
    assert build.library(library) == library
    assert (library / build.NAME).stat().st_mtime_ns == before
    assert not list(library.glob("tmp*"))


def test_a_compiler_that_is_not_there_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build.BuildError, match="install a C compiler"):
        build.library(tmp_path / "lib")


@pytest.mark.parametrize("content", [None, b"", b"garbage" * 1000, "old"])
def test_a_file_that_is_none_of_ours_is_no_driver(content, machine, caller_of, tmp_path):
    file = tmp_path / "other"
    if content == "old":
        content = bytearray(machine.file.read_bytes())
        content[16] += 1  # the version
    if content is not None:
        file.write_bytes(content)
    caller = caller_of(machine, init=False, environment={"FAKE_NVML_STATE": str(file)})
    with pytest.raises(Exception, match="DriverNotLoaded"):
        caller("nvmlInit()")
    assert caller("work(0, 1, 1)") == pynvml.NVML_ERROR_DRIVER_NOT_LOADED
    with pytest.raises(MachineError, match="not a state file"):
        Machine.open(file, library=machine.library_folder)


def test_another_process_opens_the_same_machine(machine):
    with Machine.open(machine.file, library=machine.library_folder) as other:
        machine.gpus[1].work(1, 10)
        assert other.gpus[1].truth.util == 1
        assert other.gpus[0].uuid == machine.gpus[0].uuid != machine.gpus[1].uuid
    with pytest.raises(MachineError, match="closed"):
        other.gpus[0].lock  # noqa: B018


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"busy_w": (100.0,)}, "one per clock"),
        ({"idle_mhz": 211}, "idle_mhz"),
        ({"uuid": "MIG-1"}, "uuid"),
        ({"idle_w": 500.0}, "idle_w"),
        ({"limit_w": 50.0}, "limit_w"),
        ({"switch_ms": (5.0, 1.0)}, "switch_ms"),
        ({"clocks_mhz": (5, 4)}, "ascending"),
    ],
)
def test_a_part_that_cannot_be_is_refused(fields, message):
    with pytest.raises(PartError, match=message):
        a100(1, **fields)


def test_parts_are_those_of_the_catalogue():
    (ampere,), (hopper,) = a100(), h100()
    assert (ampere.clocks_mhz[0], ampere.clocks_mhz[-1], ampere.limit_w) == (210, 1410, 400)
    assert (hopper.clocks_mhz[0], hopper.clocks_mhz[-1], hopper.limit_w) == (345, 1980, 700)
    assert ampere.idle_w < ampere.busy_w[0] < ampere.busy_w[-1] <= 400


def test_at_most_sixteen(nvml_library, tmp_path):
    for count in (0, 17):
        with pytest.raises(MachineError, match="1 to 16"):
            Machine.create(tmp_path / "gpus", a100(1) * count, library=nvml_library)
