"""The real Triton server on free ports of loopback, serving `triton_model.py` as `ensemble`, for tests and evaluations.

The binary and its Python backend come from the `nvidia-pytriton` package in a virtual environment of their own. The
server is a process group that is ended for certain when the block is left.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tools.testbed.processes import Process, answers, free_ports, started

MODEL = "ensemble"
READY_S = 60.0
INPUTS = (
    ("text_input", "STRING", "-1", False),
    ("max_tokens", "UINT32", "-1", False),
    ("stop_words", "STRING", "-1", True),
    ("bad_words", "STRING", "-1", True),
    ("stream", "BOOL", "1", True),
    ("temperature", "FP32", "1", True),
    ("top_k", "UINT32", "1", True),
    ("top_p", "FP32", "1", True),
    ("min_length", "UINT32", "1", True),
    ("presence_penalty", "FP32", "1", True),
    ("repetition_penalty", "FP32", "1", True),
    ("random_seed", "UINT64", "1", True),
)
"""Those of TensorRT-LLM's ensemble that the model takes: name, type, dims, optional."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Triton:
    """A running server."""

    url: str
    metrics_url: str
    process: Process


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpeed:
    """How fast the model runs and how much it holds; `row_s` is added per request of the batch."""

    step_s: float = 0.01
    row_s: float = 0.0
    max_rows: int = 32
    kv_blocks: int = 1024
    block_tokens: int = 64


def model_config(speed: ModelSpeed) -> str:
    """The model's config.pbtxt."""
    inputs = ",\n".join(
        f'  {{ name: "{name}" data_type: TYPE_{kind} dims: [ {dims} ]{" optional: true" if optional else ""} }}'
        for name, kind, dims, optional in INPUTS
    )
    settings = {name: getattr(speed, name) for name in ("step_s", "row_s", "max_rows", "kv_blocks", "block_tokens")}
    parameters = "".join(
        f'parameters {{ key: "{key}" value: {{ string_value: "{value}" }} }}\n'
        for key, value in (*settings.items(), ("batch_scheduler_policy", "guaranteed_no_evict"))
    )
    return (
        f'name: "{MODEL}"\nbackend: "python"\nmax_batch_size: {speed.max_rows}\n'
        f'input [\n{inputs}\n]\noutput [ {{ name: "text_output" data_type: TYPE_STRING dims: [ -1 ] }} ]\n'
        f"model_transaction_policy {{ decoupled: true }}\ndynamic_batching {{ }}\n"
        f"instance_group [ {{ kind: KIND_CPU count: 1 }} ]\n{parameters}"
    )


def pytriton_folder(environment: Path) -> Path:
    """Where the package is in a virtual environment. Raises FileNotFoundError with what to do."""
    for folder in environment.glob("lib/python3.*/site-packages/pytriton"):
        return folder
    raise FileNotFoundError(f"{environment}: holds no nvidia-pytriton; `make engines` installs it")


@contextmanager
def triton(environment: Path, folder: Path, speed: ModelSpeed | None = None) -> Iterator[Triton]:
    """Start it with its files in `folder`, wait until the model is ready, end it. Raises ProcessError."""
    package = pytriton_folder(environment)
    _lay_out(folder, package, speed or ModelSpeed())
    port, metrics_port = free_ports(2)
    shared = f"triton-{port}"
    url = f"http://127.0.0.1:{port}"
    try:
        with started(
            [
                package / "tritonserver/bin/tritonserver",
                f"--model-repository={folder / 'models'}",
                f"--backend-directory={folder / 'backends'}",
                f"--backend-config=python,shm-region-prefix-name={shared}",
                *("--http-address=127.0.0.1", f"--http-port={port}", f"--metrics-port={metrics_port}"),
                *("--allow-grpc=false", "--allow-gpu-metrics=false", "--exit-timeout-secs=2"),
            ],
            folder / "triton.log",
            ready=answers(f"{url}/v2/models/{MODEL}/ready"),
            environment=_environment(environment, package),
        ) as process:
            yield Triton(url=url, metrics_url=f"http://127.0.0.1:{metrics_port}/metrics", process=process)
    finally:
        for region in Path("/dev/shm").glob(f"{shared}*"):
            region.unlink(missing_ok=True)


def _lay_out(folder: Path, package: Path, speed: ModelSpeed) -> None:
    version = package.parent.parent.name.removeprefix("python")
    backend = folder / "backends/python"
    backend.mkdir(parents=True)
    for name in ("libtriton_python.so", "triton_python_backend_utils.py"):
        shutil.copy(package / "tritonserver/backends/python" / name, backend)
    shutil.copy(package / "tritonserver/python_backend_stubs" / version / "triton_python_backend_stub", backend)
    (folder / f"models/{MODEL}/1").mkdir(parents=True)
    shutil.copy(Path(__file__).with_name("triton_model.py"), folder / f"models/{MODEL}/1/model.py")
    (folder / f"models/{MODEL}/config.pbtxt").write_text(model_config(speed))


def _environment(environment: Path, package: Path) -> dict[str, str]:
    # The stub is linked against the interpreter's shared library, which a virtual environment does not hold.
    prefix = (environment / "bin/python").resolve().parent.parent
    libraries = [prefix / "lib", package.parent / "nvidia_pytriton.libs", os.environ.get("LD_LIBRARY_PATH", "")]
    return {
        "PATH": f"{environment.absolute() / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}",
        "LD_LIBRARY_PATH": os.pathsep.join(str(path) for path in libraries if str(path)),
        "VIRTUAL_ENV": str(environment.absolute()),
    }
