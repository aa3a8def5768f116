"""How far a long command has come: bars while stderr is a terminal, else a line now and then.

Knows no command.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EVERY_S = 10.0
"""Time before the first line of a command whose stderr is no terminal, and between two lines."""


class Progress:
    """Called with what is being done, the share that is done (0 to 1), and the bar to show it on.

    One bar is enough for work that is done in turn; work that runs in parallel has a bar each.
    """

    def __init__(self, show: Callable[[str, str, float], None]) -> None:
        self._show = show

    def __call__(self, what: str, share: float, bar: str = "") -> None:
        """Show it."""
        self._show(bar, what, share)


@contextmanager
def progress(first: str, *, quiet: bool = False) -> Iterator[Progress]:
    """Progress of the block, which begins with `first`."""
    if quiet:
        yield Progress(lambda *_: None)
    elif sys.stderr.isatty():
        with _bars() as show:
            show("", first, 0.0)
            yield Progress(show)
    else:
        yield Progress(_Lines())


@contextmanager
def _bars() -> Iterator[Callable[[str, str, float], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description:>28}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Bars(*columns, console=Console(stderr=True)) as bars:
        tasks = {}

        def show(bar: str, what: str, share: float) -> None:
            if bar not in tasks:
                tasks[bar] = bars.add_task(what, total=1.0)
            bars.update(tasks[bar], description=what, completed=share)

        yield show


class _Lines:
    """A line about all bars at most every `EVERY_S`, none for a command that is shorter."""

    def __init__(self) -> None:
        self._last_s = time.monotonic()
        self._bars: dict[str, tuple[str, float]] = {}

    def __call__(self, bar: str, what: str, share: float) -> None:
        self._bars[bar] = (what, share)
        if time.monotonic() - self._last_s < EVERY_S:
            return
        self._last_s = time.monotonic()
        running = [f"{what} {share:.0%}" for what, share in self._bars.values() if share < 1.0]
        if running:
            print(", ".join(running), file=sys.stderr, flush=True)  # noqa: T201
