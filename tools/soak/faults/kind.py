"""What a kind of fault is, and what those that last have in common."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum

from tools.soak.bed import SoakBed
from tools.soak.evidence import Obstacle
from tools.soak.schedule import Fault

Inject = Callable[[SoakBed, Fault], Awaitable[None]]


class Hurts(Enum):
    """Whose work may fail by it besides the keeper's: then a request may end with an error."""

    NOBODY = "nobody"
    GATEWAY = "gateway"
    ENGINE = "engine"


class Journal(Enum):
    """What it does to the journal."""

    NOTHING = "nothing"
    ONE = "one copy"
    BOTH = "both copies"


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """`lasts_s`: the range that its time is drawn of (None: a moment); `which`, `counts`: what `Fault` may have there.

    `spare`: it needs a GPU that is opted in and not the gateway's. `runs_out`: a lease ends by time in it.
    `ends_keeper`, `ends_gateway`: one may end by itself.
    """

    name: str
    inject: Inject
    lasts_s: tuple[float, float] | None = None
    which: tuple[str, ...] = ("",)
    counts: tuple[int, int] = (1, 1)
    hurts: Hurts = Hurts.NOBODY
    journal: Journal = Journal.NOTHING
    spare: bool = False
    runs_out: bool = False
    ends_keeper: bool = False
    ends_gateway: bool = False


async def lasting(bed: SoakBed, fault: Fault) -> None:
    """Until its time is over, or everything is lifted."""
    with suppress(TimeoutError):
        await asyncio.wait_for(bed.lifting.wait(), fault.for_s)


@contextmanager
def obstacle(bed: SoakBed, what: str, after_s: float = 0.0) -> Iterator[None]:
    """Nobody can restore a GPU in here, nor for `after_s` after it."""
    began_s = time.monotonic()
    try:
        yield
    finally:
        bed.evidence.obstacles.append(Obstacle(began_s=began_s, ended_s=time.monotonic() + after_s, what=what))


async def becomes(bed: SoakBed, what: Callable[[], bool], within_s: float) -> bool:
    """Wait for it, so long at most, and not once everything is lifted."""
    until_s = time.monotonic() + within_s
    while not what():
        if time.monotonic() > until_s or bed.lifting.is_set():
            return False
        await asyncio.sleep(0.005)
    return True
