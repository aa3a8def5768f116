"""Option trees: what a user writes in a file, a variable or a flag, and what he is told if it will not do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from throttllem.cli.serve import OTHERS, PREFIX
from throttllem.core.types import Slo
from throttllem.gateway.settings import RESOLVED, ServeOptions
from throttllem.tree import Source, TreeError, build, from_environment, from_settings, from_toml, leaves
from tools.options import FILE, document

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


def of_file(tmp_path: Path, text: str) -> Source:
    file = tmp_path / "t.toml"
    file.write_text(text)
    return from_toml(file)


def built(*sources: Source) -> ServeOptions:
    return build(ServeOptions, sources, RESOLVED)[0]


def test_a_file(tmp_path: Path) -> None:
    options, origins = build(ServeOptions, [of_file(tmp_path, FULL)], RESOLVED)
    assert (options.policy, options.server.port, options.server.api_keys) == ("throttllem", 8001, ("one", "two"))
    assert [(engine.kind, engine.url, engine.tp) for engine in options.engines] == [
        ("openai", "http://a", 1),
        ("simulated", None, 4),
    ]
    assert options.classes == {"gold": Slo(e2e_s=3.0)}
    assert options.autoscale.capacity_rps == {1: 2.5, 4: 9.0}
    lines = {path: int(origin.rpartition(":")[2]) for path, origin in origins.items()}
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


def test_flags_are_stronger_than_variables_and_those_than_the_file(tmp_path: Path) -> None:
    file = of_file(tmp_path, "[server]\nport = 1\nhost = 'a'\nseed = 1\n[slo]\ne2e_s = 4\n")
    variables = {
        "THROTTLLEM_SERVER__PORT": "2",
        "THROTTLLEM_SERVER__HOST": "b",
        "THROTTLLEM_SLO__E2E_S": "none",
        "THROTTLLEM_SERVER__API_KEYS": "one, two,",
        "THROTTLLEM_ENGINES__0__TP": "2",
        "THROTTLLEM_AUTOSCALE__CAPACITY_RPS__2": "7",
        "THROTTLLEM_CACHE_DIR": "/x",
        "OTHER": "y",
    }
    options, origins = build(
        ServeOptions,
        [file, from_environment(variables, PREFIX, OTHERS), from_settings(["server.port=3", "engines.0.model=m"])],
        RESOLVED,
    )
    server = options.server
    assert (server.port, server.host, server.seed, server.api_keys) == (3, "b", 1, ("one", "two"))
    assert options.slo == Slo()
    assert (options.engines[0].tp, options.engines[0].model) == (2, "m")
    assert options.autoscale.capacity_rps == {2: 7.0}
    assert origins["server.port"] == "command line"
    assert origins["server.host"] == "environment"
    assert origins["server.seed"].endswith("t.toml:4")


UNKNOWN = [
    ("[servr]\nport = 1\n", ["t.toml:2: unknown option servr", "did you mean server?"]),
    ("[server]\nhost = 'a'\nprot = 1\n", ["t.toml:3: unknown option server.prot", "did you mean server.port?"]),
    ("[[engines]]\n[[engines]]\nurll = 'x'\n", ["t.toml:3: unknown option engines.1.urll", "engines.1.url?"]),
    ("[server]\nqqqq = 1\n", ["t.toml:2", "known here: host, port, "]),
    ("[engines]\ntp = 1\n", ["t.toml:2", "engines is a list; write [[engines]]"]),
    ("[policy]\nname = 'x'\n", ["t.toml:2", "policy is one value, not a section"]),
    ("[throttle]\npolicy = 'fixed'\n", ["t.toml:2: throttle.policy follows from other options"]),
    ("[server]\nport = 'many'\n", ["t.toml:2: server.port = 'many'", "valid integer"]),
    ("[server]\nport = 99999\n", ["server.port = 99999: must be between 0 and 65535"]),
    ("[slo]\ne2e_s = -1\n", ["SLO e2e_s = -1.0: must be a positive number"]),
    ("[[engines]]\nkind = 'vllm'\n", ["t.toml:2: engines.0.kind = 'vllm'", "'openai'"]),
    ("[[engines]]\nkind = 'openai'\n", ["needs url"]),
    ("[[engines]]\ngpus = [0]\n", ["t.toml:2: engines.0.gpus.0 = 0: must be text: put it in quotes"]),
    ("[server\n", ["t.toml", "line 1"]),
]


def test_a_secret_of_the_wrong_type_is_not_shown(tmp_path: Path) -> None:
    with pytest.raises(TreeError) as error:
        built(of_file(tmp_path, "[server]\napi_keys = [4711]\n"))
    assert "server.api_keys.0: must be text" in str(error.value)
    assert "4711" not in str(error.value)


@pytest.mark.parametrize(("text", "said"), UNKNOWN)
def test_what_is_wrong_in_a_file_is_named_with_its_line(tmp_path: Path, text: str, said: list[str]) -> None:
    with pytest.raises(TreeError) as error:
        built(of_file(tmp_path, text))
    assert all(part in str(error.value) for part in said), error.value


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (lambda: from_settings(["server.port"]), "write section.name=value"),
        (
            lambda: from_settings(["server.prot=1"]),
            "command line: unknown option server.prot; did you mean server.port?",
        ),
        (lambda: from_settings(["engines.1.tp=2"]), "engines.1 was set, but there is no engines.0"),
        (lambda: from_settings(["policy=a", "policy.b=c"]), "policy is one value"),
        (
            lambda: from_environment({"THROTTLLEM_POLICIES": "x"}, PREFIX, OTHERS),
            "environment: unknown option policies; did you mean policy?",
        ),
        (
            lambda: from_environment({"THROTTLLEM_SERVER__PROT": "1"}, PREFIX, OTHERS),
            "environment: unknown option server.prot; did you mean server.port?",
        ),
    ],
)
def test_what_is_wrong_elsewhere(source: object, said: str) -> None:
    with pytest.raises(TreeError) as error:
        built(source())  # type: ignore[operator]
    assert said in str(error.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(TreeError, match=r"nowhere\.toml: no such file"):
        from_toml(tmp_path / "nowhere.toml")
    with pytest.raises(TreeError, match="directory"):
        from_toml(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b"\xff")
    with pytest.raises(TreeError, match="decode"):
        from_toml(tmp_path / "latin.toml")


def test_secrets_are_not_shown() -> None:
    options = built(from_settings(["server.api_keys=secret", "engines.0.api_key=secret"]))
    shown = dict(leaves(options))
    assert shown["server.api_keys"] == shown["engines.0.api_key"] == "(not shown)"
    assert "secret" not in repr(options)
    assert dict(leaves(ServeOptions()))["server.api_keys"] is None


@pytest.mark.parametrize(
    "source",
    [
        lambda folder: of_file(folder, "[server]\napi_keys = 424242\n"),
        lambda folder: of_file(folder, "[server]\napi_keys = ['hush', 7]\n"),
        lambda folder: of_file(folder, "[[engines]]\napi_key = ['hush']\n"),
        lambda folder: of_file(folder, "[[engines]]\nkind = 'openai'\nurl = 'http://me:hush@host'\n"),
        lambda folder: from_settings(["server.port=1", "server.port.api_keys=hush"]),
        lambda folder: from_settings(["server.api_keys.0=hush"]),
    ],
)
def test_an_error_does_not_show_a_secret(tmp_path: Path, source: Callable[[Path], Source]) -> None:
    with pytest.raises(TreeError, match=r"server|engines") as error:
        built(source(tmp_path))
    assert not any(secret in str(error.value) for secret in ("hush", "424242"))


@pytest.mark.parametrize("text", ["", " ", ",", " , "])
def test_keys_that_are_set_but_empty_are_refused(text: str) -> None:
    with pytest.raises(TreeError, match=r"server\.api_keys: set, but there is no key in it"):
        built(from_environment({"THROTTLLEM_SERVER__API_KEYS": text}, PREFIX, OTHERS))


def test_no_keys_at_all_can_be_said() -> None:
    assert built(from_settings(["server.api_keys=none"])).server.api_keys is None


def test_every_option_can_be_set_from_text() -> None:
    """Whatever the defaults are, written as text they give the same options again."""
    settings = []
    for path, value in leaves(ServeOptions()):
        if path not in RESOLVED and value not in ((), {}):
            text = str(value).lower() if isinstance(value, bool) or value is None else str(value)
            settings.append(f"{path}={text}")
    assert built(from_settings(settings)) == ServeOptions()


def test_the_table_of_options_is_up_to_date() -> None:
    assert FILE.read_text(encoding="utf-8") == document(), "run python -m tools.options"
    for path, _ in leaves(ServeOptions()):
        if path not in RESOLVED:
            assert f"`{path.replace('engines.0', 'engines.N')}`" in document(), path
