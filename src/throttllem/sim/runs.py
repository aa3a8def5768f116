"""Runs of several policies side by side, one process each, with progress. Knows nothing of what is run.

Processes are spawned, not forked: the libraries underneath have threads of their own. What comes back is in the order
asked for; an interrupt ends every run and leaves nothing behind.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from multiprocessing.sharedctypes import Synchronized
from typing import Any

from throttllem.sim.policy import Policy
from throttllem.sim.result import RunResult
from throttllem.sim.scenario import Scenario

Job = tuple[Scenario, Policy]
Progress = Callable[[int, float], None]
"""Called with the index of a job and the share of it that is done (0 to 1)."""

_POLL_S = 0.2
_shares: list[Any] = []  # of a worker process: the cells that it writes its progress to


def run_all(jobs: Sequence[Job], *, workers: int, progress: Progress = lambda *_: None) -> list[RunResult]:
    """Simulate every job, `workers` at a time; in this process where there is one job or one worker."""
    if workers == 1 or len(jobs) == 1:
        return [
            scenario.run(policy, lambda share, index=index: progress(index, share))  # type: ignore[misc]
            for index, (scenario, policy) in enumerate(jobs)
        ]
    context = multiprocessing.get_context("spawn")
    shares = [context.Value("d", 0.0, lock=False) for _ in jobs]
    pool = ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context, initializer=_watch, initargs=(shares,))
    try:
        futures = [pool.submit(_run, index, job) for index, job in enumerate(jobs)]
        waiting = set(futures)
        while waiting:
            done, waiting = wait(waiting, timeout=_POLL_S, return_when="FIRST_EXCEPTION")
            for index, share in enumerate(shares):
                progress(index, share.value)
            if any(future.exception() for future in done):
                break
        return [future.result() for future in futures]
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _watch(shares: list[Synchronized[float]]) -> None:
    _shares[:] = shares


def _run(index: int, job: Job) -> RunResult:
    scenario, policy = job
    return scenario.run(policy, lambda share: setattr(_shares[index], "value", share))
