"""Runs of several policies side by side, one process each, with progress. Knows nothing of what is run.

Processes are spawned, not forked: the libraries underneath have threads of their own. What comes back is in the order
asked for; an interrupt, or the end of this process, ends every run within moments.
"""

from __future__ import annotations

import functools
import multiprocessing
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from typing import Any

from throttllem.sim.policy import Policy
from throttllem.sim.result import RunResult
from throttllem.sim.scenario import Scenario

Job = tuple[Scenario, Policy]
Progress = Callable[[int, float], None]
"""Called with the index of a job and the share of it that is done (0 to 1)."""

_POLL_S = 0.2
_cells: list[Any] = []  # of a worker process: where it writes the progress of each job, and last whether to stop


def run_all(jobs: Sequence[Job], *, workers: int, progress: Progress = lambda *_: None) -> list[RunResult]:
    """Simulate every job, `workers` at a time; in this process where there is one job or one worker."""
    if workers == 1 or len(jobs) == 1:
        return [
            scenario.run(policy, functools.partial(progress, index)) for index, (scenario, policy) in enumerate(jobs)
        ]
    context = multiprocessing.get_context("spawn")
    cells = [context.Value("d", 0.0, lock=False) for _ in range(len(jobs) + 1)]
    pool = ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context, initializer=_watch, initargs=(cells,))
    try:
        futures = [pool.submit(_run, index, job) for index, job in enumerate(jobs)]
        waiting = set(futures)
        while waiting:
            done, waiting = wait(waiting, timeout=_POLL_S, return_when="FIRST_EXCEPTION")
            for index, cell in enumerate(cells[:-1]):
                progress(index, cell.value)
            if any(future.exception() for future in done):
                break
        return [future.result() for future in futures]
    finally:
        cells[-1].value = 1.0
        pool.shutdown(wait=True, cancel_futures=True)


def _watch(cells: list[Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal interrupts the whole group; the parent passes it on
    _cells[:] = cells


def _run(index: int, job: Job) -> RunResult:
    scenario, policy = job
    return scenario.run(policy, functools.partial(_report, index))


def _report(index: int, share: float) -> None:
    parent = multiprocessing.parent_process()
    if _cells[-1].value or parent is None or not parent.is_alive():
        raise InterruptedError("the run was stopped")
    _cells[index].value = share
