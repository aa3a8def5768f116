"""Tasks side by side, one process each, with progress: runs of policies, or whatever else can be pickled.

Processes are spawned, not forked: the libraries underneath have threads of their own. A failure, an interrupt or the
end of this process ends every task within moments, whether it reports its progress or not: a thread of each worker
looks out for the stop and interrupts what runs there.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from types import FrameType
from typing import Any, ClassVar, TypeVar

from throttllem.core.clocks.policy import Policy
from throttllem.sim.result import RunResult
from throttllem.sim.scenario import Scenario

T = TypeVar("T")
Job = tuple[Scenario, Policy]
Progress = Callable[[int, float], None]
"""Called with the index of a task and the share of it that is done (0 to 1)."""
Task = Callable[[Callable[[float], None]], T]
"""Takes what it may call with the share of itself that is done."""

_POLL_S = 0.2


def run_all(jobs: Sequence[Job], *, workers: int, progress: Progress = lambda *_: None) -> list[RunResult]:
    """Simulate every job, `workers` at a time."""
    tasks = [functools.partial(scenario.run, policy) for scenario, policy in jobs]
    return side_by_side(tasks, workers=workers, progress=progress)


def side_by_side(tasks: Sequence[Task[T]], *, workers: int, progress: Progress = lambda *_: None) -> list[T]:
    """What the tasks return, in their order, `workers` at a time; in this process where there is one task or worker.

    Every task ends with a share of 1. Raises what the first task to fail raised.
    """
    if workers == 1 or len(tasks) <= 1:
        return [_here(task, functools.partial(progress, index)) for index, task in enumerate(tasks)]
    with _pool(min(workers, len(tasks)), len(tasks)) as (pool, shares):
        futures = [pool.submit(_Worker.run, index, task) for index, task in enumerate(tasks)]
        waiting = set(futures)
        while waiting:
            done, waiting = wait(waiting, timeout=_POLL_S, return_when="FIRST_EXCEPTION")
            for index, share in enumerate(shares):
                progress(index, share)
            for future in done:
                future.result()
        return [future.result() for future in futures]


def _here(task: Task[T], report: Callable[[float], None]) -> T:
    result = task(report)
    report(1.0)
    return result


@contextlib.contextmanager
def _pool(workers: int, tasks: int) -> Iterator[tuple[ProcessPoolExecutor, Any]]:
    """Processes that end with the block, whatever ends it, and the shares that their tasks report."""
    context = multiprocessing.get_context("spawn")
    shares, stop = context.RawArray("d", tasks), context.RawValue("b", 0)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_Worker.start, initargs=(shares, stop))
    try:
        yield pool, shares
    finally:
        stop.value = 1
        pool.shutdown(wait=True, cancel_futures=True)


class _Worker:
    """This process, where it is a worker; bound as it starts, used by nobody else."""

    shares: ClassVar[Any]
    stop: ClassVar[Any]
    busy: ClassVar[bool] = False

    @classmethod
    def start(cls, shares: Any, stop: Any) -> None:
        """Bind what is shared with the parent, and look out for the stop."""
        cls.shares, cls.stop = shares, stop
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal interrupts the whole group; the parent passes it on
        signal.signal(signal.SIGTERM, cls.interrupt)
        threading.Thread(target=cls.watch, daemon=True).start()

    @classmethod
    def run(cls, index: int, task: Task[T]) -> T:
        """One task. One that was already on its way when the stop came is not begun."""
        cls.busy = True
        try:
            if cls.stop.value:
                raise KeyboardInterrupt
            return _here(task, functools.partial(cls.shares.__setitem__, index))
        finally:
            cls.busy = False

    @classmethod
    def interrupt(cls, _signal: int, _frame: FrameType | None) -> None:
        """Between tasks there is nothing to end, and the pool ends the process itself."""
        if cls.busy:
            raise KeyboardInterrupt

    @classmethod
    def watch(cls) -> None:
        """Interrupt the task, as a signal from outside would, once the parent says so or is gone."""
        parent = multiprocessing.parent_process()
        assert parent is not None, "a worker has one"
        while not cls.stop.value and parent.is_alive():
            time.sleep(_POLL_S)
        cls.stop.value = 1
        os.kill(os.getpid(), signal.SIGTERM)
        while cls.busy:
            time.sleep(_POLL_S)
        if not parent.is_alive():
            os._exit(1)  # nobody is left to end the pool, whose queue would wait for ever
