"""LoRA adapters that a real vLLM loads and unloads while the gateway is in front of it."""

import asyncio
import json
import struct

import aiohttp
import pytest

from tests.real.vllm import ENVIRONMENT
from tools.testbed.engines.vllm import FLAGS, MODEL, vllm
from tools.testbed.gateway import gateway

pytestmark = pytest.mark.real
RANK = 8


def adapter(model, folder):
    """An adapter of the query projections whose weights are all one."""
    config = json.loads((model / "config.json").read_text())
    width, heads = config["hidden_size"], config["num_attention_heads"]
    out = heads * config.get("head_dim", width // heads)
    head, weights = {}, b""
    for layer in range(config["num_hidden_layers"]):
        for name, shape in (("lora_A", (RANK, width)), ("lora_B", (out, RANK))):
            begin, weights = len(weights), weights + struct.pack("<f", 1.0) * (shape[0] * shape[1])
            tensor = {"dtype": "F32", "shape": shape, "data_offsets": (begin, len(weights))}
            head[f"base_model.model.model.layers.{layer}.self_attn.q_proj.{name}.weight"] = tensor
    written = json.dumps(head).encode()
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(written)) + written + weights)
    about = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 16, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(about | {"target_modules": ["q_proj"]}))
    return folder


async def asked(session, url, name):
    body = {"model": name, "prompt": "def main():", "max_tokens": 8, "temperature": 0}
    async with session.post(url + "/v1/completions", json=body) as response:
        found = await response.json()
        return response.status, found.get("model") or found["error"]["code"]


async def listed(session, url):
    async with session.get(url + "/v1/models") as response:
        return [model["id"] for model in (await response.json())["data"]]


async def come_and_gone(engine, url, folder):
    async with aiohttp.ClientSession() as session:
        seen = [await asked(session, url, "late")]
        body = {"lora_name": "late", "lora_path": str(folder)}
        async with session.post(engine + "/v1/load_lora_adapter", json=body) as response:
            assert response.status == 200, await response.text()
        await asyncio.sleep(1.1)
        seen += [await asked(session, url, "late"), await listed(session, url)]
        async with session.post(engine + "/v1/unload_lora_adapter", json={"lora_name": "late"}) as response:
            assert response.status == 200, await response.text()
        await asyncio.sleep(1.1)
        return [*seen, await listed(session, url), await asked(session, url, "late")]


def test_an_adapter_is_served_once_it_is_loaded(model, tmp_path):
    flags = (*FLAGS, "--enable-lora", "--max-lora-rank", str(RANK))
    allowed = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    folder = adapter(model, tmp_path / "adapter")
    with (
        vllm(ENVIRONMENT, tmp_path, model=model, flags=flags, environment=allowed, report=print) as server,
        gateway(("--engine", server.url), tmp_path / "gateway") as up,
    ):
        seen = asyncio.run(come_and_gone(server.url, up.url, folder))
    unknown = (404, "model_not_found")
    assert seen == [unknown, (200, "late"), [MODEL, "late"], [MODEL], unknown]
