"""`throttllem agent`: beside an engine, reads its GPUs and sets their clocks for a gateway on another host."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def agent(
    secret: Annotated[
        Path, typer.Option("--secret", help="File with the pool's key and certificate, the same as at the gateway.")
    ],
    listen: Annotated[
        str, typer.Option("--listen", metavar="HOST:PORT", help="Address to listen at; port 0: any free one.")
    ] = "127.0.0.1:9440",
    keeper: Annotated[
        Path | None, typer.Option("--keeper", help="Socket of the keeper here; default /run/throttllem/keeper.sock.")
    ] = None,
    zeusd: Annotated[
        Path | None, typer.Option("--zeusd", help="Socket of a zeusd to set clocks through instead.")
    ] = None,
) -> None:
    """Set the clocks of this host's GPUs for a gateway elsewhere, through the keeper here. Needs no rights."""
    import asyncio
    import contextlib
    import logging
    import signal
    from importlib.metadata import version

    from throttllem.agent.messages import Hello
    from throttllem.agent.secured import server_context
    from throttllem.agent.server import Agent
    from throttllem.gpu.hardware import HardwareGpu, Mode
    from throttllem.gpu.keeper_client import SOCKET
    from throttllem.gpu.setters import clock_setter

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    host, _, port = listen.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"--listen {listen}: must be HOST:PORT, as in 10.0.0.7:9440")
    context = server_context(secret)

    def gpu(hello: Hello) -> HardwareGpu:
        setter = clock_setter(keeper=keeper or SOCKET, zeusd=zeusd, ttl_s=hello.ttl_s)
        return HardwareGpu(tuple(hello.gpus), mode=Mode(hello.mode), setter=setter, clocks_mhz=tuple(hello.clocks_mhz))

    async def serve() -> None:
        serving = asyncio.current_task()
        assert serving is not None
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, serving.cancel)
        here = Agent(make_gpu=gpu, version=version("throttllem"))
        with contextlib.suppress(asyncio.CancelledError):
            await here.serve(
                host.strip("[]"), int(port), context, lambda number: typer.echo(f"agent at {host}:{number}")
            )
        typer.echo("stopped: clocks are restored")

    asyncio.run(serve())
