import asyncio
import math

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Gauge, generate_latest

from tests.engines.vllm_peer import SPEC, VllmPeer, connected, engine_of
from throttllem.cli.commands.profile import spelled
from throttllem.core.admission import never_fits
from throttllem.core.types import Request, Slo
from throttllem.engines.base import EngineError
from throttllem.engines.capacity import CARD_CHARACTERS, MOST_CONTEXT_TOKENS, samples, total
from throttllem.engines.kinds import MOST_BATCH, MOST_KV_BLOCKS

NO_STEPS = (
    "progress is counted from streams and /metrics: "
    "give --set engines.0.stats=SOCKET (in TOML: stats of [[engines]]) and install the plug-in in vLLM"
)


def test_capacities_are_the_engines():
    peer = VllmPeer()
    peer.info = {"engines": 1, "servers": 1, "stats": ""}
    found = connected(peer)
    spec = found.spec
    same = ("gpu", "model", "tp", "clocks_mhz", "idle_w")
    assert [getattr(spec, name) for name in same] == [getattr(SPEC, name) for name in same]
    assert spec.startup_s == 0  # it runs already
    # One block is vLLM's own.
    assert (spec.kv_blocks, spec.block_tokens, spec.max_batch, spec.prefill_budget_tokens) == (4095, 128, 64, 2048)
    assert (spec.max_context_tokens, spec.chunked, spec.no_evict) == (4096, True, False)
    assert (found.models, found.version, found.exact) == (("tiny", "lora"), "0.32.0", False)
    assert (found.default_max_tokens, found.notes) == (16, (NO_STEPS,))


def test_checkpoints_behind_the_names_but_no_adapter():
    peer = VllmPeer()
    assert (connected(peer).roots, connected(peer).kv_cache_dtype) == ((), "auto")
    peer.models = [
        {"id": "tiny", "root": "Qwen/Qwen3-8B", "parent": None, "max_model_len": 4096},
        {"id": "lora", "root": "/adapters/lora", "parent": "tiny"},
        {"id": "odd", "root": 5},
    ]
    peer.cache += ',cache_dtype="fp8_e4m3"'
    found = connected(peer)
    assert (found.roots, found.kv_cache_dtype) == (("Qwen/Qwen3-8B",), "fp8")


def test_assumptions_are_noted():
    found = connected(VllmPeer())
    assert (found.spec.max_batch, found.spec.prefill_budget_tokens) == (256, 2048)
    assert [note for note in found.notes if "max_batch: 256 is assumed" in note]
    assert [note for note in found.notes if "tokens per step: 2048 is assumed" in note]


def test_development_mode_reports_the_batch():
    peer = VllmPeer()
    scheduler = {"max_num_seqs": 32, "max_num_batched_tokens": 512, "enable_chunked_prefill": False}
    peer.server_info = {"vllm_config": {"scheduler_config": scheduler}}
    found = connected(peer)
    assert (found.spec.max_batch, found.spec.prefill_budget_tokens, found.spec.chunked) == (32, 512, False)
    assert found.notes == (NO_STEPS,)


def test_the_configuration_caps_reported_capacities():
    peer = VllmPeer()
    peer.info = {"engines": 1, "servers": 1, "stats": ""}
    found = connected(peer, max_batch=8, kv_blocks=9999, max_context_tokens=4096, block_tokens=7)
    assert (found.spec.max_batch, found.spec.kv_blocks, found.spec.block_tokens) == (8, 4095, 128)
    assert found.notes[:2] == (
        "max_batch = 8 of the configuration is taken as a cap: the engine reports 64",
        "kv_blocks = 9999 of the configuration is not used: the engine reports 4095",
    )


def test_several_engines_behind_one_address():
    peer = VllmPeer()
    peer.cache += '} 1.0\nvllm:cache_config_info{engine="1",' + peer.cache
    peer.info = {"engines": 2, "servers": 1, "stats": "127.0.0.1:1"}
    found = connected(peer, stats="127.0.0.1:1")
    assert (found.spec.kv_blocks, found.spec.max_batch) == (2 * 4095, 128)
    assert "stats: steps of 2 engines and 1 API servers cannot be put together: run one of each" in found.notes


def test_tokens_that_take_blocks_of_several_kinds():
    peer = VllmPeer()
    peer.cache = 'num_gpu_blocks="100",block_size="16",kv_cache_size_tokens="400"'
    assert connected(peer).spec.block_tokens == 4


def test_what_is_neither_reported_nor_set_is_unknown_and_named():
    peer = VllmPeer()
    peer.metrics, peer.tokenize, peer.models = False, False, [{"id": "kin"}]
    found = connected(peer, max_context_tokens=100)
    assert (found.spec.unknown, found.spec.max_context_tokens) == (("kv_blocks", "max_batch"), 100)
    assert [note for note in found.notes if "give --set engines.0.kv_blocks=N --set engines.0.max_batch=N" in note]
    assert never_fits(Request(id=1, arrival_s=0.0, prompt_tokens=10, max_tokens=91, slo=Slo()), found.spec)
    bare = connected(peer, flags=spelled)
    assert bare.spec.unknown == ("kv_blocks", "max_context_tokens", "max_batch")
    assert [note for note in bare.notes if "--capacity kv_blocks=N --capacity max_context_tokens=N" in note]
    assert never_fits(Request(id=1, arrival_s=0.0, prompt_tokens=10**5, max_tokens=10**5, slo=Slo()), bare.spec) is None


def test_an_engine_without_metrics_takes_the_configuration():
    peer = VllmPeer()
    peer.metrics, peer.tokenize, peer.models = False, False, [{"id": "kin"}]
    found = connected(peer, kv_blocks=10, max_context_tokens=100, max_batch=4)
    assert (found.spec.kv_blocks, found.spec.block_tokens, found.spec.max_batch) == (10, 16, 4)
    assert found.spec.unknown == ()
    assert [note for note in found.notes if "block_tokens: 16 is assumed" in note]
    assert [note for note in found.notes if "no /tokenize and no tokenizer" in note]


KINDS = {
    "llama.cpp": (
        "/props",
        {"default_generation_settings": {"n_ctx": 4096}, "total_slots": 4},
        (MOST_KV_BLOCKS, 1, 4, 4096, ("kv_blocks",)),
    ),
    "sglang": (
        "/get_server_info",
        {"max_total_num_tokens": 8000, "page_size": 16, "context_length": 4096, "max_running_requests": 32},
        (500, 16, 32, 4096, ()),
    ),
    "tgi": (
        "/info",
        {"max_total_tokens": 2048, "max_batch_total_tokens": 8192, "max_concurrent_requests": 128},
        (8192, 1, 256, 2048, ()),
    ),
    "ollama": (
        "/api/ps",
        {"models": [{"name": "other", "context_length": 7}, {"name": "kin", "context_length": 4096}]},
        (MOST_KV_BLOCKS, 1, MOST_BATCH, 4096, ("kv_blocks", "max_batch")),
    ),
    "nonsense": (
        "/props",
        {"default_generation_settings": {"n_ctx": 10**30}, "total_slots": "4"},
        (MOST_KV_BLOCKS, 1, MOST_BATCH, MOST_CONTEXT_TOKENS, ("kv_blocks", "max_context_tokens", "max_batch")),
    ),
}


@pytest.mark.parametrize(("path", "page", "capacities"), KINDS.values(), ids=KINDS)
def test_other_kinds_report_on_pages_of_theirs(path, page, capacities):
    async def answer(request):
        return web.json_response(page)

    async def tokens(request):
        return web.json_response({"tokens": []})

    async def run():
        peer = VllmPeer()
        peer.metrics, peer.models = False, [{"id": "kin"}]
        routes = {("GET", path): answer, ("POST", "/tokenize"): tokens}
        async with engine_of(peer, routes) as engine:
            return (await engine.connect()).spec

    spec = asyncio.run(run())
    found = (spec.kv_blocks, spec.block_tokens, spec.max_batch, spec.max_context_tokens, spec.unknown)
    assert found == capacities


def test_the_key_goes_with_every_request():
    peer = VllmPeer()
    connected(peer, api_key="secret")
    assert peer.headers[0]["Authorization"] == "Bearer secret"


@pytest.mark.parametrize(
    ("broken", "words"),
    [({"health": 503}, "not healthy"), ({"models": []}, "names no model"), ({"models": [{"id": 5}]}, "names no model")],
)
def test_an_engine_that_is_not_well(broken, words):
    peer = VllmPeer()
    for name, value in broken.items():
        setattr(peer, name, value)
    with pytest.raises(EngineError, match=words):
        connected(peer)


# ---- pages of metrics --------------------------------------------------------------------------------------------

PAGE = b"""# HELP vllm:num_requests_running Number of requests, vllm:num_requests_running 7
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="a,b}\\"\\\\ {"} 3.0
vllm:num_requests_running{engine="1",model_name="x"} 2.0 1712345678000
vllm:num_requests_running_by{engine="0"} 9.0
up 1
bare\t+Inf
odd{a="1" 4.0
odd{} x
odd{ a = "1" , } 5 # {trace="z"} 1.0
"""


def test_only_samples_of_exactly_this_name():
    found = samples(PAGE, "vllm:num_requests_running")
    assert [(sample.labels["engine"], sample.value) for sample in found] == [("0", 3.0), ("1", 2.0)]
    assert found[0].labels["model_name"] == 'a,b}"\\ {'
    assert total(PAGE, "vllm:num_requests_running") == 5.0


def test_lines_that_are_no_samples_are_passed_over():
    assert [(sample.labels, sample.value) for sample in samples(PAGE, "odd")] == [({"a": "1"}, 5.0)]
    assert total(PAGE, "up") == 1.0
    with pytest.raises(EngineError, match="no number from 0"):
        total(PAGE, "bare")


@pytest.mark.parametrize("name", ["running", "vllm", "down", "nothing"])
def test_absent_is_none(name):
    assert total(PAGE, name) is None
    assert total(b"", name) is None


@given(value=st.text(), other=st.text(), number=st.floats(allow_nan=False))
def test_reads_what_the_client_library_writes(value, other, number):
    registry = CollectorRegistry()
    gauge = Gauge("things", "x", ["one", "two"], registry=registry)
    gauge.labels(value, other).set(number)
    page = generate_latest(registry)
    labels, read = next((sample.labels, sample.value) for sample in samples(page, "things"))
    assert (labels, read) == ({"one": value, "two": other}, number)


@given(st.binary(max_size=200))
def test_no_bytes_raise(noise):
    samples(b"x" + noise + b'\nx{a="' + noise, "x")


def test_models_come_and_go_and_odd_names_are_left_out():
    async def run():
        peer = VllmPeer()
        async with engine_of(peer) as engine:
            before = (await engine.connect()).models
            peer.models = [{"id": name} for name in ("tiny", "late", "\x1b[2J", "x" * 513, "", 3)]
            after = tuple(await engine.cards())
            peer.models = [{"id": f"m{number}"} for number in range(5000)]
            many = len(await engine.cards())
            peer.models_status = 503
            with pytest.raises(EngineError):
                await engine.cards()
            return before, after, many

    assert asyncio.run(run()) == (("tiny", "lora"), ("tiny", "late"), 4096)


def test_the_engines_cards_are_kept_whole_up_to_a_bound():
    peer = VllmPeer()
    card = {"id": "tiny", "object": "model", "root": "/m", "parent": None, "permission": [{"id": "p"}], "odd": {"a": 1}}
    peer.models = [card, {"id": "long", "text": "x" * CARD_CHARACTERS}, {"id": "odd", "max_model_len": math.nan}]

    async def run():
        async with engine_of(peer) as engine:
            return (await engine.connect()).cards, await engine.cards()

    assert asyncio.run(run()) == ({"tiny": card, "long": {}, "odd": {}},) * 2
