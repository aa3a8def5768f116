"""What Prometheus scrapes: the gateway's status as it is at the scrape, and histograms of what happened since.

Base units, `throttllem_` in front; names of OpenTelemetry's GenAI conventions (semantic-conventions-genai, metrics)
where one exists, with their buckets. Labels are engines, models, states and the like, never callers or requests.
Every metric stands in docs/metrics.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from throttllem.gateway.telemetry.measures import StatusCollector
from throttllem.gateway.telemetry.status import GatewayStatus

PROVIDER = "throttllem"
_REQUEST_S = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
_TTFT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
# The convention begins at 10 ms, where many engines on new GPUs have ended already.
_TBT_S = (0.0025, 0.005, 0.0075, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_TOKENS = tuple(float(4**power) for power in range(14))
_QUEUE_S = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_JOULES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10000.0, 30000.0)
_DECISION_S = (0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1)
_GEN_AI = ("gen_ai_operation_name", "gen_ai_provider_name", "gen_ai_request_model")

Operation = Literal["chat", "text_completion"]


def metrics_page(status: GatewayStatus, histograms: Histograms | None = None) -> tuple[str, bytes]:
    """The content type and the body of `/metrics`."""
    registry = CollectorRegistry()
    registry.register(StatusCollector(status))
    if histograms is not None:
        registry.register(histograms)
    return CONTENT_TYPE_PLAIN_0_0_4, generate_latest(registry)


class Histograms(Collector):
    """What the driver saw happen, counted since it started. One per gateway; no registry is shared."""

    def __init__(self) -> None:
        self._request_s = _histogram(
            "gen_ai_server_request_duration_seconds", "Arrival to last token.", _GEN_AI, _REQUEST_S
        )
        self._ttft_s = _histogram(
            "gen_ai_server_time_to_first_token_seconds", "Arrival to first token.", _GEN_AI, _TTFT_S
        )
        self._tbt_s = _histogram(
            "gen_ai_server_time_per_output_token_seconds", "Mean time between tokens of a request.", _GEN_AI, _TBT_S
        )
        self._tokens = _histogram(
            "gen_ai_client_token_usage", "Tokens of a request.", (*_GEN_AI, "gen_ai_token_type"), _TOKENS
        )
        self._queue_s = _histogram("throttllem_queue_seconds", "Arrival to dispatch.", ("model",), _QUEUE_S)
        self._joules = _histogram(
            "throttllem_request_joules", "A request's share of the GPUs' energy.", ("model", "slo_met"), _JOULES
        )
        self._decision_s = _histogram("throttllem_decision_seconds", "One event in the core.", (), _DECISION_S)
        self._clock_s = _histogram(
            "throttllem_clock_command_seconds", "An event to the clock command that came of it.", (), _DECISION_S
        )
        self._http = Counter("throttllem_http_responses", "HTTP responses by status code.", ("code",), registry=None)

    def request(
        self,
        *,
        model: str,
        queue_s: float | None,
        ttft_s: float | None,
        tbt_s: float | None,
        e2e_s: float | None,
        prompt_tokens: int | None,
        generated_tokens: int | None,
        joules: float | None,
        met: bool | None,
        operation: Operation | None = None,
    ) -> None:
        """A request ended. `model`: the first of its model's names. None: it has none of it, and nothing is counted.

        `met`: all its SLOs; None if it had none, or its client disconnected.
        """
        about = (operation or "", PROVIDER, model)
        for histogram, seconds in ((self._request_s, e2e_s), (self._ttft_s, ttft_s), (self._tbt_s, tbt_s)):
            if seconds is not None:
                histogram.labels(*about).observe(seconds)
        for kind, tokens in (("input", prompt_tokens), ("output", generated_tokens)):
            if tokens is not None:
                self._tokens.labels(*about, kind).observe(tokens)
        if queue_s is not None:
            self._queue_s.labels(model).observe(queue_s)
        if joules is not None:
            self._joules.labels(model, "no SLO" if met is None else "yes" if met else "no").observe(joules)

    def decision(self, seconds: float) -> None:
        """The core took an event in and answered."""
        self._decision_s.observe(seconds)

    def clock_command(self, seconds: float) -> None:
        """A clock command was sent, `seconds` after the event that it follows from."""
        self._clock_s.observe(seconds)

    def http(self, status: int) -> None:
        """A response was sent."""
        self._http.labels(str(status) if 100 <= status < 600 else "other").inc()

    def collect(self) -> Iterator[Metric]:
        """What was observed, without the time of creation of each series."""
        latencies = (self._request_s, self._ttft_s, self._tbt_s, self._tokens)
        for metric in (*latencies, self._queue_s, self._joules, self._decision_s, self._clock_s, self._http):
            for family in metric.collect():
                family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
                yield family


def _histogram(name: str, help_text: str, labels: tuple[str, ...], buckets: tuple[float, ...]) -> Histogram:
    return Histogram(name, help_text, labels, buckets=buckets, registry=None)
