"""`throttllem demo`: one simulation that shows the main use."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from throttllem.cli.arguments import Engine, Setting, load
from throttllem.cli.commands.simulate import run_study


def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for report.html.")] = Path("out/demo"),
    engine: Engine = None,
    setting: Setting = None,
) -> None:
    """The main use: half an hour of chat, scaled to full load, on four simulated A100, three policies, a report."""
    loaded = load(setting, flags={"batching.engine": ("--engine", engine)})
    from throttllem.sim.study import MAXIMUM, Study

    study = Study(
        gpu="a100-40gb-sxm",
        model="llama-2-13b",
        sizes=(4,),
        trace="azure-conv-like:seconds=1800",
        policies=("triton", "throttllem", "least-energy"),
        peak_rps=MAXIMUM,
        options=loaded.options,
    )
    run_study(study, loaded, None, out, with_oracle=True)
