"""Options from a file, variables, `--set` and flags, and the errors about them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from throttllem.config import RESOLVED, Options
from throttllem.core.types import Slo
from throttllem.option_sources import ConfigurationError, Flags, Loaded, leaves, load_options, seconds, variable

FULL = """\
policy = "throttllem"
state_dir = "/tmp/x"

[server]
port = 8001
api_keys = ["one", "two"]

[[engines]]
kind = "openai"
url = "http://a"

[[engines]]
tp = 4

[classes.gold]
e2e_s = 3

[autoscale.capacity_rps]
1 = 2.5
4 = 9
"""

Load = Callable[..., Loaded]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("THROTTLLEM_"):
            monkeypatch.delenv(name)


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Loads from texts: `toml` a file, `variables`, `settings`, `flags`."""

    def loads(
        *settings: str, toml: str | None = None, variables: dict[str, str] | None = None, flags: Flags | None = None
    ) -> Loaded:
        file = None
        if toml is not None:
            file = tmp_path / "t.toml"
            file.write_text(toml)
        for name, value in (variables or {}).items():
            monkeypatch.setenv(name, value)
        return load_options(file=file, settings=settings, flags=flags)

    return loads


# ---- values ---------------------------------------------------------------------------------------------------


def test_a_file(load: Load) -> None:
    loaded = load(toml=FULL)
    options = loaded.options
    assert (options.policy, options.server.port, options.server.api_keys) == ("throttllem", 8001, ("one", "two"))
    assert [(engine.kind, engine.url, engine.tp) for engine in options.engines] == [
        ("openai", "http://a", 1),
        ("simulated", None, 4),
    ]
    assert options.classes == {"gold": Slo(e2e_s=3.0)}
    assert options.autoscale.capacity_rps == {1: 2.5, 4: 9.0}
    lines = {path: int(origin.rpartition(":")[2]) for path, origin in loaded.origins.items()}
    assert lines == {
        "policy": 1,
        "state_dir": 2,
        "server.port": 5,
        "server.api_keys": 6,
        "engines.0.kind": 9,
        "engines.0.url": 10,
        "engines.1.tp": 13,
        "classes.gold.e2e_s": 16,
        "autoscale.capacity_rps.1": 19,
        "autoscale.capacity_rps.4": 20,
    }


def test_flags_are_stronger_than_settings_then_variables_then_the_file(load: Load) -> None:
    loaded = load(
        "server.port=3",
        "server.metrics_port=3",
        "engines.0.model=m",
        toml="[server]\nport = 1\nhost = 'a'\nseed = 1\nmetrics_port = 1\n[slo]\ne2e_s = 4\n",
        variables={
            "THROTTLLEM_SERVER__PORT": "2",
            "THROTTLLEM_SERVER__HOST": "b",
            "THROTTLLEM_SLO__E2E_S": "none",
            "THROTTLLEM_SERVER__API_KEYS": "one, two,",
            "THROTTLLEM_ENGINES__0__TP": "2",
            "THROTTLLEM_AUTOSCALE__CAPACITY_RPS__2": "7",
            "THROTTLLEM_CACHE_DIR": "/x",
            "THROTTLLEM_STATS": "/of/the/plug-in",
            "THROTTLLEM_DEBUG": "1",
            "OTHER": "y",
        },
        flags={"server.port": ("--port", 4), "policy": ("--policy", None)},
    )
    options, server = loaded.options, loaded.options.server
    assert (server.port, server.metrics_port, server.host, server.seed) == (4, 3, "b", 1)
    assert server.api_keys == ("one", "two")
    assert (options.slo, options.policy, options.cache_dir) == (Slo(), "least-energy", Path("/x"))
    assert (options.engines[0].tp, options.engines[0].model) == (2, "m")
    assert options.autoscale.capacity_rps == {2: 7.0}
    origins = loaded.origins
    assert (origins["server.port"], origins["server.metrics_port"]) == ("--port", "--set")
    assert origins["server.host"] == variable("server.host") == "THROTTLLEM_SERVER__HOST"
    assert origins["server.seed"].endswith("t.toml:4")
    assert "policy" not in origins


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5", 5.0),
        ("0.5", 0.5),
        ("5s", 5.0),
        ("200ms", 0.2),
        ("200 MS", 0.2),
        ("2m", 120.0),
        ("1.5h", 5400.0),
        ("1e-3s", 0.001),
        ("50us", 5e-5),
        ("-1", -1.0),
        ("inf", float("inf")),
    ],
)
def test_durations(text: str, value: float) -> None:
    assert seconds(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "soon", "s", "5 parsecs", "1,5s", "5s5"])
def test_no_durations(text: str) -> None:
    with pytest.raises(ValueError, match="must be a duration, as in 5s"):
        seconds(text)


def test_a_duration_wherever_an_option_is_set(load: Load) -> None:
    loaded = load(
        "limits.drain_s=2m",
        toml="[slo]\ntbt_s = '200ms'\n[classes.gold]\nttft_s = '1s'\n",
        variables={"THROTTLLEM_THROTTLE__DWELL_S": "100ms"},
        flags={"slo.e2e_s": ("--slo-e2e", "20s")},
    )
    options = loaded.options
    assert options.slo == Slo(e2e_s=20.0, tbt_s=0.2)
    assert options.classes["gold"].ttft_s == 1.0
    assert (options.limits.drain_s, options.throttle.dwell_s) == (120.0, 0.1)


def test_former_names_go_on_working_and_are_noted(load: Load) -> None:
    loaded = load(
        "engine.block_tokens=16", toml="[clocks]\nmode = 'advise'\n", variables={"THROTTLLEM_ENGINE__CHUNKED": "1"}
    )
    assert (loaded.options.batching.block_tokens, loaded.options.batching.chunked) == (16, True)
    assert loaded.options.clocks.mode == "dry-run"
    assert [note.partition(": ")[2] for note in loaded.notes] == [
        "clocks.mode = advise is now called dry-run",
        "engine.chunked is now called batching.chunked",
        "engine.block_tokens is now called batching.block_tokens",
    ]


def test_every_option_can_be_set_from_text(load: Load) -> None:
    """The defaults, written as text, give the same options again."""
    settings = []
    for path, value in leaves(Options()):
        if path not in RESOLVED and value not in ((), {}):
            text = str(value).lower() if isinstance(value, bool) or value is None else str(value)
            settings.append(f"{path}={text}")
    loaded = load(*settings)
    assert loaded.options == Options()
    assert len(loaded.origins) == len(settings) > 70


# ---- errors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("toml", "parts"),
    [
        ("[servr]\nport = 1\n", ["t.toml:2: unknown option servr", "did you mean server?"]),
        ("[server]\nhost = 'a'\nprot = 1\n", ["t.toml:3: unknown option server.prot", "did you mean server.port?"]),
        ("[[engines]]\n[[engines]]\nurll = 'x'\n", ["t.toml:3: unknown option engines.1.urll", "engines.1.url?"]),
        ("[classes.v1.5]\nttft_s = 1\n", ["unknown option classes.v1.5", 'quotes: [classes."v1.5"]']),
        ("[server]\nqqqq = 1\n", ["t.toml:2", "known: host, port, "]),
        ("[engines]\ntp = 1\n", ["t.toml:2", "engines is a list; write [[engines]]"]),
        ("engines = []\n", ["t.toml:1", "engines is a list of sections; write [[engines]]"]),
        ("server = 1\n", ["t.toml:1", "server is a section"]),
        ("[policy]\nname = 'x'\n", ["t.toml:2", "policy is one value, not a section"]),
        ("[throttle]\npolicy = 'fixed'\n", ["t.toml:2: throttle.policy follows from policy and cannot be set"]),
        ("[server]\nport = 'many'\n", ["t.toml:2: server.port = 'many'", "valid integer"]),
        ("server = {port = 'many'}\n", ["t.toml:1: server.port = 'many'", "valid integer"]),
        ("[server]\nport = 99999\n", ["t.toml:2: server.port = 99999: must be between 0 and 65535"]),
        ("[slo]\ne2e_s = -1\n", ["t.toml:2: slo.e2e_s = -1.0: must be a positive number of seconds"]),
        ("[classes.gold]\ne2e_s = -1\n", ["t.toml:2: classes.gold.e2e_s = -1.0: must be a positive number"]),
        ("[slo]\ne2e_s = 'soon'\n", ["t.toml:2: slo.e2e_s = 'soon': must be a duration"]),
        ("[engine]\nblock_tokens = 0\n", ["t.toml:2: batching.block_tokens = 0: must be between 1 and 1024"]),
        ("[admission]\nunmeetable = 'x'\n", ["t.toml:2: admission.unmeetable = 'x'", "'serve' or 'reject'"]),
        ("[[engines]]\nkind = 'vllm'\n", ["t.toml:2: engines.0.kind = 'vllm'", "'openai'"]),
        (
            "[[engines]]\n[[engines]]\nkind = 'openai'\n",
            ["t.toml:3: engines.1.kind = 'openai': needs the engine's url"],
        ),
        ("[[engines]]\ngpus = [0]\n", ["t.toml:2: engines.0.gpus.0 = 0: must be text: put it in quotes"]),
        ("[clocks]\nmode = 'on'\n", ["t.toml:2: clocks.mode = 'on': no engine names its GPUs"]),
        ("[server\n", ["t.toml", "line 1"]),
    ],
)
def test_an_error_names_the_option_and_its_line(load: Load, toml: str, parts: list[str]) -> None:
    with pytest.raises(ConfigurationError) as error:
        load(toml=toml)
    assert all(part in str(error.value) for part in parts), error.value


@pytest.mark.parametrize(
    ("setting", "part"),
    [
        ("server.port", "--set server.port: write section.name=value"),
        ("server.prot=1", "--set: unknown option server.prot; did you mean server.port?"),
        ("engines.1.tp=2", "--set: engines.1: there is no engines.0; number engines from 0"),
        ("policy.b=c", "policy is one value"),
        ("workers=0", "--set: workers = '0'"),
        ("autoscale.interval_s=0", "--set: autoscale.interval_s = 0.0: must be between 0.01 and 3600"),
    ],
)
def test_an_error_of_set(load: Load, setting: str, part: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        load(setting)
    assert part in str(error.value)


@pytest.mark.parametrize(
    ("name", "value", "part"),
    [
        ("THROTTLLEM_POLICIES", "x", "THROTTLLEM_POLICIES: unknown option policies; did you mean policy?"),
        (
            "THROTTLLEM_SERVER__PROT",
            "1",
            "THROTTLLEM_SERVER__PROT: unknown option server.prot; did you mean server.port?",
        ),
        ("THROTTLLEM_SERVER__PORT", "x", "THROTTLLEM_SERVER__PORT: server.port = 'x'"),
        ("THROTTLLEM_SERVER", "x", 'error parsing value for field "server"'),
        ("THROTTLLEM_NOISE__TIME", "-1", "THROTTLLEM_NOISE__TIME: noise.time = -1.0: must be between 0 and 1"),
    ],
)
def test_an_error_of_a_variable(load: Load, name: str, value: str, part: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        load(variables={name: value})
    assert part in str(error.value)


def test_an_error_of_a_flag(load: Load) -> None:
    with pytest.raises(ConfigurationError, match=r"^--slo-e2e: slo\.e2e_s = -1\.0: must be a positive number"):
        load("slo.e2e_s=2", flags={"slo.e2e_s": ("--slo-e2e", "-1")})


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"nowhere\.toml: no such file"):
        load_options(file=tmp_path / "nowhere.toml")
    with pytest.raises(ConfigurationError, match="directory"):
        load_options(file=tmp_path)
    (tmp_path / "latin.toml").write_bytes(b"\xff")
    with pytest.raises(ConfigurationError, match="decode"):
        load_options(file=tmp_path / "latin.toml")


# ---- secrets --------------------------------------------------------------------------------------------------


def test_secrets_are_not_shown(load: Load) -> None:
    options = load("server.api_keys=secret", "engines.0.api_key=secret").options
    shown = dict(leaves(options))
    assert shown["server.api_keys"] == shown["engines.0.api_key"] == "(not shown)"
    assert "secret" not in repr(options)
    assert dict(leaves(Options()))["server.api_keys"] is None


@pytest.mark.parametrize(
    "given",
    [
        {"toml": "[server]\napi_keys = 424242\n"},
        {"toml": "[server]\napi_keys = [424242]\n"},
        {"toml": "[server]\napi_keys = ['hush', 7]\n"},
        {"toml": "[server]\napi_keys = [' hush']\n"},
        {"toml": "[[engines]]\napi_key = ['hush']\n"},
        {"toml": "[[engines]]\nkind = 'openai'\nurl = 'http://me:hush@host'\n"},
        {"toml": "[[engines]]\nurl = 'http://me:hush@host'\n"},
        {"variables": {"THROTTLLEM_ENGINES": "hush"}},
        {"variables": {"THROTTLLEM_ENGINES__0__API_KEY__X": "hush"}},
    ],
)
def test_an_error_does_not_show_a_secret(load: Load, given: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError, match=r"server|engines") as error:
        load(**given)
    assert not any(secret in str(error.value) for secret in ("hush", "424242"))


@pytest.mark.parametrize("settings", [("server.port=1", "server.port.api_keys=hush"), ("server.api_keys.0=hush",)])
def test_an_error_of_set_does_not_show_a_secret(load: Load, settings: tuple[str, ...]) -> None:
    with pytest.raises(ConfigurationError, match="server") as error:
        load(*settings)
    assert "hush" not in str(error.value)


@pytest.mark.parametrize("text", ["", " ", ",", " , "])
def test_keys_that_are_set_but_empty_are_refused(load: Load, text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"server\.api_keys: set, but there is no key in it"):
        load(variables={"THROTTLLEM_SERVER__API_KEYS": text})


def test_no_keys_can_be_set(load: Load) -> None:
    toml = "[server]\napi_keys = ['a']\n"
    assert load("server.api_keys=none", toml=toml).options.server.api_keys is None
