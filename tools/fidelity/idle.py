"""What a GPU draws while it serves nobody, and what an engine's start costs: catalogue against published figures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl

from throttllem.calibrate.errors import Errors
from throttllem.physics.catalogue import Catalogue
from tools.fidelity.section import ErrorRow, Section, Target

FILE = Path("measured") / "idle_and_switching.csv"
BARE, CONTEXT = "without a context", "with a context"
GPUS = {
    "H100-SXM-80GB": ("h100-80gb-sxm",),
    "A100-80GB": ("a100-80gb-sxm", "a100-80gb-pcie"),
    "A100-SXM4-80GB": ("a100-80gb-sxm",),
    "A100-80GB (DGX)": ("a100-80gb-sxm",),
    "L40S": ("l40s-48gb",),
    "V100": ("v100-16gb-sxm2", "v100-16gb-pcie", "v100-32gb-sxm2", "v100-32gb-pcie"),
    "RTX 6000 Ada": ("rtx-6000-ada-48gb",),
}
STATES = {
    "idle no context": BARE,
    "idle bare": BARE,
    "idle without context": BARE,
    "idle": BARE,
    "idle CUDA context": CONTEXT,
    "idle with ollama context": CONTEXT,
    "idle vLLM loaded SM at 1410 MHz": CONTEXT,
}
PCIE_BARE_W = 32.0
"""A100-40GB PCIe (arXiv 2605.23918)."""
LIMIT = 0.10
START_S = 20.0
"""throttLL'eM: an engine takes more than this to start."""


def section(data: Path, catalogue: Catalogue) -> Section:
    """Idle watts of every GPU of the table beside the catalogue's, and the start's energy."""
    found = [(BARE, "a100-40gb-pcie", PCIE_BARE_W), *_published(data)]
    errors = {
        state: [
            (catalogue.gpu(name).power.bare_idle_w if state == BARE else catalogue.gpu(name).power.idle_w) / watts - 1
            for each, name, watts in found
            if each == state
        ]
        for state in (BARE, CONTEXT)
    }
    worst = Errors.of(np.concatenate([*errors.values()])).worst
    names = ("a100-40gb-sxm", "a100-40gb-pcie", "h100-80gb-sxm", "a40-48gb")
    starts = {name: catalogue.gpu(name).startup_s * catalogue.gpu(name).startup_w / 1e3 for name in names}
    listed = ", ".join(f"{name} {kilojoules:.1f} kJ" for name, kilojoules in starts.items())
    return Section(
        title="Idle, contexts and start",
        text=_TEXT.format(starts=listed, start=START_S),
        rows=tuple(
            ErrorRow(what=f"idle watts {state}", held_out="nothing", errors=Errors.of(off))
            for state, off in errors.items()
        ),
        targets=(
            Target(
                what="idle watts, bare and with a context: worst",
                limit=f"{LIMIT:.0%}",
                found=f"{worst:.1%}",
                met=worst <= LIMIT,
            ),
            Target(
                what="shortest start of an engine",
                limit=f"above {START_S:.0f} s",
                found=f"{min(gpu.startup_s for gpu in catalogue.gpus.values()):.0f} s",
                met=all(gpu.startup_s > START_S for gpu in catalogue.gpus.values()),
            ),
        ),
    )


def _published(data: Path) -> Iterator[tuple[str, str, float]]:
    """State, catalogue name and watts of every row of idle watts; the middle of a range."""
    for gpu, what, value in pl.read_csv(data / FILE).select("gpu", "what", "value").iter_rows():
        if what in STATES:
            watts = float(np.mean([float(end) for end in value.split(" to ")]))
            for name in GPUS[gpu]:
                yield STATES[what], name, watts


_TEXT = """\
Every GPU of the idle table: H100 SXM, A100-80GB, L40S, V100 and RTX 6000 Ada, bare and with a CUDA context where both
are published (arXiv 2605.23918, sgl-project/sglang, ollama, grantwilkins/powertrace-sim, chuyishang/inference-energy),
and 32 W of a bare A100-40GB PCIe. A context adds 13 W (V100) to 66 W (L40S); a started engine adds 2.8 W to it (A100:
80.0 W with a context, 82.8 with vLLM loaded), of which held memory is under 0.02 W/GB. A bare A100-80GB is published
twice, 53.7 and 62.1 W (DGX): the middle ships. Where a context's watts are not published (A100-40GB PCIe, A40, RTX 6000
Ada), those of the nearest GPU are added: modelled.

The start of an engine, per GPU: {starts}; its length is the paper's (more than {start:.0f} s), its watts are modelled
(weights are copied, the cores nearly idle).
"""
