"""The model of an engine is what the engine says that it is, as far as its figures are known."""

import json
from dataclasses import replace

import pytest

from throttllem.config import BatchingOptions
from throttllem.engines.base import Connected
from throttllem.engines.simulated.fleet import UNKNOWN, fleet_without_model
from throttllem.gateway.control.engine_model import EngineModel
from throttllem.gpu.device import Work
from throttllem.physics.catalogue import Catalogue
from throttllem.physics.engine import EnginePhysics

CATALOGUE = Catalogue.load()
GPU = "h100-80gb-sxm"
SPEC = fleet_without_model(CATALOGUE, GPU, (1,), BatchingOptions()).specs[1]
WORK = Work(seconds=0.01, decode_sequences=8, kv_tokens=8000, prefill_tokens=0, prefill_pairs=0.0)


def model(configured=None):
    physics = configured and EnginePhysics(CATALOGUE.gpu(GPU), CATALOGUE.model(configured), 1)
    return EngineModel(catalogue=CATALOGUE, gpu=GPU, tp=1, configured=configured, name=configured, physics=physics)


def says(*models, roots=(), **more):
    return Connected(spec=SPEC, models=models, roots=roots, **more)


def test_without_a_model_nothing_is_bounded_and_nothing_modelled():
    assert (SPEC.model, SPEC.clocks_mhz[-1]) == (UNKNOWN, 1980)
    assert SPEC.kv_blocks > 10**9 and SPEC.max_context_tokens > 10**9
    assert not model().known


@pytest.mark.parametrize("reported", [says("chat", roots=("Qwen/Qwen3-8B",)), says("Qwen/Qwen3-8B")])
def test_the_engine_is_asked(reported):
    found = model()
    found.reached(reported)
    assert (found.name, found.known, found.notes) == ("qwen3-8b", True, ())
    plain = found.watts(1980, WORK)
    found.reached(replace(reported, kv_cache_dtype="fp8"))
    assert found.physics.model.kv_bytes == 1.0 and found.watts(1980, WORK) != plain


def test_a_folder_of_this_machine(tmp_path):
    config = {"model_type": "llama", "hidden_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 8}
    config |= {"intermediate_size": 4096, "vocab_size": 32000, "max_position_embeddings": 4096}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = model()
    found.reached(says("mine", roots=(str(tmp_path),)))
    assert found.physics.model.layers == 8
    (tmp_path / "config.json").write_text("{}")
    found.reached(says("mine", roots=(str(tmp_path),)))
    assert not found.known and "num_hidden_layers: missing" in found.notes[0], "no figure of what was there before"


def test_a_config_of_what_the_engine_serves_is_no_contradiction(tmp_path):
    config = {"model_type": "qwen3_moe", "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32}
    config |= {"num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 6144, "moe_intermediate_size": 768}
    config |= {"num_experts": 128, "num_experts_per_tok": 8, "vocab_size": 151936, "max_position_embeddings": 40960}
    config |= {"quantization_config": {"quant_method": "fp8"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = model(str(tmp_path))
    found.reached(says("Qwen/Qwen3-30B-A3B-FP8"))
    assert found.notes == ()
    found.reached(says("Qwen/Qwen3-8B"))
    assert "the engine serves Qwen/Qwen3-8B, and engines.model says" in found.notes[0]


def test_a_model_that_is_not_known_has_no_figures():
    found = model()
    found.reached(says("chat", roots=("someone/secret-7b",)))
    assert (found.name, found.known) == (None, False)
    assert "the engine serves someone/secret-7b, chat, whose figures are not known" in found.notes[0]
    assert "engines.N.model (--model)" in found.notes[0]


def test_a_model_too_large_for_the_gpu_is_not_modelled():
    found = model()
    found.reached(says("meta-llama/Llama-3.3-70B-Instruct"))
    assert not found.known and "smallest tp that fits" in found.notes[0]


def test_a_configured_model_stays_and_a_difference_is_said():
    found = model("llama-3-8b")
    found.reached(says("chat"))
    assert (found.name, found.notes) == ("llama-3-8b", ())
    found.reached(says("chat", roots=("Qwen/Qwen3-8B",)))
    assert found.known and "serves Qwen/Qwen3-8B, chat, and engines.model says llama-3-8b" in found.notes[0]
    found.reached(says("meta-llama/Llama-3.1-8B-Instruct"))
    assert found.notes == ()
