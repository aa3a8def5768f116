from dataclasses import replace

import pytest

from throttllem.config import BatchingOptions
from throttllem.engines.simulated.presets import batching
from throttllem.physics.catalogue import Catalogue

A100 = Catalogue.load().gpu("a100-40gb-sxm")
H100 = Catalogue.load().gpu("h100-80gb-sxm")
BIG_A100 = A100.model_copy(update={"name": "a100-80gb-sxm", "memory_bytes": 85.9e9})
B200 = H100.model_copy(update={"name": "b200", "memory_bytes": 192e9})
SMALL = A100.model_copy(update={"name": "l4", "memory_bytes": 24e9})


@pytest.mark.parametrize(
    ("engine", "gpu", "tokens", "sequences", "block"),
    [
        ("vllm", A100, 2048, 256, 16),
        ("vllm", BIG_A100, 2048, 256, 16),
        ("vllm", H100, 8192, 1024, 16),
        ("vllm", B200, 16384, 1024, 16),
        ("tensorrt-llm", H100, 8192, 2048, 32),
        ("sglang", SMALL, 2048, 2048, 1),
        ("sglang", A100, 4096, 2048, 1),
        ("sglang", H100, 8192, 2048, 1),
        ("sglang", B200, 16384, 2048, 1),
    ],
)
def test_documented_defaults(engine, gpu, tokens, sequences, block):
    found = batching(BatchingOptions(engine=engine), gpu)
    assert (found.prefill_budget_tokens, found.max_batch, found.block_tokens) == (tokens, sequences, block)
    assert found.chunked == (engine != "tensorrt-llm") and found.no_evict == (engine == "tensorrt-llm")


def test_an_option_that_is_set_wins_and_is_named():
    found = batching(BatchingOptions(chunked=False, block_tokens=64, max_batch=256), A100)
    assert (found.chunked, found.block_tokens, found.prefill_budget_tokens) == (False, 64, 2048)
    assert found.changed == ("block_tokens", "chunked"), "max_batch is vLLM's own there"
    assert found.described.startswith("vLLM 0.32 (whole prompts, ")
    assert found.described.endswith("set: block_tokens, chunked)")
    assert "set:" not in replace(found, changed=()).described
