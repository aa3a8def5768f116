"""Every operation, answer and code of the protocol in docs/keeper.md, spoken to a real keeper."""

import ast
import json
import re
from pathlib import Path

import pytest

from tests.keeper.rig import LONG_S, TTL_S, locks, until
from throttllem.keeper import leases

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/keeper.md"
KEEPER = ROOT / "src/throttllem/keeper"


def test_status_at_rest(keeper, talk):
    first, second = keeper.uuids
    allowed = {first: [210, 1410], second: [600, 1410]}
    answer = talk.done("status")
    assert {key: answer[key] for key in ("allowed", "held", "returning", "before")} == {
        "allowed": allowed,
        "held": {},
        "returning": [],
        "before": {},
    }


def test_a_lease_from_its_begin_to_its_end(keeper, talk, machine):
    assert talk.done("lease", gpus=keeper.uuids, ttl_s=LONG_S) == {"ok": True}
    assert locks(machine) == [None, None], "a lease alone locks nothing"
    assert talk.done("set", mhz=1005) == {"ok": True}
    assert locks(machine) == [(1005, 1005)] * 2, "set is answered when it is done"
    assert talk.done("beat") == {"ok": True}
    held = keeper.status()["held"]
    assert {uuid: each["mhz"] for uuid, each in held.items()} == dict.fromkeys(keeper.uuids, 1005)
    assert all(re.fullmatch(r"process \d+ of user \d+", each["by"]) for each in held.values())
    assert keeper.status()["before"] == dict.fromkeys(keeper.uuids)
    assert talk.done("set", mhz=600) == {"ok": True}
    assert locks(machine) == [(600, 600)] * 2
    assert talk.done("release") == {"ok": True}
    assert locks(machine) == [None, None], "release is answered when everything is restored"
    assert keeper.status()["held"] == {}
    assert talk.done("lease", gpus=keeper.uuids[:1], ttl_s=LONG_S), "and then it may ask for another"


def test_status_tells_of_a_lease_before_its_first_set(keeper, talk):
    talk.done("lease", gpus=keeper.uuids[:1], ttl_s=LONG_S)
    assert keeper.status()["held"][keeper.uuids[0]]["mhz"] is None


@pytest.mark.parametrize("op", ["beat", "set", "release", "dance", "lease\n", None, 1, ["set"]])
def test_malformed_without_a_lease(talk, op):
    assert talk.refused(op, mhz=1005) == "malformed"


@pytest.mark.parametrize(
    "fields",
    [
        {"gpus": [], "ttl_s": 1},
        {"ttl_s": 0.19},
        {"ttl_s": 60.1},
        {"ttl_s": -1},
        {"ttl_s": float("nan")},
        {"ttl_s": float("inf")},
    ],
)
def test_malformed_leases(keeper, talk, fields):
    assert talk.refused("lease", **{"gpus": keeper.uuids, **fields}) == "malformed"
    assert keeper.status()["held"] == {}


def test_malformed_twice(keeper, talk):
    first, second = keeper.uuids
    assert talk.refused("lease", gpus=[first, first], ttl_s=1) == "malformed"
    talk.done("lease", gpus=[first], ttl_s=LONG_S)
    assert talk.refused("lease", gpus=[second], ttl_s=LONG_S) == "malformed", "one lease a connection"
    assert talk.done("status")["held"].keys() == {first}


def test_held_by_another(keeper, talk, machine):
    first, second = keeper.uuids
    with keeper.holds(0, mhz=900):
        assert talk.refused("lease", gpus=[second, first], ttl_s=1) == "held"
        assert keeper.status()["held"].keys() == {first}, "a group is leased as a whole or not at all"
    until(lambda: machine.gpus[0].lock is None and not keeper.status()["returning"])
    talk.done("lease", gpus=[second, first], ttl_s=1)


def test_range(keeper, talk, machine):
    talk.done("lease", gpus=keeper.uuids, ttl_s=LONG_S)
    assert [talk.refused("set", mhz=mhz) for mhz in (0, -1, 209, 599, 1411, 10**12)] == ["range"] * 6
    assert locks(machine) == [None, None]
    talk.done("set", mhz=600)


def test_lost(keeper, talk, machine):
    talk.done("lease", gpus=keeper.uuids, ttl_s=TTL_S)
    talk.done("set", mhz=900)
    until(lambda: locks(machine) == [None, None])
    assert [talk.refused("set", mhz=900), talk.refused("beat")] == ["lost", "lost"]
    assert talk.done("release"), "what has ended can be laid down"
    talk.done("lease", gpus=keeper.uuids, ttl_s=LONG_S)


def test_gpu(keeper, talk, machine):
    machine.gpus[0].permission(False)
    talk.done("lease", gpus=keeper.uuids, ttl_s=LONG_S)
    answer = talk.ask("set", mhz=900)
    assert (answer["code"], keeper.uuids[0] in answer["error"]) == ("gpu", True)


def test_rate(keeper, talk):
    talk.done("lease", gpus=keeper.uuids, ttl_s=LONG_S)
    codes = [talk.ask("set", mhz=900).get("code") for _ in range(60)]
    assert set(codes) == {None, "rate"}
    assert talk.done("beat"), "a heartbeat always counts"


def test_lines_may_be_sent_ahead(keeper, talk):
    talk.say(b'{"op": "status"}\n{"op": "dance"}\n{"op": "status"}\n')
    assert [talk.hear()["ok"] for _ in range(3)] == [True, False, True]


def test_the_talk_on_the_page_goes_as_shown(keepers):
    keeper = keepers(clocks=[(600, 1410)])
    lines = re.findall(r"^    ([<>]) (\{.*\})$", PAGE.read_text(), re.MULTILINE)
    assert len(lines) == 10
    with keeper.talk() as talk:
        for side, line in lines:
            if side == ">":
                talk.say(line.encode() + b"\n")
            else:
                assert talk.hear() == json.loads(line)


# ---- the page -------------------------------------------------------------------------------------------------


def codes_in_source():
    found = set()
    for path in KEEPER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "RefusedError":
                found.add(ast.literal_eval(node.args[0]))
    return found


def rows(heading):
    """First cells of the table below a heading of the page."""
    part = PAGE.read_text().split(f"\n{heading}\n", 1)[1].split("\n#", 1)[0]
    return [re.findall(r"`([^`]+)`", line.split("|")[1])[0] for line in part.splitlines() if line.startswith("| `")]


def test_the_page_has_every_operation():
    assert set(rows("### Operations")) == {"status", "lease", "set", "beat", "release"}


def test_the_page_has_every_code():
    assert set(rows("### Codes")) == codes_in_source()


def test_the_page_has_the_numbers():
    text = PAGE.read_text()
    assert f"{leases.LEAST_TTL_S:g} to {leases.MOST_TTL_S:g} s" in text
    assert f"{leases.SETS_PER_S:g} a second" in text
    assert f"{leases.SETS_AT_ONCE:g} at once" in text
