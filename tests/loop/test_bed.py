"""The bed without its processes: how vLLM is paced, and what is checked."""

import random
from types import SimpleNamespace

import pytest

from tools.loop import bed
from tools.loop.bed import FLAGS, LoopBed, LoopError
from tools.loop.plan import KIND, Plan, kv_blocks, physics
from tools.nvml.build import NAME
from tools.nvml.machine import Machine
from tools.testbed.engines.vllm_pace import Batch, FakeGpu, Pacer

PARTS = (bed.modelled_part(),)


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    with Machine.create(tmp_path_factory.mktemp("machine") / "gpus", PARTS) as made:
        yield made


def bed_of(gpu):
    others = dict.fromkeys(("workspace", "machine", "server", "keeper", "clients", "tokenizer"))
    return LoopBed(plan=Plan(), gpu=gpu, **others)


def test_a_gpu_that_stays_locked_is_a_failure(monkeypatch):
    monkeypatch.setattr(bed, "FREE_S", 0.02)
    assert bed_of(SimpleNamespace(lock=None)).freed() < 0.02
    with pytest.raises(LoopError, match="still locked to"):
        bed_of(SimpleNamespace(lock=(570, 570))).freed()


def test_vllm_has_the_blocks_of_the_modelled_gpu():
    assert FLAGS[FLAGS.index("--num-gpu-blocks-override") + 1] == str(kv_blocks() + 1)


def test_vllm_has_the_pace_and_the_watts_of_the_modelled_gpu(machine, tmp_path):
    found = bed.pace(machine, PARTS[0], tmp_path / "steps.csv").physics
    assert (found.kind, found.tp) == (KIND, 1)
    assert set(found.busy_w) == {str(mhz) for mhz in physics().gpu.clocks_mhz}


def test_no_step_draws_more_than_the_fake_gpu_can():
    part, rng, law = PARTS[0], random.Random(1), physics()
    for mhz, busy_w in zip(part.clocks_mhz, part.busy_w, strict=True):
        for _ in range(20):
            sequences, prompts = rng.randint(0, 63), rng.choice((0, 1, 100, 700, 2048))
            if sequences or prompts:
                batch = Batch(sequences, sequences * rng.randint(1, 4096), prompts, prompts * rng.uniform(1.0, 4000.0))
                assert part.idle_w < law.iteration(mhz, *batch)[1] <= busy_w, batch


def test_the_fake_gpu_draws_what_the_physics_says(machine, monkeypatch):
    for name, value in machine.environment().items():
        monkeypatch.setenv(name, value)
    part, gpu = PARTS[0], machine.gpus[0]
    busy_w = dict(zip(part.clocks_mhz, part.busy_w, strict=True))
    seen = FakeGpu(str(machine.library_folder / NAME), 0)
    pacer = Pacer(physics().iteration, seen, part.idle_w, busy_w)
    assert seen.clock_mhz() == 1410
    for batch in (Batch(32, 32_000, 0, 0.0), Batch(8, 9000, 2000, 2e6), Batch(1, 100, 0, 0.0)):
        pacer.begin(batch, last=False)
        assert gpu.watts == pytest.approx(physics().iteration(1410, *batch)[1], rel=1e-6)
        assert gpu.clock_mhz == 1410
        pacer.finish()
    with pytest.raises(OSError, match="utilisation 9"):
        seen.work(9.0, 1.0)
