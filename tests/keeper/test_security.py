"""The guarantees of docs/keeper.md, one test each, in the page's order; what is exhausted or goes back is in
test_security_bounds. The last test here compares the two lists.
"""

import ast
import json
import os
import re
import signal
import time
from pathlib import Path

from tests.keeper.rig import LONG_S, NOBODY, TTL_S, locks, needs_root, until
from tests.keeper.test_size import KEEPER
from tests.keeper.test_socket import GARBAGE
from throttllem.keeper.leases import SETS_AT_ONCE, SETS_PER_S
from tools.nvml.machine import Op

PAGE = Path(__file__).parents[2] / "docs/keeper.md"
STATUS = {"op": "status"}


# ---- who may ask ----------------------------------------------------------------------------------------------


@needs_root
def test_only_root_and_named_users_are_heard(keepers):
    keeper = keepers(users=[NOBODY])
    assert [answer["ok"] for answer in keeper.other("speak", socket=str(keeper.socket), uid=NOBODY, lines=[STATUS])]
    (answer,) = keeper.other("speak", socket=str(keeper.socket), uid=NOBODY - 1, lines=[STATUS])
    assert answer in ("ConnectionAbortedError", "ConnectionResetError", "BrokenPipeError")
    assert f"of user {NOBODY - 1}" not in keeper.said, "turned away before a byte of it is read"
    (answer,) = keeper.other("speak", socket=str(keeper.socket), uid=None, lines=[STATUS])
    assert answer["ok"]


@needs_root
def test_who_asks_is_told_by_the_kernel(keepers):
    keeper = keepers(users=[NOBODY])
    lies = {"uid": 0, "user": "root", "pid": 1, "holder": "process 1 of user 0"}
    lines = [{"op": "lease", "gpus": keeper.uuids, "ttl_s": LONG_S, **lies}, STATUS]
    _, answer = keeper.other("speak", socket=str(keeper.socket), uid=NOBODY, lines=lines)
    assert {each["by"].split(" of ")[1] for each in answer["held"].values()} == {f"user {NOBODY}"}


# ---- what a gateway that was taken over can do ----------------------------------------------------------------


def test_it_can_set_only_gpus_that_are_allowed(keepers, machine):
    keeper = keepers(clocks=[(210, 1410)])
    with keeper.talk() as talk:
        for gpus in ([keeper.uuids[1]], keeper.uuids, ["GPU-x"], ["0"], [""], ["*"]):
            assert talk.refused("lease", gpus=gpus, ttl_s=LONG_S) == "not-allowed"
    assert machine.writes() == []


def test_it_can_set_only_clocks_in_range(keepers, machine):
    keeper = keepers(clocks=[(600, 1200), (600, 1200)])
    with keeper.holds() as talk:
        for mhz in (599, 1201, 0, -900, 2**63):
            assert talk.refused("set", mhz=mhz) == "range"
        talk.done("set", mhz=1200)
        talk.say({"op": "set", "mhz": "1100"})
        assert talk.hung_up(), "what is no whole number is no clock"
    until(lambda: locks(machine) == [None, None])
    assert {(write.op, write.low, write.high) for write in machine.writes()} == {
        (Op.LOCK, 1200, 1200),
        (Op.UNLOCK, 0, 0),
    }


def test_it_can_do_nothing_else_to_a_gpu(keeper, machine):
    asked = ["power", "power_limit", "limit", "persistence", "reset", "memory", "fan", "mig", "lock", "unlock", "exec"]
    with keeper.holds() as talk:
        for op in asked:
            assert talk.refused(op, mhz=900, watts=100, gpus=keeper.uuids) == "malformed"
        talk.done("set", mhz=900, low_mhz=1, high_mhz=2000, watts=100)
    until(lambda: locks(machine) == [None, None])
    assert {write.op for write in machine.writes()} <= {Op.LOCK, Op.UNLOCK}


def test_it_can_set_at_a_bounded_rate_only(keeper, machine):
    begun_s, done, refused = time.monotonic(), 0, 0
    while time.monotonic() < begun_s + 0.6:
        with keeper.holds() as talk:  # a new lease is no new allowance
            while talk.ask("set", mhz=900)["ok"]:
                done += 1
            refused += 1
        until(lambda: not keeper.status()["held"] and not keeper.status()["returning"])
    assert refused > 1
    assert done <= SETS_AT_ONCE + SETS_PER_S * (time.monotonic() - begun_s) + 1
    assert sum(write.op is Op.LOCK for write in machine.writes()) == 2 * done


def test_it_can_hold_a_clock_only_as_long_as_it_says_that_it_lives(keeper, machine):
    with keeper.talk() as talk:
        assert talk.refused("lease", gpus=keeper.uuids, ttl_s=60.001) == "malformed"
        talk.done("lease", gpus=keeper.uuids, ttl_s=TTL_S)
        talk.done("set", mhz=900)
        until(lambda: locks(machine) == [None, None], TTL_S + 0.5)


def test_it_cannot_keep_a_lock_after_its_death(keeper, nursery, machine):
    given = {"socket": str(keeper.socket), "gpus": keeper.uuids, "mhz": 900, "ttl_s": LONG_S, "fork": False}
    pid, log = keeper.begun("hold_on", **given)
    until(lambda: log.exists() and "held" in log.read_text())
    assert locks(machine) == [(900, 900)] * 2
    os.kill(pid, signal.SIGKILL)
    until(lambda: locks(machine) == [None, None], 2.0)
    nursery.wait(pid)


def test_it_cannot_leave_a_lock_to_a_child(keeper, nursery, machine):
    given = {"socket": str(keeper.socket), "gpus": keeper.uuids, "mhz": 900, "ttl_s": 0.4, "fork": True}
    pid, log = keeper.begun("hold_on", **given)
    until(lambda: log.exists() and "held" in log.read_text())
    nursery.wait(pid)
    assert locks(machine) == [(900, 900)] * 2, "the child has the connection, but says nothing"
    until(lambda: locks(machine) == [None, None])
    os.killpg(pid, signal.SIGKILL)


def test_it_cannot_touch_what_another_holds(keeper, machine):
    with keeper.holds(0, mhz=900) as talk, keeper.talk() as other:
        assert other.refused("lease", gpus=keeper.uuids[:1], ttl_s=1) == "held"
        assert [other.refused(op, gpus=keeper.uuids[:1], mhz=1005) for op in ("set", "beat", "release")] == [
            "malformed"
        ] * 3
        other.done("lease", gpus=keeper.uuids[1:], ttl_s=LONG_S)
        other.done("set", mhz=1005, gpus=keeper.uuids)
        assert locks(machine) == [(900, 900), (1005, 1005)]
        other.done("release")
        assert locks(machine) == [(900, 900), None]
        assert talk.done("beat")


def test_it_cannot_lock_a_gpu_that_others_share(keeper, machine):
    machine.gpus[0].mig(True)
    machine.gpus[1].mps([4711])
    for number, word in enumerate(("MIG", "MPS")):
        with keeper.holds(number) as talk:
            answer = talk.ask("set", mhz=900)
            assert (answer["code"], word in answer["error"]) == ("gpu", True)
    assert machine.writes() == []


# ---- what it cannot reach -------------------------------------------------------------------------------------


@needs_root
def test_it_cannot_reach_the_journal_nor_the_socket(keepers):
    keeper = keepers(users=[NOBODY])
    with keeper.holds(mhz=900):
        files = [*keeper.copies, keeper.run / ".lock", keeper.socket]
        done = keeper.other("touch", uid=NOBODY, paths=list(map(str, files)))
        assert all("written" not in each and "removed" not in each for each in done)
        assert keeper.journal == dict.fromkeys(keeper.uuids)


def test_it_cannot_change_what_is_allowed(keeper, talk):
    before = keeper.status()
    for op in ("allow", "config", "reload", "status", "normally"):
        talk.ask(op, allowed={uuid: [1, 9999] for uuid in keeper.uuids}, gpu=["GPU-x=1-2"], users=[NOBODY])
    assert keeper.status() == before
    source = "".join(path.read_text() for path in KEEPER.glob("*.py"))
    assert "setattr" not in source
    assert "environ[" not in source


def test_it_cannot_make_the_keeper_open_run_or_reach_anything(keepers, folder):
    keeper = keepers(what="keep_watched", seen=str(folder / "seen"))
    keeper.holds(mhz=900).done("release")  # what is imported or opened once has been
    with keeper.talk() as talk:
        talk.say(GARBAGE[0])
        talk.hung_up()
    until(lambda: keeper.journal == {})
    (folder / "seen").write_text("")
    for said in GARBAGE:
        with keeper.talk() as talk:
            talk.say(said)
            talk.hung_up()
    paths = ["/etc/passwd", "../../x", "http://127.0.0.1:1/", str(folder / "secret"), "__import__('os')"]
    with keeper.talk() as talk:
        for path in paths:
            talk.ask("lease", gpus=[path], ttl_s=1, socket=path, state=path, file=path)
            talk.ask(path, path=path)
    with keeper.holds(mhz=900) as talk:
        talk.done("release")
    until(lambda: keeper.journal == {})
    events = [json.loads(line) for line in (folder / "seen").read_text().splitlines()]
    own = {str(path) for copy in keeper.copies for path in (copy, copy.with_suffix(".part"))}
    strange = [event for event in events if event[0] not in ("os.rename", "open") or event[1] not in own]
    assert [event for event in strange if event[0] != "os.chmod"] == []
    assert events, "its own journal was seen"


def test_what_is_said_is_data(keeper):
    evaluating = {"eval", "exec", "compile", "__import__", "loads", "import_module", "getattr", "setattr", "system"}
    called = set()
    for path in KEEPER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and (name := ast.unparse(node.func)).split(".")[-1] in evaluating:
                called.add(name)
    assert called == {"json.loads"}


# ---- the page -------------------------------------------------------------------------------------------------


def test_every_guarantee_of_the_page_is_tested_and_nothing_else():
    part = PAGE.read_text().split("\n## What it guarantees\n", 1)[1].split("\n## ", 1)[0]
    guaranteed = re.findall(r"^\d+\. .*?`(test_\w+)`", part, re.MULTILINE | re.DOTALL)
    numbered = re.findall(r"^(\d+)\. ", part, re.MULTILINE)
    files = Path(__file__), Path(__file__).with_name("test_security_bounds.py")
    nodes = [node for file in files for node in ast.parse(file.read_text()).body]
    tests = [node.name for node in nodes if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    tests.remove(test_every_guarantee_of_the_page_is_tested_and_nothing_else.__name__)
    assert numbered == [str(number) for number in range(1, len(numbered) + 1)]
    assert guaranteed == tests
