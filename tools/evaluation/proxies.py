"""What can stand between a client and an engine, each on its own core: nginx, LiteLLM's proxy, this gateway.

Each has one worker, keeps its connections to the engine, and writes no access log.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tools.testbed.gateway import THROTTLLEM
from tools.testbed.processes import Process, answers, free_port, started

READY_S = 90.0
"""LiteLLM takes half a minute on a busy machine."""
LITELLM_KEY = "sk-cost"
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
    litellm_params: {{model: hosted_vllm/{model}, api_base: "{engine}/v1", api_key: none}}
general_settings: {{master_key: {key}}}
litellm_settings: {{telemetry: false, num_retries: 0}}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Proxy:
    """A running one; `process` None: nothing stands between."""

    name: str
    url: str
    process: Process | None = None
    api_key: str | None = None

    def pids(self) -> list[int]:
        """The processes of its group."""
        return [] if self.process is None else self.process.pids()

    def cpu_s(self) -> float:
        """Processor time of the whole group so far."""
        return 0.0 if self.process is None else self.process.cpu_s()


def nginx_binary() -> Path | None:
    """Where nginx is installed; None: nowhere."""
    found = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/bin")
    return None if found is None else Path(found)


@contextmanager
def nginx(binary: Path, engine: str, folder: Path, core: int) -> Iterator[Proxy]:
    """A plain proxy without buffering. `engine`: its URL."""
    port = free_port()
    file = folder / "nginx.conf"
    file.write_text(_NGINX.format(folder=folder, engine=engine.removeprefix("http://"), port=port))
    command: list[str | Path] = [binary, "-c", file, "-p", folder]
    with _up("nginx", command, port, "/v1/models", folder, core) as proxy:
        yield proxy


@contextmanager
def litellm(venv: Path, engine: str, model: str, folder: Path, core: int) -> Iterator[Proxy]:
    """LiteLLM's proxy as its manual has it, one worker, no database."""
    port = free_port()
    file = folder / "litellm.yaml"
    file.write_text(_LITELLM.format(model=model, engine=engine, key=LITELLM_KEY))
    command: list[str | Path] = [venv / "bin/litellm", "--config", file, "--host", "127.0.0.1", "--port", str(port)]
    environment = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR", "NO_PROXY": "127.0.0.1"}
    with _up("LiteLLM", command, port, "/health/readiness", folder, core, environment, LITELLM_KEY) as proxy:
        yield proxy


@contextmanager
def throttllem(flags: Sequence[str], engine: str, folder: Path, core: int) -> Iterator[Proxy]:
    """`throttllem serve` with these flags besides."""
    port = free_port()
    command: list[str | Path] = [THROTTLLEM, "serve", "--engine", engine, "--port", str(port), *flags]
    command += ["--set", f"state_dir={folder / 'state'}"]
    with _up("throttllem", command, port, "/health", folder, core) as proxy:
        yield proxy


@contextmanager
def _up(
    name: str,
    command: Sequence[str | Path],
    port: int,
    ready: str,
    folder: Path,
    core: int,
    environment: Mapping[str, str] | None = None,
    api_key: str | None = None,
) -> Iterator[Proxy]:
    url = f"http://127.0.0.1:{port}"
    with started(
        ["taskset", "-c", str(core), *command],
        folder / f"{name}.log",
        ready=answers(url + ready),
        within_s=READY_S,
        environment=environment,
    ) as process:
        yield Proxy(name=name, url=url, process=process, api_key=api_key)
