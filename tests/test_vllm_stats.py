"""The plug-in without vLLM: the one class that it needs of it is put in its place. Real ones: tests/real."""

import importlib
import socket
import sys
from types import ModuleType, SimpleNamespace

import pytest
from prometheus_client import REGISTRY, generate_latest

from throttllem.engines.capacity import samples
from throttllem.engines.step_reports import unpack


@pytest.fixture
def plugin(monkeypatch):
    loggers = ModuleType("vllm.v1.metrics.loggers")
    loggers.StatLoggerBase = object
    for name in ("vllm", "vllm.v1", "vllm.v1.metrics"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, loggers.__name__, loggers)
    monkeypatch.delitem(sys.modules, "throttllem.vllm_stats", raising=False)
    return importlib.import_module("throttllem.vllm_stats")


@pytest.fixture
def logger(plugin):
    """Makes loggers, and closes their sockets in the end."""
    made = []

    def make(config=None, index=0):
        made.append(plugin.StatLogger(config, index))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def listener(tmp_path, monkeypatch):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as bound:
        bound.bind(str(tmp_path / "s"))
        bound.setblocking(False)
        monkeypatch.setenv("THROTTLLEM_STATS", str(tmp_path / "s"))
        yield bound


def scheduler(usage=0.5, details=None, *, speculates=False):
    return SimpleNamespace(
        kv_cache_usage=usage,
        iteration_details=details,
        num_running_reqs=3,
        num_waiting_reqs=1,
        num_skipped_waiting_reqs=1,
        prefix_cache_stats=SimpleNamespace(queries=40, hits=32),
        spec_decoding_stats=SimpleNamespace(num_draft_tokens=9, num_accepted_tokens=6) if speculates else None,
    )


def iteration(computed=0, generated=3, preempted=0):
    prompts = SimpleNamespace(computed=computed)
    return SimpleNamespace(prompt_token_stats=prompts, num_generation_tokens=generated, num_preempted_reqs=preempted)


def received(listener):
    steps = []
    while True:
        try:
            steps.append(unpack(listener.recv(1000)))
        except BlockingIOError:
            return steps


def test_sends_every_step(logger, listener):
    sender = logger()
    sender.record(scheduler(0.25), None)
    sender.record(scheduler(0.5), iteration(computed=12, preempted=1))
    sender.record(scheduler(0.25), None)
    sender.record(None, iteration())
    sender.record(scheduler(0.25), iteration())
    part, step, freed, last = received(listener)
    # Part of a prompt is a step, freeing what was aborted is none.
    assert [each.step for each in (part, step, freed, last)] == [0, 1, None, 2]
    assert [each.sequence for each in (part, step, freed, last)] == [1, 2, 3, 4]
    assert (step.running, step.waiting, step.kv_usage) == (3, 2, 0.5)
    assert (step.prompt_tokens, step.generated_tokens, step.preemptions, step.seconds) == (12, 3, 1, None)
    assert part.monotonic_s <= step.monotonic_s <= last.monotonic_s


def test_details_of_an_iteration_go_first(logger, listener):
    details = SimpleNamespace(num_ctx_tokens=99, num_generation_requests=2, elapsed_ms=250.0)
    logger().record(scheduler(details=details), iteration(computed=12))
    (step,) = received(listener)
    assert (step.prompt_tokens, step.decode_sequences, step.seconds) == (99, 2, 0.25)


def test_speculation_and_the_prefix_cache_are_sent(logger, listener):
    logger().record(scheduler(speculates=True), iteration())
    logger().record(scheduler(), iteration())
    step, plain = received(listener)
    assert (step.drafted_tokens, step.accepted_tokens, step.prefix_queries, step.prefix_hits) == (9, 6, 40, 32)
    assert (plain.drafted_tokens, plain.accepted_tokens) == (None, None)


def test_over_udp_steps_are_signed_or_not_sent(logger, tmp_path, monkeypatch, caplog):
    secret = tmp_path / "secret"
    secret.write_text("0123456789abcdef\n")
    secret.chmod(0o600)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as bound:
        bound.bind(("127.0.0.1", 0))
        bound.setblocking(False)
        monkeypatch.setenv("THROTTLLEM_STATS", f"127.0.0.1:{bound.getsockname()[1]}")
        logger().record(scheduler(), iteration())
        assert "THROTTLLEM_STATS_SECRET" in caplog.text
        monkeypatch.setenv("THROTTLLEM_STATS_SECRET", str(secret))
        logger().record(scheduler(), iteration())
        datagram = bound.recv(1000)
    assert unpack(datagram) is None
    assert unpack(datagram, b"another secret..") is None
    assert unpack(datagram, b"0123456789abcdef").running == 3


def test_nobody_listening_costs_nothing_but_a_gap(logger, listener, tmp_path):
    sender = logger()
    (tmp_path / "s").rename(tmp_path / "away")
    sender.record(scheduler(), iteration())
    (tmp_path / "away").rename(tmp_path / "s")
    for _ in range(5000):  # far more than the socket holds: never blocks
        sender.record(scheduler(), iteration())
    steps = received(listener)
    assert steps[0].sequence == 2
    sender.record(scheduler(), iteration())
    assert [step.sequence for step in received(listener)] == [5002]


def test_a_vllm_that_changed_is_said_once_and_never_raised(logger, listener, caplog):
    sender = logger()
    for _ in range(3):
        sender.record(SimpleNamespace(), iteration())
    assert received(listener) == []
    assert [record.message for record in caplog.records if "not report its steps" in record.message] != []
    assert len(caplog.records) == 1
    logger(SimpleNamespace()).log_engine_initialized()
    assert "capacities" in caplog.records[-1].message


@pytest.mark.parametrize("address", ["192.0.2.1:5", "nonsense"])
def test_an_address_elsewhere_is_refused_and_said(logger, monkeypatch, caplog, address):
    monkeypatch.setenv("THROTTLLEM_STATS", address)
    sender = logger()
    sender.record(scheduler(), iteration())
    assert "no steps are sent" in caplog.text


def test_capacities_are_on_the_metrics_page(plugin, logger, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("THROTTLLEM_STATS", "./s")
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=64, max_num_batched_tokens=2048, enable_chunked_prefill=True),
        parallel_config=SimpleNamespace(data_parallel_size=1, _api_process_count=2),
    )
    try:
        logger(config).log_engine_initialized()
        logger(config).log_engine_initialized()
        logger(config, 1).log_engine_initialized()
        (found,) = samples(generate_latest(REGISTRY), plugin.INFO)
    finally:
        REGISTRY.unregister(REGISTRY._names_to_collectors[plugin.INFO])
    assert found.labels.pop("stats") == str(tmp_path / "s")
    assert int(found.labels.pop("boot")) > 0
    assert found.labels == {
        "max_num_seqs": "64",
        "max_num_batched_tokens": "2048",
        "chunked_prefill": "1",
        "engines": "1",
        "api_servers": "2",
    }
