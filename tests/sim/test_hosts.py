"""Where engines of a pool are: on one host each, whose GPUs are theirs alone."""

from hypothesis import given
from hypothesis import strategies as st

from throttllem.config import FaultOptions
from throttllem.sim.hosts import Hosts


@given(st.lists(st.tuples(st.sampled_from(["place", "remove", "lose", "repair"]), st.integers(0, 9)), max_size=40))
def test_gpus_are_given_once(deeds):
    hosts = Hosts(14, FaultOptions(gpus_per_host=8), seed=1)
    on = {}
    for number, (deed, value) in enumerate(deeds):
        if deed == "place":
            tp = (1, 2, 4)[value % 3]
            had = max((host.free_gpus for host in hosts.hosts if host.up), default=0)
            placed = hosts.place(number, tp)
            assert placed is (had >= tp)
            on |= {number: tp} if placed else {}
        elif deed == "remove" and on:
            on.pop(gone := sorted(on)[value % len(on)])
            hosts.remove(gone)
        elif deed == "lose":
            _, engines = hosts.lose()
            for engine in engines:
                del on[engine]
                hosts.remove(engine)
        elif deed == "repair":
            hosts.repaired(value % 2)
        held = {engine: tp for host in hosts.hosts for engine, tp in host.engines.items()}
        assert held == on
        assert [host.free_gpus + sum(host.engines.values()) for host in hosts.hosts] == [8, 6]


def test_an_engine_goes_where_the_least_room_is_left():
    hosts = Hosts(16, FaultOptions(gpus_per_host=8), seed=1)
    for engine, tp in enumerate((4, 2, 1)):
        assert hosts.place(engine, tp)
    assert [host.free_gpus for host in hosts.hosts] == [1, 8]
    assert hosts.place(9, 2)
    assert [host.free_gpus for host in hosts.hosts] == [1, 6]


def test_no_host_is_lost_unless_it_is_asked_for():
    assert Hosts(8, FaultOptions(), seed=1).next_loss_s() is None
