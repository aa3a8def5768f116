import pytest

from tests.engines.vllm_peer import CARD, VllmPeer, connected
from throttllem.engines.base import EngineError

NO_STEPS = "progress is counted from streams and /metrics: set engines.stats and install the plug-in in vLLM"


def test_capacities_are_the_engines():
    peer = VllmPeer()
    peer.info = {"engines": 1, "servers": 1, "stats": ""}
    found = connected(peer)
    spec = found.spec
    assert (spec.gpu, spec.model, spec.tp, spec.clocks_mhz, spec.idle_w) == tuple(CARD.values())
    # One block is vLLM's own.
    assert (spec.kv_blocks, spec.block_tokens, spec.max_batch, spec.prefill_budget_tokens) == (4095, 128, 64, 2048)
    assert (spec.max_context_tokens, spec.chunked, spec.no_evict) == (4096, True, False)
    assert (found.models, found.version, found.exact) == (("tiny", "lora"), "0.32.0", False)
    assert (found.default_max_tokens, found.notes) == (16, (NO_STEPS,))


def test_what_is_assumed_is_said():
    found = connected(VllmPeer())
    assert (found.spec.max_batch, found.spec.prefill_budget_tokens) == (256, 2048)
    assert [note for note in found.notes if "max_batch: 256 is assumed" in note]
    assert [note for note in found.notes if "tokens per step: 2048 is assumed" in note]


def test_development_mode_tells_the_batch():
    peer = VllmPeer()
    scheduler = {"max_num_seqs": 32, "max_num_batched_tokens": 512, "enable_chunked_prefill": False}
    peer.server_info = {"vllm_config": {"scheduler_config": scheduler}}
    found = connected(peer)
    assert (found.spec.max_batch, found.spec.prefill_budget_tokens, found.spec.chunked) == (32, 512, False)
    assert found.notes == (NO_STEPS,)


def test_the_configuration_caps_what_the_engine_tells():
    peer = VllmPeer()
    peer.info = {"engines": 1, "servers": 1, "stats": ""}
    found = connected(peer, max_batch=8, kv_blocks=9999, max_context_tokens=4096, block_tokens=7)
    assert (found.spec.max_batch, found.spec.kv_blocks, found.spec.block_tokens) == (8, 4095, 128)
    assert found.notes[:2] == (
        "max_batch = 8 of the configuration is taken as a cap: the engine says 64",
        "kv_blocks = 9999 of the configuration is not used: the engine says 4095",
    )


def test_several_engines_behind_one_address():
    peer = VllmPeer()
    peer.cache += '} 1.0\nvllm:cache_config_info{engine="1",' + peer.cache
    peer.info = {"engines": 2, "servers": 1, "stats": "127.0.0.1:1"}
    found = connected(peer, stats="127.0.0.1:1")
    assert (found.spec.kv_blocks, found.spec.max_batch) == (2 * 4095, 128)
    assert "steps of 2 engines and 1 API servers are no whole: run one of each" in found.notes


def test_tokens_that_take_blocks_of_several_kinds():
    peer = VllmPeer()
    peer.cache = 'num_gpu_blocks="100",block_size="16",kv_cache_size_tokens="400"'
    assert connected(peer).spec.block_tokens == 4


def test_kin_without_metrics_take_the_configuration():
    peer = VllmPeer()
    peer.metrics, peer.tokenize, peer.models = False, False, [{"id": "kin"}]
    with pytest.raises(EngineError, match=r"set engines\.kv_blocks"):
        connected(peer, max_context_tokens=100)
    with pytest.raises(EngineError, match=r"set engines\.max_context_tokens"):
        connected(peer, kv_blocks=10)
    found = connected(peer, kv_blocks=10, max_context_tokens=100, max_batch=4)
    assert (found.spec.kv_blocks, found.spec.block_tokens, found.spec.max_batch) == (10, 16, 4)
    assert [note for note in found.notes if "block_tokens: 16 is assumed" in note]
    assert [note for note in found.notes if "no /tokenize and no tokenizer" in note]


def test_the_key_goes_with_every_question():
    peer = VllmPeer()
    connected(peer, api_key="secret")
    assert peer.headers[0]["Authorization"] == "Bearer secret"


@pytest.mark.parametrize(
    ("broken", "words"),
    [({"health": 503}, "not well"), ({"models": []}, "names no model"), ({"models": [{"id": 5}]}, "names no model")],
)
def test_an_engine_that_is_not_well(broken, words):
    peer = VllmPeer()
    for name, value in broken.items():
        setattr(peer, name, value)
    with pytest.raises(EngineError, match=words):
        connected(peer)
