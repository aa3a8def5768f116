"""One virtual environment per engine, with pinned versions, beside the project's own. A stamp marks a complete one."""

from __future__ import annotations

import hashlib
import subprocess
import tempfile
import time
import venv
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
ENVIRONMENTS = ("vllm", "triton", "clients", "litellm", "ray")
STAMP = ".installed"
UNWANTED = ("torchvision", "torchaudio", "torchcodec", "triton")
"""What vLLM's CPU build pulls in and cannot import beside CPU torch."""
EMPTY_VLLM = """\
[project]
name = "vllm"
version = "0.32.0+cpu"
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[tool.setuptools]
packages = []
"""
"""vLLM's command asks for its own distribution by this name; the CPU build has another."""


class InstallError(Exception):
    """An environment that could not be made, with the installer's last words."""


def install(name: str, into: Path) -> Path:
    """The environment `into/name`, made if its stamp does not match the pins. Raises InstallError."""
    folder, requirements = into.resolve() / name, HERE / f"{name}.txt"
    stamp, wanted = (
        folder / STAMP,
        hashlib.sha256(requirements.read_bytes() + f"{EMPTY_VLLM}{ROOT}".encode()).hexdigest(),
    )
    if stamp.is_file() and stamp.read_text().strip() == wanted:
        print(f"{name}: is there, {folder}", flush=True)
        return folder
    began = time.monotonic()
    print(f"{name}: makes {folder} (this takes a minute or two)", flush=True)
    stamp.unlink(missing_ok=True)
    venv.EnvBuilder(with_pip=True, clear=folder.exists() and not folder.is_symlink()).create(folder)
    _pip(folder, "install", "--requirement", str(requirements))
    if name == "vllm":
        _finish_vllm(folder)
    stamp.write_text(wanted + "\n")
    print(f"{name}: ready in {time.monotonic() - began:.0f} s", flush=True)
    return folder


def _finish_vllm(folder: Path) -> None:
    _pip(folder, "uninstall", "--yes", *UNWANTED)
    with tempfile.TemporaryDirectory() as empty:
        (Path(empty) / "pyproject.toml").write_text(EMPTY_VLLM)
        _pip(folder, "install", "--no-deps", "--no-build-isolation", empty)
    # The plug-in; it needs nothing else of the project's dependencies.
    _pip(folder, "install", "--no-deps", "--no-build-isolation", "--editable", str(ROOT))


def _pip(folder: Path, *arguments: str) -> None:
    print(f"  pip {' '.join(arguments)}", flush=True)
    command = [str(folder / "bin/python"), "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = "\n".join((done.stderr or done.stdout).strip().splitlines()[-15:])
        raise InstallError(f"pip {' '.join(arguments)} failed:\n{last}")
