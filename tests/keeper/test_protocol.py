"""Every operation, answer and code of the protocol in docs/keeper.md, against a real keeper."""

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


def test_status_without_leases(keeper, client):
    first, second = keeper.uuids
    allowed = {first: [210, 1410], second: [600, 1410]}
    answer = client.ok("status")
    assert {key: answer[key] for key in ("allowed", "held", "returning", "before")} == {
        "allowed": allowed,
        "held": {},
        "returning": [],
        "before": {},
    }


def test_a_lease_from_begin_to_end(keeper, client, machine):
    assert client.ok("lease", gpus=keeper.uuids, ttl_s=LONG_S) == {"ok": True}
    assert locks(machine) == [None, None], "a lease alone locks nothing"
    assert client.ok("set", mhz=1005) == {"ok": True}
    assert locks(machine) == [(1005, 1005)] * 2, "set is answered when it is done"
    assert client.ok("beat") == {"ok": True}
    held = keeper.status()["held"]
    assert {uuid: each["mhz"] for uuid, each in held.items()} == dict.fromkeys(keeper.uuids, 1005)
    assert all(re.fullmatch(r"process \d+ of user \d+", each["by"]) for each in held.values())
    assert keeper.status()["before"] == dict.fromkeys(keeper.uuids)
    assert client.ok("set", mhz=600) == {"ok": True}
    assert locks(machine) == [(600, 600)] * 2
    assert client.ok("release") == {"ok": True}
    assert locks(machine) == [None, None], "release is answered when everything is restored"
    assert keeper.status()["held"] == {}
    assert client.ok("lease", gpus=keeper.uuids[:1], ttl_s=LONG_S), "and then the connection may take another lease"


def test_status_shows_a_lease_before_its_first_set(keeper, client):
    client.ok("lease", gpus=keeper.uuids[:1], ttl_s=LONG_S)
    assert keeper.status()["held"][keeper.uuids[0]]["mhz"] is None


@pytest.mark.parametrize("op", ["beat", "set", "release", "dance", "lease\n", None, 1, ["set"]])
def test_malformed_without_a_lease(client, op):
    assert client.rejected(op, mhz=1005) == "malformed"


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
def test_malformed_leases(keeper, client, fields):
    assert client.rejected("lease", **{"gpus": keeper.uuids, **fields}) == "malformed"
    assert keeper.status()["held"] == {}


def test_malformed_twice(keeper, client):
    first, second = keeper.uuids
    assert client.rejected("lease", gpus=[first, first], ttl_s=1) == "malformed"
    client.ok("lease", gpus=[first], ttl_s=LONG_S)
    assert client.rejected("lease", gpus=[second], ttl_s=LONG_S) == "malformed", "one lease a connection"
    assert client.ok("status")["held"].keys() == {first}


def test_held_by_another(keeper, client, machine):
    first, second = keeper.uuids
    with keeper.holds(0, mhz=900):
        assert client.rejected("lease", gpus=[second, first], ttl_s=1) == "held"
        assert keeper.status()["held"].keys() == {first}, "a group is leased as a whole or not at all"
    until(lambda: machine.gpus[0].lock is None and not keeper.status()["returning"])
    client.ok("lease", gpus=[second, first], ttl_s=1)


def test_range(keeper, client, machine):
    client.ok("lease", gpus=keeper.uuids, ttl_s=LONG_S)
    assert [client.rejected("set", mhz=mhz) for mhz in (0, -1, 209, 599, 1411, 10**12)] == ["range"] * 6
    assert locks(machine) == [None, None]
    client.ok("set", mhz=600)


def test_lost(keeper, client, machine):
    client.ok("lease", gpus=keeper.uuids, ttl_s=TTL_S)
    client.ok("set", mhz=900)
    until(lambda: locks(machine) == [None, None])
    assert [client.rejected("set", mhz=900), client.rejected("beat")] == ["lost", "lost"]
    assert client.ok("release"), "a lost lease can be released"
    client.ok("lease", gpus=keeper.uuids, ttl_s=LONG_S)


def test_gpu(keeper, client, machine):
    machine.gpus[0].permission(False)
    client.ok("lease", gpus=keeper.uuids, ttl_s=LONG_S)
    answer = client.request("set", mhz=900)
    assert (answer["code"], keeper.uuids[0] in answer["error"]) == ("gpu", True)


def test_rate(keeper, client):
    client.ok("lease", gpus=keeper.uuids, ttl_s=LONG_S)
    codes = [client.request("set", mhz=900).get("code") for _ in range(60)]
    assert set(codes) == {None, "rate"}
    assert client.ok("beat"), "a heartbeat is not limited"


def test_requests_may_be_pipelined(keeper, client):
    client.send(b'{"op": "status"}\n{"op": "dance"}\n{"op": "status"}\n')
    assert [client.receive()["ok"] for _ in range(3)] == [True, False, True]


def test_the_session_on_the_page_is_as_shown(keepers):
    keeper = keepers(clocks=[(600, 1410)])
    lines = re.findall(r"^    ([<>]) (\{.*\})$", PAGE.read_text(), re.MULTILINE)
    assert len(lines) == 10
    with keeper.client() as client:
        for side, line in lines:
            if side == ">":
                client.send(line.encode() + b"\n")
            else:
                assert client.receive() == json.loads(line)


# ---- the page -------------------------------------------------------------------------------------------------


def codes_in_source():
    found = set()
    for path in KEEPER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "RejectedError":
                found.add(ast.literal_eval(node.args[0]))
    return found


def first_cells(heading):
    """First cells of the table below a heading of the page."""
    part = PAGE.read_text().split(f"\n{heading}\n", 1)[1].split("\n#", 1)[0]
    return [re.findall(r"`([^`]+)`", line.split("|")[1])[0] for line in part.splitlines() if line.startswith("| `")]


def test_the_page_has_every_operation():
    assert set(first_cells("### Operations")) == {"status", "lease", "set", "beat", "release"}


def test_the_page_has_every_code():
    assert set(first_cells("### Codes")) == codes_in_source()


def test_the_page_has_the_numbers():
    text = PAGE.read_text()
    assert f"{leases.MIN_TTL_S:g} to {leases.MAX_TTL_S:g} s" in text
    assert f"{leases.SETS_PER_S:g} a second" in text
    assert f"{leases.SETS_AT_ONCE:g} at once" in text
