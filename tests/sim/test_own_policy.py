"""Policies by name: classes of the user are found, and an error says what is missing where."""

import pytest
from sim.toy_runs import simulate, steady

from throttllem.core.clocks.own_policy import OwnPolicyError
from throttllem.core.clocks.policy import PolicyError
from throttllem.sim.own_policy import made, named_policy

CLOCKS = (1000, 1200, 1400)
SOURCE = """
class Lowest:
    def clock_mhz(self, view):
        return view.clocks_mhz[0]

class Nothing:
    pass

class Wants(Lowest):
    def __init__(self, share):
        self.share = share
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    name = f"own_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(SOURCE)
    return name


def test_a_class_is_a_policy(module):
    policy = named_policy(f"{module}:Lowest", CLOCKS, (1,))
    assert policy.needs_tables
    assert not policy.slo_aware
    assert policy.own() is not policy.own()
    assert policy.own().clock_mhz(type("View", (), {"clocks_mhz": CLOCKS})) == 1000


def test_other_names_are_the_cores(module):
    assert named_policy("fixed:1200", CLOCKS, (1,)).fixed_mhz == 1200
    assert not named_policy("triton", CLOCKS, (1,)).needs_tables
    with pytest.raises(PolicyError, match="'1201' is no clock"):
        named_policy("fixed:1201", CLOCKS, (1,))


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("nowhere_at_all:Lowest", "there is no module nowhere_at_all"),
        ("{}:Absent", "has no class Absent with a method clock_mhz"),
        ("{}:Nothing", "has no class Nothing with a method clock_mhz"),
    ],
)
def test_errors_say_what_is_missing(module, name, problem):
    with pytest.raises(PolicyError, match=problem):
        named_policy(name.format(module), CLOCKS, (1,))


@pytest.mark.parametrize(
    ("text", "problem"), [("1 / 0", "ZeroDivisionError"), ("import sys; sys.exit(0)", "SystemExit")]
)
def test_a_module_that_fails_is_named(module, tmp_path, text, problem):
    (tmp_path / "broken_policy.py").write_text(text)
    with pytest.raises(PolicyError, match=f"importing broken_policy failed: {problem}"):
        named_policy("broken_policy:Any", CLOCKS, (1,))


def test_a_class_that_wants_arguments_is_named(module):
    policy = named_policy(f"{module}:Wants", CLOCKS, (1,))
    with pytest.raises(OwnPolicyError, match=r":Wants: the class cannot be made without arguments: TypeError.*share"):
        made(policy)
    assert made(named_policy("triton", CLOCKS, (1,))) is None


def test_its_clock_is_what_the_engine_runs_at():
    class Alternating:
        def __init__(self):
            self.calls = 0

        def clock_mhz(self, view):
            self.calls += 1
            return view.clocks_mhz[self.calls % 2]

    own = Alternating()
    run = simulate(steady(2, 3), own=own)
    clocks = {mhz for mhz, _, _ in run.physics[1].log}
    assert own.calls > 10
    assert len(clocks) >= 2
    assert run.result().completed == 6
