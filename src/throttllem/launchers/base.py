"""What starts and stops engines, as the gateway sees it.

Everything is idempotent by the engine's id, so a gateway that was killed can repeat what it did and finds its engines
again. Knows nothing of requests, clocks or readiness.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
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
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Launched:
    """An engine that runs. `incarnation` names this run of it, as in "pid 4711"; None: it runs already, and this
    launcher neither stops nor watches it. `log` holds its output. `adopted`: an earlier gateway started it.
    """

    engine_id: str
    incarnation: str | None = None
    log: Path | None = None
    adopted: bool = False


class Launcher(Protocol):
    """Engines by id. All methods belong to one event loop; constructors only assign."""

    async def launch(self, command: EngineCommand) -> Launched:
        """Start it unless it runs. One that runs with other words is stopped first. Raises LaunchError."""

    async def stop(self, engine_id: str) -> None:
        """End it with everything that it started; returns when it is gone, at once where nothing runs."""

    async def listed(self) -> tuple[Launched, ...]:
        """The engines that this launcher runs, those of an earlier gateway included."""

    async def watch(self, engine_id: str) -> str:
        """Wait until it has ended; why it did. Returns at once where this launcher runs none."""
