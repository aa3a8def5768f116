"""What a GPU draws while it serves nobody, and what an engine's start costs: catalogue against published figures."""

from __future__ import annotations

from pathlib import Path

from throttllem.calibrate.errors import Errors
from throttllem.physics.catalogue import Catalogue
from tools.fidelity.section import ErrorRow, Section, Target

BARE_W = {"a100-40gb-pcie": 32.0, "h100-80gb-sxm": 71.8}
CONTEXT_W = {"h100-80gb-sxm": 121.7}
"""arXiv 2605.23918. No figure is published of the A100-40GB SXM; its neighbours draw 32 (PCIe) and 62 W (80 GB)."""
START_S = 20.0
"""throttLL'eM: an engine takes more than this to start."""


def section(data: Path, catalogue: Catalogue) -> Section:
    """Idle watts that are published beside the catalogue's, and the start's energy."""
    del data  # the figures are written above
    bare = [catalogue.gpu(name).power.bare_idle_w / watts - 1 for name, watts in BARE_W.items()]
    context = [catalogue.gpu(name).power.idle_w / watts - 1 for name, watts in CONTEXT_W.items()]
    starts = {name: gpu.startup_s * gpu.startup_w / 1e3 for name, gpu in catalogue.gpus.items()}
    listed = ", ".join(f"{name} {kilojoules:.1f} kJ" for name, kilojoules in starts.items())
    return Section(
        title="Idle, contexts and start",
        text=(
            "Taken as published where published: 32 W of an A100-40GB PCIe, 71.8 W of an H100 SXM without a CUDA "
            "context and 121.7 W with one (arXiv 2605.23918). The A100-40GB SXM stands between the PCIe part and the "
            f"A100-80GB (62 W): modelled. The start of an engine, per GPU: {listed}; its length is the paper's "
            f"(more than {START_S:.0f} s), its watts are modelled (weights are copied, the cores nearly idle)."
        ),
        rows=(
            ErrorRow(what="idle watts without a context", held_out="nothing", errors=Errors.of(bare)),
            ErrorRow(what="idle watts with a context", held_out="nothing", errors=Errors.of(context)),
        ),
        targets=(
            Target(
                what="shortest start of an engine",
                limit=f"above {START_S:.0f} s",
                found=f"{min(gpu.startup_s for gpu in catalogue.gpus.values()):.0f} s",
                met=all(gpu.startup_s > START_S for gpu in catalogue.gpus.values()),
            ),
        ),
    )
