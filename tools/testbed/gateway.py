"""`throttllem` as processes of a testbed: `serve` until a block ends, and commands that run to their end."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tools.testbed.processes import Process, answers, completed, free_port, started

THROTTLLEM = Path(sys.executable).with_name("throttllem")
COMMAND_S = 1800.0
"""A profile of all clocks takes minutes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gateway:
    """A running gateway."""

    url: str
    process: Process


@contextmanager
def gateway(
    arguments: Sequence[str],
    folder: Path,
    *,
    command: Sequence[str | Path] = (THROTTLLEM, "serve"),
    environment: Mapping[str, str] | None = None,
    port: int | None = None,
    ready: tuple[str, bytes] = ("/v1/models", b'"id"'),
) -> Iterator[Gateway]:
    """`throttllem serve ARGUMENTS` with its state, cache and log in `folder`.

    `ready`: a path, and bytes that its answer holds once the gateway is ready. `command` replaces
    `throttllem serve`. Raises ProcessError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port = port or free_port()
    url = f"http://127.0.0.1:{port}"
    path, holding = ready
    with started(
        [*command, "--port", str(port), "--set", f"state_dir={folder / 'state'}", *arguments],
        folder / "gateway.log",
        ready=answers(url + path, holding),
        environment={"THROTTLLEM_CACHE_DIR": str(folder / "cache"), **(environment or {})},
    ) as process:
        yield Gateway(url=url, process=process)


def throttllem(*arguments: str | Path, environment: Mapping[str, str] | None = None) -> str:
    """Run a command of `throttllem` to its end; all that it printed. Raises ProcessError."""
    return "".join(completed([THROTTLLEM, *arguments], within_s=COMMAND_S, environment=environment))
