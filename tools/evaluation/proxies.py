"""What can stand between a client and an engine, started alone on a core of its own: nginx, LiteLLM's proxy, this
gateway. Each has one worker, keeps its connections to the engine, and writes no access log.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tools.engines.vllm_server import end, free_port

READY_S = 90.0
"""LiteLLM takes half a minute on a busy machine."""
LITELLM_KEY = "sk-cost"
Say = Callable[[str], None]
_TICK_S = 1.0 / os.sysconf("SC_CLK_TCK")
_NGINX = """\
worker_processes 1;
daemon off;
pid {folder}/nginx.pid;
error_log {folder}/nginx.log;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
    upstream engine {{ server {engine}; keepalive 256; }}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://engine; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off;
        }}
    }}
}}
"""
_LITELLM = """\
model_list:
  - model_name: {model}
    litellm_params: {{model: hosted_vllm/{model}, api_base: "http://{engine}/v1", api_key: none}}
general_settings: {{master_key: {key}}}
litellm_settings: {{telemetry: false, num_retries: 0}}
"""


class ProxyError(Exception):
    """One that did not come up, with the end of its log."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Proxy:
    """One that is up; `pid` leads its group (None: nothing stands between)."""

    name: str
    url: str
    pid: int | None = None
    api_key: str | None = None

    def pids(self) -> list[int]:
        """The processes of the group."""
        return [] if self.pid is None else _group(self.pid)

    def cpu_s(self) -> float:
        """Processor time of the whole group so far."""
        return sum(_used_s(pid) for pid in self.pids())


@contextmanager
def nginx(binary: Path, engine: str, folder: Path, core: int) -> Iterator[Proxy]:
    """A plain proxy. `engine`: HOST:PORT."""
    port = free_port()
    file = folder / "nginx.conf"
    file.write_text(_NGINX.format(folder=folder, engine=engine, port=port))
    with _up("nginx", [str(binary), "-c", str(file), "-p", str(folder)], port, "/v1/models", folder, core) as proxy:
        yield proxy


@contextmanager
def litellm(venv: Path, engine: str, model: str, folder: Path, core: int) -> Iterator[Proxy]:
    """LiteLLM's proxy as its manual has it, one worker, no database."""
    port = free_port()
    file = folder / "litellm.yaml"
    file.write_text(_LITELLM.format(model=model, engine=engine, key=LITELLM_KEY))
    command = [str(venv / "bin/litellm"), "--config", str(file), "--host", "127.0.0.1", "--port", str(port)]
    environment = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR", "NO_PROXY": "127.0.0.1"}
    ready = "/health/readiness"
    with _up("LiteLLM", command, port, ready, folder, core, environment, LITELLM_KEY) as proxy:
        yield proxy


@contextmanager
def gateway(flags: Sequence[str], engine: str, folder: Path, core: int, name: str = "throttllem") -> Iterator[Proxy]:
    """`throttllem serve` with these flags besides, its state in `folder`."""
    port = free_port()
    command = [str(Path(sys.executable).parent / "throttllem"), "serve", "--engine", f"http://{engine}"]
    command += ["--port", str(port), "--set", f"state_dir={folder / 'state'}", *flags]
    with _up(name, command, port, "/health", folder, core) as proxy:
        yield proxy


@contextmanager
def _up(
    name: str,
    command: list[str],
    port: int,
    ready: str,
    folder: Path,
    core: int,
    environment: Mapping[str, str] | None = None,
    api_key: str | None = None,
) -> Iterator[Proxy]:
    log = folder / f"{name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["taskset", "-c", str(core), *command],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | dict(environment or {}),
            start_new_session=True,
        )
    try:
        wait(process, f"http://127.0.0.1:{port}{ready}", log)
        yield Proxy(name=name, url=f"http://127.0.0.1:{port}", pid=process.pid, api_key=api_key)
    finally:
        end(process)


def wait(process: subprocess.Popen[bytes], url: str, log: Path | None) -> None:
    """Until it answers at `url`. Raises ProxyError with the end of its log."""
    until_s = time.monotonic() + READY_S
    while process.poll() is None and time.monotonic() < until_s:
        with suppress(OSError, urllib.error.URLError):
            urllib.request.urlopen(url, timeout=2).close()
            return
        time.sleep(0.1)
    last = [] if log is None else log.read_text(errors="replace").splitlines()[-20:]
    raise ProxyError("\n".join([f"{process.args!r} is not ready ({process.poll()})", *last]))


def _group(leader: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            # pid (command) state parent group ...; a command may hold spaces and brackets.
            if int(stat.read_text().rpartition(")")[2].split()[2]) == leader:
                found.append(int(stat.parent.name))
    return found


def _used_s(pid: int) -> float:
    with suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) * _TICK_S
    return 0.0
