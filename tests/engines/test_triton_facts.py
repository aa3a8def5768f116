from engines.triton_peer import PAGE, SPEC
from throttllem.engines.triton.api import ENSEMBLE
from throttllem.engines.triton.facts import Given, Metrics, ModelFacts, capacities, metrics, model_facts


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
    given = Given(max_batch=9, kv_blocks=9, block_tokens=9, max_context_tokens=4096, no_evict=True)
    spec, notes = capacities(SPEC, given, ModelFacts(no_evict=False, max_batch=8), metrics(PAGE))
    assert (spec.kv_blocks, spec.block_tokens, spec.max_batch) == (6239, 32, 512)
    assert (spec.max_context_tokens, spec.no_evict, spec.chunked) == (4096, True, False)
    assert notes == []


def test_what_a_user_gave_goes_before_the_configuration():
    spec, notes = capacities(SPEC, Given(max_batch=9, kv_blocks=90), ModelFacts(max_batch=64), Metrics())
    assert (spec.max_batch, spec.kv_blocks, spec.block_tokens) == (9, 90, 64)
    assert [note.rpartition(" ")[2] for note in notes] == ["engines.max_context_tokens"]


def test_every_assumption_is_said():
    spec, notes = capacities(SPEC, Given(block_tokens=32), ModelFacts(max_batch=64), Metrics())
    assert (spec.max_batch, spec.kv_blocks, spec.block_tokens) == (64, 2000, 32)
    assert len(notes) == 3
    spec, notes = capacities(SPEC, Given(), ModelFacts(), Metrics())
    assert spec == SPEC
    assert len(notes) == 3
