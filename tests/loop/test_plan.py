"""The load, and the order of the runs."""

import json
from collections import Counter
from dataclasses import replace

from throttllem.physics.catalogue import Catalogue
from tools.loop.plan import (
    BASELINE,
    CAPACITY_RPS,
    KIND,
    LONGEST_TOKENS,
    OURS,
    POLICIES,
    QUICK,
    Plan,
    kv_blocks,
    load,
    words,
)
from tools.loop.runs import DRY_RUN, ON, run_s, turns
from tools.loop.simulated import entry_from
from tools.testbed.trace import write_mooncake


def test_the_load_fits_the_engine_and_its_share_of_the_capacity():
    sent = load(Plan())
    assert sent == load(Plan())
    assert sent[0].at_s == 0
    assert max(each.prompt_tokens + each.output_tokens for each in sent) <= LONGEST_TOKENS
    assert 0.5 < len(sent) / sent[-1].at_s / CAPACITY_RPS < 0.6
    assert 100 < sent[-1].at_s < 120
    assert f"{len(sent)} requests" in words(sent)


def test_all_tokens_of_the_load_fit_the_cache_at_once(tmp_path):
    file = write_mooncake(load(QUICK), tmp_path / "trace.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert sum(row["input_length"] + row["output_length"] for row in rows) < kv_blocks() * 32


def test_each_policy_has_each_place_equally_often():
    todo = turns(Plan())
    live = [turn.policy for turn in todo if turn.clocks == ON]
    places = Counter((place % 3, policy) for place, policy in enumerate(live))
    assert set(places.values()) == {1} and len(places) == 9
    assert [turn.policy for turn in todo if turn.clocks == DRY_RUN] == [OURS]
    assert len({turn.name for turn in todo}) == 10


def test_quick_is_one_run_under_three_minutes():
    assert [turn.policy for turn in turns(QUICK)] == [OURS]
    assert QUICK.profile_s + run_s(QUICK) + 60 < 180
    assert BASELINE in POLICIES and QUICK.window_s < 40


def test_the_window_leaves_the_last_request_its_slo():
    assert replace(Plan(), seconds=50.0, e2e_s=7.0).window_s == 57.0


def test_the_simulated_gpu_has_no_clock_that_the_keeper_forbids(tmp_path):
    file = tmp_path / "catalogue.toml"
    file.write_text(entry_from(570))
    found, shipped = Catalogue.load(file).gpu(KIND), Catalogue.load(None).gpu(KIND)
    assert found.clocks_mhz[0] == 570
    assert found.model_copy(update={"clock_min_mhz": shipped.clock_min_mhz}) == shipped
