"""Gives a real vLLM the speed of a GPU-like engine: each step lasts at least what a simple law says of its batch.

A plug-in of vLLM (`vllm.general_plugins`), found through PYTHONPATH in the folder that `install` fills. Scheduling,
batching, KV cache and API stay vLLM's own; on a few shared cores the steps' time would else be that of whoever else
computes there. Imports the standard library only.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

VARIABLE = "OVERLOAD_PACE"
"""Seconds of every step, of each row that decodes, of each prompt token; separated by commas."""
LAW = (0.015, 0.00035, 0.00007)


def install(folder: Path) -> dict[str, str]:
    """Put the plug-in into a folder; the environment that makes vLLM find it, with the law."""
    return install_plugin(Path(__file__), folder) | {VARIABLE: ",".join(map(str, LAW))}


def install_plugin(file: Path, folder: Path) -> dict[str, str]:
    """Put a module with a `register` into a folder; the environment that makes vLLM call it in its processes."""
    name = file.stem
    described = folder / f"{name}-0.dist-info"
    described.mkdir(parents=True, exist_ok=True)
    shutil.copy(file, folder / file.name)
    (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0\n")
    (described / "entry_points.txt").write_text(f"[vllm.general_plugins]\n{name} = {name}:register\n")
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(paths)}


def register() -> None:
    """Called by vLLM in each of its processes."""
    if VARIABLE not in os.environ:
        return
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner  # noqa: PLC0415

    step_s, row_s, prompt_s = map(float, os.environ[VARIABLE].split(","))
    real = GPUModelRunner.execute_model
    if getattr(real, "paced", False):
        return

    def execute_model(self: Any, scheduler_output: Any, *rest: Any, **named: Any) -> Any:
        began = time.perf_counter()
        done = real(self, scheduler_output, *rest, **named)
        scheduled = scheduler_output.num_scheduled_tokens.values()
        rows = sum(tokens == 1 for tokens in scheduled)
        prompts = scheduler_output.total_num_scheduled_tokens - rows
        if scheduled:
            time.sleep(max(0.0, began + step_s + rows * row_s + prompts * prompt_s - time.perf_counter()))
        return done

    execute_model.paced = True  # type: ignore[attr-defined]
    GPUModelRunner.execute_model = execute_model
