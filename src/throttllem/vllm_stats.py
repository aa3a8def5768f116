"""vLLM's side of exact progress: a stat logger plug-in that sends every engine step to the gateway.

Runs inside vLLM's API server (plug-in group `vllm.stat_logger_plugins`), so it needs vLLM and the standard library
only, and never raises into it. `THROTTLLEM_STATS` is the address: a Unix socket's path, or HOST:PORT of loopback with
`THROTTLLEM_STATS_SECRET`, a file with the secret that it shares with the gateway. The capacities that vLLM does not
report otherwise, and which start of the engine this is, go to its own `/metrics` as `throttllem_engine_info`.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from pathlib import Path
from typing import Any

from prometheus_client import REGISTRY, Gauge
from vllm.v1.metrics.loggers import StatLoggerBase

from throttllem.engines.step_reports import StepStats, parse_address, read_secret

VARIABLE = "THROTTLLEM_STATS"
SECRET_VARIABLE = "THROTTLLEM_STATS_SECRET"
INFO = "throttllem_engine_info"
logger = logging.getLogger("vllm.throttllem")


class StatLogger(StatLoggerBase):  # type: ignore[misc, unused-ignore]
    """Sends the steps of engine `engine_index` of this process; nothing if no address is set."""

    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
        self._config = vllm_config
        self._index = engine_index
        self._boot = time.time_ns()
        self._sequence = 0
        self._step = 0
        self._usage = 0.0
        self._socket: socket.socket | None = None
        self._address: str | tuple[str, int] = ""
        self._secret: bytes | None = None
        self._shown = ""
        """The address as the gateway can compare it: a relative path would be another one there."""
        try:
            self._open(os.environ.get(VARIABLE, ""))
        except (OSError, ValueError) as error:
            logger.warning("throttllem: no steps are sent: %s", error)

    def _open(self, text: str) -> None:
        # Steps of several engines or API servers behind one address are parts that cannot be put together.
        if not text or self._index:
            return
        family, self._address = parse_address(text)
        if family != socket.AF_UNIX:
            if not (file := os.environ.get(SECRET_VARIABLE)):
                raise ValueError(f"{VARIABLE}={text}: over UDP set {SECRET_VARIABLE} to the file of the shared secret")
            self._secret = read_secret(Path(file))
        self._socket = socket.socket(family, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._shown = self._address if isinstance(self._address, str) else text

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        """One step of the engine has ended."""
        if self._socket is None or scheduler_stats is None:
            return
        try:
            datagram = self._stats(scheduler_stats, iteration_stats).pack(self._secret)
            self._socket.sendto(datagram, self._address)
        except OSError:
            # No listener, or a slow one: the next sequence number shows the gap.
            pass
        except Exception:
            logger.exception("throttllem: this vLLM does not report its steps as expected: no more are sent")
            self.close()

    def _stats(self, scheduler: Any, iteration: Any) -> StepStats:
        usage, details = float(scheduler.kv_cache_usage), scheduler.iteration_details
        # A step without tokens computed part of a prompt, or nothing (it only freed the blocks of aborted requests).
        computed = details is not None or iteration is not None or usage > self._usage
        step = self._step if computed else None
        self._sequence, self._step, self._usage = self._sequence + 1, self._step + computed, usage
        prompt_tokens = iteration.prompt_token_stats.computed if iteration is not None else 0
        prefix, speculation = scheduler.prefix_cache_stats, scheduler.spec_decoding_stats
        return StepStats(
            boot=self._boot,
            sequence=self._sequence,
            step=step,
            monotonic_s=time.monotonic(),
            running=scheduler.num_running_reqs,
            waiting=scheduler.num_waiting_reqs + scheduler.num_skipped_waiting_reqs,
            kv_usage=usage,
            prompt_tokens=prompt_tokens if details is None else details.num_ctx_tokens,
            generated_tokens=iteration.num_generation_tokens if iteration is not None else 0,
            preemptions=iteration.num_preempted_reqs if iteration is not None else 0,
            prefix_queries=0 if prefix is None else prefix.queries,
            prefix_hits=0 if prefix is None else prefix.hits,
            drafted_tokens=None if speculation is None else speculation.num_draft_tokens,
            accepted_tokens=None if speculation is None else speculation.num_accepted_tokens,
            decode_sequences=None if details is None else details.num_generation_requests,
            seconds=None if details is None else details.elapsed_ms / 1000,
        )

    def close(self) -> None:
        """Stop sending."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def log_engine_initialized(self) -> None:
        """The engine is up: its capacities are known now."""
        try:
            self._publish_capacities()
        except Exception:
            logger.exception("throttllem: this vLLM does not report its capacities as expected")

    def _publish_capacities(self) -> None:
        if self._index or INFO in REGISTRY._names_to_collectors:
            return
        scheduler = self._config.scheduler_config
        labels = {
            "stats": self._shown,
            "boot": str(self._boot),
            "max_num_seqs": str(scheduler.max_num_seqs),
            "max_num_batched_tokens": str(scheduler.max_num_batched_tokens),
            "chunked_prefill": str(int(scheduler.enable_chunked_prefill)),
            "engines": str(self._config.parallel_config.data_parallel_size),
            "api_servers": str(self._config.parallel_config._api_process_count),
        }
        Gauge(INFO, "Capacities of this engine, for the gateway", list(labels), multiprocess_mode="mostrecent").labels(
            **labels
        ).set(1)
