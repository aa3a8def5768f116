"""Options that cannot be used are refused with their name and what would do."""

import re

import pytest
from pydantic import ValidationError

from throttllem.config import (
    BatchingOptions,
    ClockOptions,
    EngineEntry,
    LengthOptions,
    LimitOptions,
    Noise,
    Options,
    RecorderOptions,
    ServerOptions,
)
from throttllem.core.types import OptionError, Slo
from throttllem.gpu.keeper_client import SOCKET, TTL_S


def remote(**options):
    return EngineEntry(kind="openai", url="http://x", **options)


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: ServerOptions(port=-1), "server.port = -1"),
        (lambda: ServerOptions(metrics_port=70000), "server.metrics_port = 70000"),
        (lambda: ServerOptions(port=81, metrics_port=81), "must differ from server.port"),
        (lambda: ServerOptions(api_keys=()), "server.api_keys: set, but there is no key in it"),
        (lambda: ServerOptions(api_keys=("a", "")), "server.api_keys: a key is empty"),
        (lambda: ServerOptions(api_keys=(" a",)), "server.api_keys: a key is empty, or begins or ends with a blank"),
        (lambda: EngineEntry(kind="openai", url="http://me@host"), "engines.url: must hold no user and password"),
        (lambda: EngineEntry(kind="openai", url="me:pw@host"), "engines.url: must hold no user and password"),
        (lambda: EngineEntry(url="http://me:pw@host"), "engines.url: must hold no user and password"),
        (lambda: remote(metrics_url="https://me:pw@h/m"), "engines.metrics_url: must hold no user and password"),
        (lambda: EngineEntry(kind="triton", url="ftp://x"), "must begin with http://"),
        (lambda: EngineEntry(kind="openai"), "needs the engine's url"),
        (lambda: EngineEntry(url="http://x"), "a simulated engine has no url"),
        (lambda: EngineEntry(gpus=("0",)), "a simulated engine has no GPUs"),
        (lambda: EngineEntry(tp=0), "engines.tp = 0"),
        (lambda: remote(kv_blocks=0), "engines.kv_blocks = 0"),
        (lambda: remote(tp=2, gpus=("0",)), "engines.gpus = 0: 1 GPUs, and tp = 2"),
        (lambda: remote(tp=2, gpus=("0", "0")), "engines.gpus = 0,0: a GPU is named twice"),
        (lambda: LimitOptions(body_bytes=1), "limits.body_bytes = 1"),
        (lambda: LimitOptions(queue_wait_s=0), "limits.queue_wait_s = 0"),
        (lambda: LimitOptions(silence_s=float("nan")), "limits.silence_s = nan"),
        (lambda: ClockOptions(ttl_s=0.1), "clocks.ttl_s = 0.1"),
        (lambda: LengthOptions(exceed=0.9), "length.exceed = 0.9"),
        (lambda: LengthOptions(p95_error=1.5), "length.p95_error = 1.5"),
        (lambda: LengthOptions(inflation=0), "length.inflation = 0"),
        (lambda: RecorderOptions(files=1), "recorder.files = 1"),
        (lambda: BatchingOptions(block_tokens=0), "batching.block_tokens = 0"),
        (lambda: Noise(time=-1), "noise.time = -1"),
        (lambda: Slo(e2e_s=0.0), "slo.e2e_s = 0.0: must be a positive number of seconds"),
        (lambda: Options(clocks=ClockOptions(mode="on")), "no engine names its GPUs"),
    ],
)
def test_refused(make, error):
    with pytest.raises(ValueError, match=error.replace(".", r"\.")):
        make()


def test_two_free_ports_are_two_ports():
    assert ServerOptions(port=0, metrics_port=0).metrics_port == 0


def test_the_same_port_of_two_hosts_is_two_ports():
    assert ServerOptions(host="10.0.0.1", port=81, metrics_port=81).metrics_port == 81


def test_secrets_do_not_show():
    options = Options(server=ServerOptions(api_keys=("secret",)), engines=(remote(api_key="secret"),))
    assert "secret" not in repr(options)
    assert "secret" not in str(options)


def test_options_made_in_code_do_not_depend_on_the_environment(monkeypatch):
    monkeypatch.setenv("THROTTLLEM_POLICY", "triton")
    monkeypatch.setenv("THROTTLLEM_SERVER__PORT", "1")
    assert (Options().policy, Options().server.port) == ("least-energy", 8000)


def test_options_are_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        Options().policy = "triton"


def test_defaults_that_the_keeper_has_too():
    assert (ClockOptions().keeper, ClockOptions().ttl_s) == (SOCKET, TTL_S)


def test_step_reports_that_any_local_user_could_send_are_refused(tmp_path):
    url = "http://127.0.0.1:1"
    with pytest.raises(OptionError, match="stats_secret"):
        EngineEntry(kind="openai", url=url, stats="127.0.0.1:9911")
    EngineEntry(kind="openai", url=url, stats="127.0.0.1:9911", stats_secret=tmp_path / "secret")
    EngineEntry(kind="openai", url=url, stats="./steps.sock")


def test_a_command_has_the_values_of_its_entry_and_leaves_other_braces_alone():
    command = """vllm serve {model} -tp {tp} --host {host} --port {port} --name {served_as} -O '{"level": 3}'"""
    entry = EngineEntry(kind="openai", url="http://127.0.0.1:8001", model="a/b", served_as="it", tp=2, command=command)
    assert " ".join(entry.command_words) == (
        'vllm serve a/b -tp 2 --host 127.0.0.1 --port 8001 --name it -O {"level": 3}'
    )


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"command": "vllm serve {modle}"}, "{modle} is unknown; it may hold {model}, {served_as}, {tp}"),
        ({"command": "vllm serve {model}"}, "holds {model}, which this entry does not set"),
        ({"command": "vllm 'serve"}, "cannot be split into words: no closing quotation"),
        ({"command": ""}, "is empty"),
        ({"command": "vllm serve", "url": "http://127.0.0.1"}, "with its port"),
        ({"command": "vllm serve", "kind": "simulated", "url": None}, "needs the url at which the engine will listen"),
        ({"ready_s": 0.0}, "must be between 1 and 86400"),
        ({"launcher": "l.sock"}, "there is no command that it could start; set command, or leave this out"),
        ({"launcher": "l.sock", "command": "vllm", "gpus": ("0",)}, "it chooses GPUs itself; leave gpus out"),
    ],
)
def test_a_command_that_cannot_be_started_is_refused(change, problem):
    with pytest.raises(OptionError, match=re.escape(problem)):
        EngineEntry(**{"kind": "openai", "url": "http://127.0.0.1:8001"} | change)
