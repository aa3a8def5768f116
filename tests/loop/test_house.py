"""The house without its tenants: what they are told, and what is made sure of."""

import json
import os
from types import SimpleNamespace

import pytest

from tools.loop import hook, house
from tools.loop.house import FLAGS, House, LoopError, environment
from tools.loop.plan import KIND, Plan, kv_blocks, physics
from tools.nvml.build import NAME
from tools.nvml.machine import Machine, a100

PARTS = a100(context_keeps_clock=True)


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    with Machine.create(tmp_path_factory.mktemp("machine") / "gpus", PARTS) as made:
        yield made


def house_of(gpu):
    return House(workshop=None, plan=Plan(), gpu=gpu, server=None, keeper=0, clients=None, tokenizer=None)


def test_a_gpu_that_stays_locked_is_a_failure(monkeypatch):
    monkeypatch.setattr(house, "FREE_S", 0.02)
    assert house_of(SimpleNamespace(lock=None)).freed() < 0.02
    with pytest.raises(LoopError, match="still locked to"):
        house_of(SimpleNamespace(lock=(570, 570))).freed()


def test_the_environment_is_put_back(monkeypatch):
    monkeypatch.setenv("KEPT", "1")
    before = dict(os.environ)
    with pytest.raises(KeyError), environment({"KEPT": "2", "NEW": "3"}):
        assert (os.environ["KEPT"], os.environ["NEW"]) == ("2", "3")
        raise KeyError
    assert dict(os.environ) == before


def test_vllm_has_the_blocks_of_the_modelled_gpu():
    assert FLAGS[FLAGS.index("--num-gpu-blocks-override") + 1] == str(kv_blocks() + 1)


def test_the_hook_is_told_all_it_needs(machine, tmp_path):
    told = house._hooked(machine, PARTS[0], tmp_path)
    settings = hook.Settings(**json.loads((tmp_path / "hook.json").read_text()))
    assert told[hook.VARIABLE] == str(tmp_path / "hook.json")
    assert (settings.kind, settings.tp) == (KIND, 1)
    assert set(settings.busy_w) == {str(mhz) for mhz in physics().gpu.clocks_mhz}


def test_the_fake_gpu_draws_what_the_physics_says(machine, monkeypatch):
    for name, value in machine.environment().items():
        monkeypatch.setenv(name, value)
    part, gpu = PARTS[0], machine.gpus[0]
    busy_w = dict(zip(part.clocks_mhz, part.busy_w, strict=True))
    seen = hook.FakeGpu(str(machine.library_folder / NAME), 0)
    pace = hook.RetryEstimator(physics().iteration, seen, part.idle_w, busy_w)
    assert seen.clock_mhz() == 1410
    for batch in (hook.Batch(32, 32_000, 0, 0.0), hook.Batch(8, 9000, 2000, 2e6), hook.Batch(1, 100, 0, 0.0)):
        pace.begin(batch, last=False)
        assert gpu.watts == pytest.approx(physics().iteration(1410, *batch)[1], rel=1e-6)
        assert gpu.clock_mhz == 1410
        pace.finish()
    with pytest.raises(OSError, match="utilisation 9"):
        seen.work(9.0, 1.0)
