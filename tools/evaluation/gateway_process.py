"""`throttllem serve` as a process of its own: started as a user would, waited for, ended for certain."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tools.engines.vllm_server import end, free_port

READY_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Gateway:
    """One that serves its engine."""

    url: str
    pid: int
    log: Path


@contextmanager
def gateway_process(arguments: Sequence[str], folder: Path, *, module: str | None = None) -> Iterator[Gateway]:
    """`throttllem serve ARGUMENTS` (or a `module` that takes the same) with its state in `folder`.

    Raises RuntimeError with the end of its log if its engine is not up in time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port, log = free_port(), folder / "gateway.log"
    serve = [sys.executable, "-m", module] if module else [str(Path(sys.executable).with_name("throttllem")), "serve"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*serve, "--port", str(port), "--set", f"state_dir={folder / 'state'}", *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"THROTTLLEM_CACHE_DIR": str(folder / "cache")},
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait(process, f"{url}/v1/models", log)
        yield Gateway(url=url, pid=process.pid, log=log)
    finally:
        end(process)


def _wait(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(OSError), urllib.request.urlopen(address, timeout=2) as answer:
            if b'"id"' in answer.read():
                return
        time.sleep(0.1)
    last = log.read_text(errors="replace")[-3000:]
    raise RuntimeError(f"the gateway did not serve its engine in {READY_S:.0f} s; the end of its log:\n{last}")
