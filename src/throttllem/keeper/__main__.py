"""The keeper's process, from its start to its end. It runs as root, and loads only what it needs for that."""

import asyncio
import logging
import os
import signal
import time
from pathlib import Path
from typing import Any

from throttllem.files import hold_dir
from throttllem.gpu.nvml import Nvml
from throttllem.keeper import systemd
from throttllem.keeper.folder import UnsafeError, open_folder
from throttllem.keeper.journal import Journal, boot_id, journal_paths
from throttllem.keeper.leases import SWEEP_S, Leases
from throttllem.keeper.log import RateLimit, log
from throttllem.keeper.options import Options, parse_options
from throttllem.keeper.server import Server

# How the keeper starts and ends
#
# Start: hold the folder of the socket (there is one keeper at a time), open NVML, restore the GPUs in the journal, then
# listen. systemd starts it again 0.1 s after every end but `systemctl stop`.
#
# Therefore an error that was not expected is not handled but ends the process: the next keeper starts from the journal,
# which is correct at any moment, and this one's state may not be. The same holds for a keeper that hangs: it reports to
# systemd with each sweep, and is killed when that stops for WatchdogSec.
#
# The end is always `os._exit`. An orderly exit of Python waits for the threads of all GPUs, and a call that hangs in
# the driver may never return.

RESTORE_S = 5.0
"""How long a keeper that is stopped waits for GPUs to be restored; those that are not stay in the journal."""
PAUSE_S = 1.0
"""The pause before a keeper that cannot start ends: systemd would restart it ten times a second."""


async def keep(options: Options, nvml: Nvml, boot: str, stop: asyncio.Event) -> None:
    """Serve until `stop`; then restore every GPU."""
    leases = Leases(
        nvml, options.allowed, options.baselines, Journal(journal_paths(options.state, options.socket), boot)
    )
    leases.restore(leases.restore_to)
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)

    server = Server(leases, options.uids)
    sweeping = asyncio.ensure_future(sweep_for_ever(leases))
    listening = asyncio.ensure_future(server.listen(options.socket, stop))
    ended, _ = await asyncio.wait([sweeping, listening], return_when=asyncio.FIRST_COMPLETED)

    leases.stop()
    server.disconnect_holders()
    await asyncio.wait([*ended, *leases.restoring.values()], timeout=RESTORE_S)
    await asyncio.gather(*ended)  # raises what ended them, if it was not `stop`


async def sweep_for_ever(leases: Leases) -> None:
    """End leases that have expired, and report to systemd that the event loop runs."""
    while True:
        leases.sweep()
        systemd.notify(systemd.ALIVE)
        await asyncio.sleep(SWEEP_S)


def end_process(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """The event loop's handler of errors that no code has caught. An OSError is one connection's; any other is a bug,
    or a lack of memory or threads, and the next keeper does better.
    """
    if not isinstance(context.get("exception"), OSError):
        try:
            log.critical("the keeper ends: %s", context)
        finally:  # also when there is no memory for the log
            os._exit(1)


def _make(folder: Path) -> None:
    """Make a folder where absent. Raises UnsafeError; any other failure is none yet: one copy of the journal is enough,
    and without the socket's folder there is no start.
    """
    try:
        with open_folder(folder, make=True):
            pass
    except UnsafeError:
        raise
    except OSError as error:
        log.warning("%s: %s", folder, error)


def main(arguments: list[str] | None = None) -> None:
    """Run the keeper; does not return."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    log.addFilter(RateLimit())
    options = parse_options(arguments)
    try:
        os.umask(0o022)
        for folder in (options.socket.parent, options.state):
            _make(folder)
        if hold_dir(options.socket.parent) is None:
            raise OSError(f"{options.socket.parent}: another keeper runs there")
        with Nvml() as nvml, asyncio.Runner() as runner:
            runner.get_loop().set_exception_handler(end_process)
            runner.run(keep(options, nvml, boot_id(), asyncio.Event()))
            os._exit(0)
    except Exception as error:
        log.error("%s", error, exc_info=not isinstance(error, OSError))
        time.sleep(PAUSE_S)
        os._exit(1)


if __name__ == "__main__":
    main()
