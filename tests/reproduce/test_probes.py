from __future__ import annotations

import pytest

from throttllem.physics.catalogue import Catalogue
from throttllem.physics.engine import EnginePhysics
from throttllem.reproduce.experiments import ENGINES, GPU, MAIN_MODEL
from throttllem.reproduce.probes import KV_BATCHES, PROFILED, clock_sweep, kv_correlation


def test_kv_use_slows_an_engine_down_and_the_seed_decides_the_noise() -> None:
    found = kv_correlation(Catalogue.load(), seed=1)
    assert found.batches == KV_BATCHES
    assert all(0.5 < tbt < 1.0 and -1.0 < rate < -0.5 for tbt, rate in zip(found.tbt, found.throughput, strict=True))
    assert found == kv_correlation(Catalogue.load(), seed=1) != kv_correlation(Catalogue.load(), seed=2)


def test_the_sweep_finds_the_cheapest_clock() -> None:
    catalogue = Catalogue.load()
    sweep = clock_sweep(catalogue, "poisson:input=1000,output=200,seconds=60", seed=0)
    physics = EnginePhysics(catalogue.gpu(GPU), catalogue.model(MAIN_MODEL), 4)
    assert sweep.context_tokens == 1100
    assert sweep.batch == physics.kv_capacity_tokens() // 1100

    def joules(mhz: int) -> float:
        seconds, watts = physics.iteration(mhz, sweep.batch, sweep.batch * 1100, 0, 0.0)
        return seconds * watts

    assert all(joules(sweep.best_mhz) <= joules(mhz) for mhz in physics.gpu.clocks_mhz)
    assert sweep.tpj_gain == pytest.approx(joules(1410) / joules(sweep.best_mhz) - 1)
    assert sweep.low_excess == pytest.approx(joules(840) / joules(sweep.best_mhz) - 1)
    assert 0 < sweep.throughput_loss < 0.2


def test_requests_that_no_engine_holds_are_refused() -> None:
    with pytest.raises(ValueError, match="a typical request of 900500 tokens does not fit llama-2-13b at TP 4"):
        clock_sweep(Catalogue.load(), "poisson:input=900000,output=1000", seed=0)


def test_every_engine_is_profiled_once() -> None:
    assert sorted((model, tp) for model, sizes in PROFILED for tp in sizes) == sorted(ENGINES)
