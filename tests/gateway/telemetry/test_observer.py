"""What the observer keeps of a control loop: every call for the recorder; decisions and ends for `/metrics`."""

from prometheus_client.parser import text_string_to_metric_families

from gateway.rig import outcome, rig, virtually
from throttllem.core.types import Slo, Stepped, Timer
from throttllem.gateway.control.loop import Handled
from throttllem.gateway.telemetry.metrics import Histograms, metrics_page
from throttllem.gateway.telemetry.observer import RecordingObserver
from throttllem.gateway.telemetry.status import GatewayStatus

EMPTY = GatewayStatus(version="1", policy="triton", phase="serving", now_s=0.0, slo=Slo(), models=())


class Recorder:
    def __init__(self):
        self.calls = []

    def record(self, calls):
        self.calls += calls

    def flush(self):
        self.flushed = len(self.calls)


def values(histograms, name):
    """The samples of a metric by the values of their labels."""
    _, page = metrics_page(EMPTY, histograms)
    return {
        tuple(sample.labels.values()): sample.value
        for family in text_string_to_metric_families(page.decode())
        for sample in family.samples
        if sample.name == name
    }


def observer(recorder=None):
    return RecordingObserver(model=lambda: "toy", histograms=Histograms(), recorder=recorder)


def test_every_call_is_recorded_and_bare_steps_are_no_decisions():
    recorder = Recorder()
    made = observer(recorder)
    calls = [
        Handled(0.5, Stepped(engine=0, iteration=0), [], 0.001),
        Handled(0.6, Stepped(engine=0, iteration=1, started=(7,)), [], 0.002),
        Handled(0.7, Timer(), [], 0.003),
        Handled(0.8, Timer(), None, 0.004),
    ]
    made.handled(calls)
    assert recorder.calls == [(call.now_s, call.event, call.commands) for call in calls]
    assert recorder.flushed == 4
    assert values(made.histograms, "throttllem_decision_seconds_count") == {(): 3.0}
    assert abs(values(made.histograms, "throttllem_decision_seconds_sum")[()] - 0.009) < 1e-9


class Both:
    """The rig's observer and another."""

    def __init__(self, one, other):
        self.observers = (one, other)

    def handled(self, calls):
        for each in self.observers:
            each.handled(calls)

    def ended(self, session, met):
        for each in self.observers:
            each.ended(session, met)


def test_ended_requests_are_counted_with_what_they_had():
    async def run():
        made = observer()
        async with rig() as it:
            it.loop._observer = Both(it.seen, made)
            await it.up()
            await it.request(tokens=5, count=4, slo=Slo(e2e_s=60.0))
            await it.request(tokens=5, count=4, stream=False)
            await it.request(tokens=9, count=4, disconnect_after=3, slo=Slo(e2e_s=60.0))
            assert await outcome(it.request(tokens=300)) == "context_length_exceeded"
            accounting = it.backend.accounting
            return made.histograms, accounting.total_j - accounting.idle_j

    histograms, joules = virtually(run())
    about = ("text_completion", "throttllem", "toy")
    assert values(histograms, "throttllem_queue_seconds_count") == {("toy",): 3.0}
    assert values(histograms, "gen_ai_server_time_to_first_token_seconds_count") == {about: 2.0}
    assert values(histograms, "gen_ai_client_token_usage_sum") == {(*about, "input"): 12.0, (*about, "output"): 13.0}
    assert values(histograms, "throttllem_request_joules_count") == {("toy", "yes"): 1.0, ("toy", "no SLO"): 2.0}
    spent = sum(values(histograms, "throttllem_request_joules_sum").values())
    assert abs(spent - joules) < 1e-6
