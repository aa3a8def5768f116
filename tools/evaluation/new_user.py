"""The way of a new user from an unknown GPU and model to clocks that are set, with the commands of the documentation.

An L40S and a Qwen3-MoE in FP8, known by its config.json alone. The GPU is a fake one, the engine the small server at
its speed; `throttllem` and the keeper are the real ones. Knows nothing of the gateway's modules.
`python -m tools.evaluation.new_user` holds them up and prints the commands.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from throttllem.physics.catalogue import Catalogue
from tools.nvml.machine import Machine
from tools.nvml.part import catalogue_parts
from tools.testbed.engines.physical_engine import physical_engine
from tools.testbed.gateway import THROTTLLEM, gateway
from tools.testbed.keeper import keeper
from tools.testbed.processes import ProcessError
from tools.testbed.report import Section, Table, Workspace

KIND, NAME, SERVED = "l40s-48gb", "NVIDIA L40S", "Qwen/Qwen3-30B-A3B-FP8"
MAX_BATCH = 32
CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
}
"""Of Qwen3-30B-A3B-FP8, as published."""
DOCTOR = ("L40S", "l40s", "keeper")
CHECK = ("ok engine ", "-- engine ", "!!")
ENVIRONMENT = {"COLUMNS": "150", "NO_COLOR": "1"}
WITHIN_S = 1200.0
LOAD_S, STREAMS, OUTPUT_TOKENS = 40.0, 6, 200
TEXT = """\
A new user has a GPU that was never profiled and a model that the catalogue need not know: here an L40S and the
`config.json` of {served}. The GPU is a **fake** one: its watts and the engine's seconds are the physics of the
catalogue's entry, so the prior is right from the start ([Quick against full profile](quick.md) moves it). The engine is
a small server at that speed; commands, keeper and gateway are the real ones. Times are of this run, on a machine with
other work; that of `profile` is the GPU's.

Try it without a GPU: `python -m tools.evaluation.new_user` starts this GPU, keeper and engine, prints the commands for
another terminal, and ends with Ctrl-C.

{steps}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """One step: the command as a user writes it, how long it took, and what of its output matters."""

    what: str
    command: str
    seconds: float
    output: str


class Walk:
    """Runs the commands one after the other in one folder."""

    def __init__(self, folder: Path, machine: Machine, report: Callable[[str], None]) -> None:
        self.folder, self.machine, self._report = folder, machine, report
        self.done: list[Done] = []

    def run(self, what: str, *arguments: str | Path, shown: tuple[str, ...], may_fail: bool = False) -> None:
        """A command of throttllem to its end; `shown`: words of the lines that matter. Raises ProcessError."""
        began_s = time.monotonic()
        environment = {**os.environ, **ENVIRONMENT, "THROTTLLEM_STATE_DIR": str(self.folder / "state")}
        done = subprocess.run(
            [str(part) for part in (THROTTLLEM, *arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=WITHIN_S,
            env={**environment, **self.machine.environment()},
            check=False,
        )
        if done.returncode and not may_fail:
            raise ProcessError(f"{what}: exit status {done.returncode}\n{done.stdout}")
        self.add(what, arguments, time.monotonic() - began_s, done.stdout, shown)

    def add(
        self, what: str, arguments: Sequence[str | Path], seconds: float, said: str, shown: tuple[str, ...]
    ) -> None:
        """A step that is done."""
        lines = [line.strip() for line in said.splitlines() if any(word in line for word in shown)]
        command = " ".join(map(str, ("throttllem", *arguments)))
        command, output = (text.replace(f"{self.folder}/", "") for text in (command, "\n".join(lines)))
        self.done.append(Done(what=what, command=command, seconds=seconds, output=output))
        self._report(f"{what}: {seconds:.0f} s")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A fake GPU with a keeper, and an engine on it that sends its steps to `stats`."""

    machine: Machine
    url: str
    stats: str
    socket: Path
    config: Path


@contextmanager
def fake_place(folder: Path) -> Iterator[Place]:
    """What the commands need, while the context is. Raises ProcessError if it does not start."""
    (part,) = catalogue_parts(KIND, 1, name=NAME, capability=(8, 9), architecture=8, context_keeps_clock=True)
    config = folder / "model/config.json"
    config.parent.mkdir()
    config.write_text(json.dumps(CONFIG))
    with ExitStack() as stack:
        machine = stack.enter_context(Machine.create(folder / "gpus", [part]))
        ranges = {part.uuid: (part.clocks_mhz[0], part.clocks_mhz[-1])}
        up = stack.enter_context(keeper(ranges, folder, environment=machine.environment()))
        url, stats, engine = stack.enter_context(
            physical_engine(machine, part, folder, kind=KIND, model=str(config), served=SERVED, max_batch=MAX_BATCH)
        )
        machine.gpus[0].processes([engine.pid])
        yield Place(machine=machine, url=url, stats=stats, socket=up.socket, config=config)


def section(workspace: Workspace) -> Section:
    """All steps. Raises ProcessError where one fails."""
    with fake_place(workspace.folder) as place:
        walk = Walk(workspace.folder, place.machine, workspace.report)
        _steps(walk, place, "40s" if workspace.quick else None)
    total_s = sum(step.seconds for step in walk.done)
    steps = "\n\n".join(_shown(number, step) for number, step in enumerate(walk.done, 1))
    rows = [(str(number), step.what, f"{step.seconds / 60:.1f}") for number, step in enumerate(walk.done, 1)]
    rows.append(("", "all", f"{total_s / 60:.1f}"))
    return Section(
        title="From an unknown GPU to clocks that are set",
        text=TEXT.format(served=SERVED, steps=steps),
        tables=(Table(caption="Steps and minutes.", head=("", "step", "minutes"), rows=rows),),
        results={"steps": walk.done},
    )


def _shown(number: int, step: Done) -> str:
    return f"**{number}. {step.what}**, {step.seconds:.0f} s\n\n```text\n$ {step.command}\n{step.output}\n```"


def _steps(walk: Walk, place: Place, seconds: str | None) -> None:
    profile, tables = (walk.folder / name for name in ("quick.csv", "engine"))
    measured, served = _measured(place), _served(place)
    walk.run("what is here", "doctor", "--socket", place.socket, "--no-measure", shown=DOCTOR)
    walk.run("dry run before any profile", "serve", *served, "--port", "0", "--check", shown=CHECK, may_fail=True)
    bound = () if seconds is None else ("--seconds", seconds)
    walk.run("quick profile", "profile", profile, "--quick", *measured, *bound, shown=("rows in", "seconds", "note:"))
    walk.run(
        "train",
        "train",
        profile,
        "--out",
        tables,
        shown=("held out", "median", "nothing", "between", "calibrated", "every", "verdict"),
    )
    on = (*served, "--tables", tables, "--clocks", "on")
    walk.run("check", "serve", *on, "--port", "0", "--check", shown=CHECK)
    _serve(walk, on)


def _measured(place: Place) -> tuple[str | Path, ...]:
    engine = ("--gpu", KIND, "--model", place.config, "--gpus", "0")
    return ("--url", place.url, "--stats", place.stats, *engine, "--keeper", place.socket)


def _served(place: Place) -> tuple[str | Path, ...]:
    engine = ("--gpu", KIND, "--model", place.config, "--gpus", "0")
    own = ("--set", f"engines.0.stats={place.stats}", "--set", f"clocks.keeper={place.socket}")
    return ("--engine", place.url, *engine, *own, "--slo-e2e", "30", "--slo-tbt", "0.1")


def _serve(walk: Walk, arguments: tuple[str | Path, ...]) -> None:
    """`serve --clocks on` under a small load, and what its metrics say then."""
    began_s = time.monotonic()
    texts = [str(part) for part in arguments]
    with gateway(texts, walk.folder / "serve", environment=walk.machine.environment()) as up:
        until_s = time.monotonic() + LOAD_S
        with ThreadPoolExecutor(STREAMS) as streams:
            clocks = streams.submit(_clocks, walk.machine, until_s)
            sent = [streams.submit(_requests, up.url, until_s) for _ in range(STREAMS - 1)]
            answered = sum(each.result() for each in sent)
            seen = clocks.result()
        page = urllib.request.urlopen(f"{up.url}/metrics", timeout=10).read().decode()
    top = Catalogue.load().gpu(KIND).clock_max_mhz
    saving = [line for line in page.splitlines() if "saving" in line or "saved" in line]
    said = f"{answered} requests answered; clocks seen: {min(seen)} to {max(seen)} MHz of {top}\n" + "\n".join(
        line for line in saving if not line.startswith("#")
    )
    walk.add("serve, clocks on", ("serve", *arguments), time.monotonic() - began_s, said, ("",))


def _clocks(machine: Machine, until_s: float) -> list[int]:
    found = []
    while time.monotonic() < until_s:
        found.append(machine.gpus[0].clock_mhz)
        time.sleep(0.1)
    return found


def _requests(url: str, until_s: float) -> int:
    """Requests one after the other until then; how many were answered."""
    body = json.dumps({"model": SERVED, "prompt": [100] * 300, "max_tokens": OUTPUT_TOKENS, "stream": True}).encode()
    answered = 0
    while time.monotonic() < until_s:
        request = urllib.request.Request(f"{url}/v1/completions", body, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as reply:
            answered += b"[DONE]" in reply.read()
    return answered


def main() -> None:
    """Print the commands, and hold what they need until Ctrl-C."""
    with tempfile.TemporaryDirectory(prefix="new-user-") as folder, fake_place(Path(folder)) as place:
        state = {"THROTTLLEM_STATE_DIR": f"{folder}/state"}
        variables = (f"{key}={shlex.quote(value)}" for key, value in {**place.machine.environment(), **state}.items())
        tables = ("--tables", "engine")
        print("export", *variables)
        for words in (
            ("doctor", "--socket", place.socket, "--no-measure"),
            ("profile", "quick.csv", "--quick", *_measured(place)),
            ("train", "quick.csv", "--out", "engine"),
            ("serve", *_served(place), *tables, "--check"),
            ("serve", *_served(place), *tables, "--clocks", "on"),
        ):
            print(THROTTLLEM, *map(str, words), flush=True)
        with suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
