"""Options of `serve` that cannot be are refused with what would do."""

import pytest

from throttllem.gateway.settings import (
    ClockOptions,
    EngineEntry,
    LimitOptions,
    LiveLengthOptions,
    RecorderOptions,
    ServeOptions,
    ServerOptions,
)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ServerOptions(port=-1), "server.port = -1"),
        (lambda: ServerOptions(metrics_port=70000), "server.metrics_port = 70000"),
        (lambda: ServerOptions(port=81, metrics_port=81), "must differ from server.port"),
        (lambda: ServerOptions(api_keys=()), "server.api_keys: set, but there is no key in it"),
        (lambda: ServerOptions(api_keys=("a", "")), "server.api_keys: a key is empty"),
        (lambda: ServerOptions(api_keys=(" a",)), "server.api_keys: a key is empty, or begins or ends with a blank"),
        (lambda: EngineEntry(kind="openai", url="http://me@host"), "engines: url: must hold no user and password"),
        (lambda: EngineEntry(kind="openai", url="me:pw@host"), "engines: url: must hold no user and password"),
        (
            lambda: EngineEntry(kind="triton", url="http://x", metrics_url="https://me:pw@host/metrics"),
            "engines: metrics_url: must hold no user and password",
        ),
        (lambda: LimitOptions(body_bytes=1), "limits.body_bytes = 1"),
        (lambda: LimitOptions(queue_wait_s=0), "limits.queue_wait_s = 0"),
        (lambda: LimitOptions(silence_s=float("nan")), "limits.silence_s = nan"),
        (lambda: EngineEntry(kind="openai"), "needs url"),
        (lambda: EngineEntry(url="http://x"), "a simulated engine has no url"),
        (lambda: EngineEntry(kind="triton", url="ftp://x"), "must begin with http://"),
        (lambda: EngineEntry(gpus=("0",)), "a simulated engine has none"),
        (
            lambda: EngineEntry(kind="openai", url="http://x", tp=2, gpus=("0",)),
            "gpus = 0: 1 of them, and tp = 2",
        ),
        (
            lambda: EngineEntry(kind="openai", url="http://x", tp=2, gpus=("0", "0")),
            "gpus = 0,0: one of them is named twice",
        ),
        (lambda: ClockOptions(ttl_s=0.1), "clocks.ttl_s = 0.1"),
        (lambda: ServeOptions(clocks=ClockOptions(mode="on")), "no engine names its GPUs"),
        (lambda: LiveLengthOptions(exceed=0.9), "length.exceed = 0.9"),
        (lambda: RecorderOptions(files=1), "recorder.files = 1"),
    ],
)
def test_refused(make, said):
    with pytest.raises(ValueError, match=said.replace(".", r"\.")):
        make()


def test_two_free_ports_are_two_ports():
    assert ServerOptions(port=0, metrics_port=0).metrics_port == 0


def test_the_same_port_of_two_hosts_is_two_ports():
    assert ServerOptions(host="10.0.0.1", port=81, metrics_port=81).metrics_port == 81


def test_secrets_do_not_show():
    options = ServeOptions(
        server=ServerOptions(api_keys=("secret",)),
        engines=(EngineEntry(kind="openai", url="http://x", api_key="secret"),),
    )
    assert "secret" not in repr(options)
