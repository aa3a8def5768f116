"""Options of `serve` that cannot be are refused with what would do."""

import pytest

from throttllem.gateway.settings import (
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
        (lambda: LimitOptions(body_bytes=1), "limits.body_bytes = 1"),
        (lambda: LimitOptions(queue_wait_s=0), "limits.queue_wait_s = 0"),
        (lambda: LimitOptions(silence_s=float("nan")), "limits.silence_s = nan"),
        (lambda: EngineEntry(kind="openai"), "needs url"),
        (lambda: EngineEntry(url="http://x"), "a simulated engine has no url"),
        (lambda: EngineEntry(kind="triton", url="ftp://x"), "must begin with http://"),
        (lambda: LiveLengthOptions(exceed=0.9), "length.exceed = 0.9"),
        (lambda: RecorderOptions(files=1), "recorder.files = 1"),
    ],
)
def test_refused(make, said):
    with pytest.raises(ValueError, match=said.replace(".", r"\.")):
        make()


def test_two_free_ports_are_two_ports():
    assert ServerOptions(port=0, metrics_port=0).metrics_port == 0


def test_secrets_do_not_show():
    options = ServeOptions(
        server=ServerOptions(api_keys=("secret",)),
        engines=(EngineEntry(kind="openai", url="http://x", api_key="secret"),),
    )
    assert "secret" not in repr(options)
