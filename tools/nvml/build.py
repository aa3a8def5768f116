"""Compiles libnvidia-ml.so.1 once per folder and state of the sources. Needs a C compiler named cc."""

from __future__ import annotations

import hashlib
import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
NAME = "libnvidia-ml.so.1"
SOURCES = ("machine.c", "nvml.c")
# Nothing but NVML's names and fake_nvml_* is to be seen: a call that we lack must not be found. The soname is the real
# one's: where a process has loaded this file by its path, nvidia-ml-py finds it by its name.
WARNINGS = ("-Wall", "-Wextra", "-Werror")
FLAGS = ("-shared", "-fPIC", "-O2", *WARNINGS, "-pthread", "-fvisibility=hidden", f"-Wl,-soname,{NAME}")


class BuildError(Exception):
    """The compiler is missing or refused the sources; with its output."""


def library(folder: Path) -> Path:
    """`folder`, which then holds libnvidia-ml.so.1. Raises BuildError.

    Several processes may build at once: each renames a whole library into place, and the stamp after it.
    """
    stamp, wanted = folder / f"{NAME}.stamp", _state()
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted and (folder / NAME).is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        made = Path(place) / NAME
        command = ["cc", *FLAGS, *(str(HERE / source) for source in SOURCES), "-o", str(made), "-lm"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise BuildError(f"{command[0]}: {error}; install a C compiler (gcc or clang)") from error
        if done.returncode:
            raise BuildError(f"{' '.join(command)}:\n{done.stderr}")
        made.replace(folder / NAME)
        made.with_suffix(".stamp").write_text(wanted, encoding="utf-8")
        made.with_suffix(".stamp").replace(stamp)
    return folder


def _state() -> str:
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for file in (*SOURCES, "machine.h"):
        digest.update((HERE / file).read_bytes())
    return digest.hexdigest()
