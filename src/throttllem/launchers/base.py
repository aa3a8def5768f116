"""What starts and stops engines, as the gateway sees it.

Everything is idempotent by the engine's id, so a gateway that was killed can repeat what it did and finds its engines
again. Knows nothing of requests, clocks or readiness.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol


class LaunchError(Exception):
    """An engine cannot be started or stopped; the message says why and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineCommand:
    """What shall run under an id: the words of its command, variables in addition to the gateway's own, and the port
    of this host that it will listen on.
    """

    engine_id: str
    words: tuple[str, ...]
    host: str
    port: int
    gpus: int = 0
    """Its GPUs, where the launcher chooses them."""
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Launched:
    """An engine that runs. `incarnation` names this run of it, as in "pid 4711"; None: it runs already, and this
    launcher neither stops nor watches it. `log` is the file with its output, or the command that shows it. `adopted`:
    it ran before it was asked for.
    """

    engine_id: str
    incarnation: str | None = None
    log: str | None = None
    adopted: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """Why an engine runs no more. Not `certain`: the launcher has lost sight of it, and it may run on."""

    why: str
    certain: bool


NOT_RUN = Ended(why="it is not run by this launcher", certain=False)


class Launcher(Protocol):
    """Engines by id. All methods belong to one event loop; constructors only assign."""

    async def launch(self, command: EngineCommand) -> Launched:
        """Start it unless it runs. One that runs with other words is stopped first. Raises LaunchError."""

    async def stop(self, engine_id: str) -> None:
        """End it with everything that it started; returns when it is gone, at once where nothing runs.

        Raises LaunchError.
        """

    async def listed(self) -> tuple[Launched, ...]:
        """The engines that this launcher runs, those of an earlier gateway included. Raises LaunchError."""

    async def watch(self, engine_id: str) -> Ended:
        """Wait until it has ended. Returns at once where this launcher runs none."""
