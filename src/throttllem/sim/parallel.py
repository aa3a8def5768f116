"""Tasks side by side in processes, with progress and a prompt end.

Processes are spawned, not forked: the libraries underneath have threads. Knows nothing of what a task does.
"""

# How a task ends early. The parent holds the writing end of a pipe, each worker the reading end. When the parent closes
# its end (a failure, an interrupt) or dies, the worker's watch thread reads the end of the file and signals its own
# process, so the task is unwound and removes what it has half written. A worker that waits for a task ends at once; one
# that cannot be interrupted is ended after GRACE_S.

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from contextlib import suppress
from contextvars import ContextVar
from multiprocessing.connection import Connection
from typing import Any, TypeVar

T = TypeVar("T")
Task = Callable[[Callable[[float], None]], T]
"""Receives a function to report the share of itself that is done."""
Progress = Callable[[int, float], None]
"""Called with the index of a task and the share of it that is done (0 to 1)."""

POLL_S = 0.2
GRACE_S = 2.0

_SHARES: ContextVar[Any] = ContextVar("shares")
_PARENT: ContextVar[Connection] = ContextVar("parent")


def side_by_side(tasks: Sequence[Task[T]], *, workers: int, progress: Progress = lambda *_: None) -> list[T]:
    """The results of the tasks in their order, `workers` at a time; in this process where there is one task or worker.

    Every task ends with a share of 1. Raises the exception of the first task that fails, and ends all others.
    """
    if workers == 1 or len(tasks) <= 1:
        return [_finished(task, functools.partial(progress, index)) for index, task in enumerate(tasks)]
    context = multiprocessing.get_context("spawn")
    shares, (reader, writer) = context.RawArray("d", len(tasks)), context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(min(workers, len(tasks)), context, initializer=_start, initargs=(shares, reader))
    try:
        futures = [pool.submit(_run, index, task) for index, task in enumerate(tasks)]
        waiting = set(futures)
        while waiting:
            done, waiting = wait(waiting, timeout=POLL_S, return_when=FIRST_EXCEPTION)
            for index, share in enumerate(shares):
                progress(index, share)
            for future in done:
                future.result()
        return [future.result() for future in futures]
    finally:
        writer.close()
        pool.shutdown(cancel_futures=True)
        reader.close()


def _finished(task: Task[T], report: Callable[[float], None]) -> T:
    result = task(report)
    report(1.0)
    return result


def _start(shares: Any, parent: Connection) -> None:
    """Prepare a worker."""
    _SHARES.set(shares)
    _PARENT.set(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal interrupts the whole group; the parent ends the workers
    signal.signal(signal.SIGTERM, _stop)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _stop(*_: object) -> None:
    """Unwind the task. Once: a second signal must not interrupt its cleaning up."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise SystemExit(1)


def _run(index: int, task: Task[T]) -> T:
    if _PARENT.get().poll():  # the end came while this task was in the queue
        raise SystemExit(1)
    return _finished(task, functools.partial(_SHARES.get().__setitem__, index))


def _end_with(parent: Connection) -> None:
    """End this process when the parent closes its end of the pipe or dies."""
    with suppress(EOFError):
        parent.recv_bytes()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_S)
    os._exit(1)
