import re
from dataclasses import replace

from engines.triton_peer import PAGE, SPEC
from throttllem.engines.base import RemoteOptions
from throttllem.engines.simulated.fleet import UNKNOWN
from throttllem.engines.triton.facts import ENSEMBLE, Metrics, ModelFacts, engine_spec, metrics, model_facts


def known(facts=None, measured=None, **options):
    remote = RemoteOptions(url="http://127.0.0.1:1", kind="triton", **options)
    return engine_spec(SPEC, remote, facts or ModelFacts(), measured or Metrics())


def config(**parameters):
    return {
        "max_batch_size": 64,
        "input": [{"name": "text_input"}, {"name": "random_seed"}],
        "parameters": {name: {"string_value": value} for name, value in parameters.items()},
    }


def test_metrics_are_read():
    assert metrics(PAGE) == Metrics(
        kv_blocks=6239, block_tokens=32, used_blocks=17, active=5, scheduled=3, max_requests=512
    )
    assert metrics(b"nv_inference_count 3\n") == Metrics()


def test_a_configuration_is_read():
    facts = model_facts(config(batch_scheduler_policy="guaranteed_no_evict", enable_chunked_context="true"))
    assert facts == ModelFacts(
        inputs=frozenset({"text_input", "random_seed"}), max_batch=64, no_evict=True, chunked=True
    )
    assert model_facts(config(batch_scheduler_policy="max_utilization")).no_evict is False
    assert model_facts(config(batch_scheduler_policy="${batch_scheduler_policy}")).no_evict is None
    assert model_facts({"max_batch_size": 0, "parameters": 3}) == ModelFacts(inputs=ENSEMBLE)


def test_what_is_measured_goes_first_and_nothing_is_assumed_then():
    options = {"max_batch": 9, "kv_blocks": 9, "block_tokens": 9, "max_context_tokens": 4096}
    spec, notes = known(ModelFacts(no_evict=True, max_batch=8), metrics(PAGE), **options)
    assert (spec.kv_blocks, spec.block_tokens, spec.max_batch) == (6239, 32, 512)
    assert (spec.max_context_tokens, spec.no_evict, spec.chunked) == (4096, True, False)
    assert notes == []


def test_options_go_before_the_models_configuration():
    spec, notes = known(ModelFacts(max_batch=64), max_batch=9, kv_blocks=90)
    assert (spec.max_batch, spec.kv_blocks, spec.block_tokens) == (9, 90, 64)
    assert len(notes) == 1 and "--set engines.0.max_context_tokens=N" in notes[0]


def test_every_assumption_is_noted():
    spec, notes = known(ModelFacts(max_batch=64), block_tokens=32)
    assert (spec.max_batch, spec.kv_blocks, spec.block_tokens) == (64, 2000, 32)
    assert len(notes) == 3
    spec, notes = known()
    assert spec == SPEC
    assert len(notes) == 3


def test_a_model_that_is_not_known_gives_no_capacity_but_is_served():
    unknown, remote = replace(SPEC, model=UNKNOWN), RemoteOptions(url="http://127.0.0.1:1", kind="triton")
    found, (note,) = engine_spec(unknown, remote, ModelFacts(max_batch=8), Metrics())
    assert (found.unknown, found.max_batch) == (("kv_blocks", "max_context_tokens"), 8)
    assert re.search(r"0\.metrics_url=URL .* engines\.0\.model=NAME .* or --set engines\.0\.kv_blocks=N", note)
    found, _ = engine_spec(unknown, replace(remote, kv_blocks=9, max_context_tokens=512), ModelFacts(), Metrics())
    assert (found.kv_blocks, found.max_context_tokens) == (9, 512)
    found, notes = engine_spec(unknown, remote, ModelFacts(max_batch=8), metrics(PAGE))
    assert (found.kv_blocks, found.max_context_tokens) == (6239, 6239 * 32)
    assert [note for note in notes if "a context of 199648 tokens is assumed: give --set engines.0.max_con" in note]
