from __future__ import annotations

import pytest

from throttllem.reproduce import experiments
from throttllem.reproduce.experiments import ENGINES, ERROR, ORACLE, compare, engine_studies, size_study, summed

from .evaluation import comparison

PARTS = {"seconds": 60.0, "seed": 3}


def test_each_engine_is_studied_at_its_own_maximum_load() -> None:
    studies = engine_studies("poisson", lengths=ERROR, **PARTS)
    assert [(study.model, *study.sizes) for study in studies] == list(ENGINES)
    assert {study.peak_rps for study in studies} == {"max"} and {study.slo_tbt_s for study in studies} == {0.2}
    assert {study.slo_e2e_s for study in studies} == {None}, "what characterize finds"
    assert {study.options.length.p95_error for study in studies} == {0.3}


def test_the_command_repeats_the_comparison() -> None:
    each = comparison(size_study("poisson:rate=2", lengths=ERROR, **PARTS))
    assert each.command.replace("--set batching.kv_cache_dtype=auto ", "") == (
        "throttllem simulate --gpu a100-40gb-sxm --model llama-2-13b --sizes 1,2,4 --trace poisson:rate=2 "
        "--peak-rps max --seconds 60 --seed 3 --length-error 0.3 "
        "--set batching.engine=tensorrt-llm --set batching.block_tokens=64 --set batching.max_batch=256 "
        "--set batching.no_evict=false --policy triton,throttllem+autoscale,least-energy+autoscale"
    )
    assert each.basis.endswith("# 2,000 requests")
    alone = comparison(engine_studies("poisson", lengths=ORACLE, **PARTS)[1])
    assert "--tp 2 " in alone.command and "--length-error" not in alone.command and "--lengths oracle" in alone.command


def test_saved_and_gained_are_against_triton() -> None:
    each = comparison(size_study("poisson", lengths=ORACLE, **PARTS))
    energy = each.runs["throttllem"].energy_j / each.runs["triton"].energy_j
    assert each.saved("throttllem") == pytest.approx(1 - energy)
    assert each.gained("throttllem") == pytest.approx(1 / energy - 1)
    assert each.saved("triton") == each.gained("triton") == 0


def test_the_progress_of_many_is_that_of_one_thing() -> None:
    reports: list[tuple[str, float]] = []
    report = summed("dividing", 2, lambda what, share: reports.append((what, share)))
    for index, share in ((1, 0.5), (0, 1.0), (1, 1.0)):
        report(index, share)
    assert reports == [("dividing", share) for share in (0.0, 0.25, 0.75, 1.0)]


def test_results_go_to_their_study(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """Runs are put in another order, longest first; each must come home."""

    class Stub:
        """A scenario and its own policy names: what `compare` touches of them."""

        def __init__(self, name: str, requests: int) -> None:
            self.name, self.requests, self.capacities, self.trace = name, requests, {}, self

    class Asked:
        def __init__(self, name: str, requests: int, slo_aware: bool) -> None:
            self.scenario = Stub(name, requests)
            self.policies = [type("P", (), {"name": f"p{i}", "slo_aware": slo_aware})() for i in range(2)]

        def prepare(self, *_):
            return self.scenario, self.policies

    monkeypatch.setattr(experiments, "run_all", lambda jobs, **_: [f"{s.name}/{p.name}" for s, p in jobs])
    studies = [Asked("short", 10, False), Asked("long", 50, True), Asked("middle", 90, False)]
    found = compare(studies, None, tmp_path, workers=2, progress=lambda *_: None)
    assert [each.runs for each in found] == [
        {"p0": f"{name}/p0", "p1": f"{name}/p1"} for name in ("short", "long", "middle")
    ]
