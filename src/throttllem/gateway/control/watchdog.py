"""Whoever waits too long is told so, and engines that say nothing of their steps are given time's own.

Two small loops beside a driver; the bounds are `settings.LimitOptions`.
"""

from __future__ import annotations

import asyncio
import logging
import math
from typing import TYPE_CHECKING

from throttllem.gateway.control import rejections as refusals
from throttllem.gateway.control.backend import Backend
from throttllem.gateway.control.session import Session
from throttllem.gateway.control.ticket import RefusedError

if TYPE_CHECKING:
    from throttllem.gateway.control.loop import ControlLoop

log = logging.getLogger("throttllem.gateway")

_EVERY_S = 0.25
_FOREIGN_S = 1.0
"""So long others must be in an engine before it is said: for a moment, counts may be of different times."""
_UNKNOWN_STEP_S = 0.05
_SHORTEST_STEP_S = 0.005


async def sweep(driver: ControlLoop) -> None:
    """End requests that found no place, or whose engine gives nothing, within the limits."""
    down_since_s = driver.now()
    alone_s: dict[int, float] = {}
    while True:
        await asyncio.sleep(_EVERY_S)
        try:
            if driver.link() is not None:
                down_since_s = driver.now()
            for visit in driver.open():
                if failure := overdue(driver, visit, down_since_s):
                    driver.fail(visit, failure)
            for link in driver.links:
                link.booking.idle()
                link.clock.look()
            alone_s = foreigners(driver, alone_s)
        except Exception:  # the limits must hold after it too
            log.exception("the limits were not looked after this time")


def foreigners(driver: ControlLoop, alone_s: dict[int, float]) -> dict[int, float]:
    """Say in the log when others have come into an engine. `alone_s`: when each engine was seen without them last,
    infinite once it was said; the next one is returned.
    """
    now_s, found = driver.now(), {}
    for view in driver.controller.snapshot().engines:
        found[view.engine] = since_s = now_s if view.external_sequences == 0 else alone_s.get(view.engine, now_s)
        if now_s - since_s >= _FOREIGN_S:
            found[view.engine] = math.inf
            log.warning(
                "engine of TP %d: %d sequences in it are not ours: does another gateway or client use it?",
                view.tp,
                view.external_sequences,
            )
    return found


def overdue(driver: ControlLoop, visit: Session, down_since_s: float) -> RefusedError | None:
    """What ends a request now, None if nothing does. `down_since_s`: when an engine was up last.

    A streamed answer that has begun must go on; before that, and where answers come in one piece, any sign of life of
    the engine will do.
    """
    now_s, limits = driver.now(), driver.limits
    if visit.dispatched_s is None or visit.link is None:
        if now_s - visit.request.arrival_s > limits.queue_wait_s:
            return refusals.waited_too_long(limits.queue_wait_s, driver.retry_after_s())
        if now_s - max(down_since_s, visit.request.arrival_s) > limits.engine_wait_s:
            return refusals.no_engine(next((link.trouble for link in driver.links if link.trouble), None))
        return None
    sign_s = max(visit.link.last_sign_s, visit.dispatched_s)
    if visit.streams and visit.last_token_s is not None:
        sign_s = visit.last_token_s
    return refusals.silent(limits.silence_s) if now_s - sign_s > limits.silence_s else None


async def tick(link: Backend) -> None:
    """Time's own steps for an engine whose progress is not to be seen."""
    step_s = _EVERY_S
    while True:
        await asyncio.sleep(step_s)
        try:
            if link.state == "up" and link.booking.open and link.connected and not link.connected.named:
                link.tick(step_s)
            step_s = _step_s(link)
        except Exception:
            log.exception("engine %s was given no step of time's own", link.name)
            step_s = _EVERY_S


def _step_s(link: Backend) -> float:
    table, clock = link.booking.meter.table, link.booking.meter.reading().clock_mhz
    if not link.booking.open or (link.connected and link.connected.named):
        return _EVERY_S
    if table is None or clock not in table.clocks_mhz:
        return _UNKNOWN_STEP_S
    return max(_SHORTEST_STEP_S, table.at(clock, len(link.booking.open), 1, 0)[0])
