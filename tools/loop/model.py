"""Makes the least Llama that vLLM serves: a step of it is over long before a modelled GPU's would be.

Run by the Python of vLLM's environment, in the checkout: `python -m tools.loop.model FOLDER`. Text means nothing.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch  # type: ignore[import-not-found, unused-ignore]
from transformers import (  # type: ignore[import-not-found, unused-ignore]
    LlamaConfig,
    LlamaForCausalLM,
)

from tools.engines.tiny_model import VOCABULARY, make_tokenizer


def make_model(folder: Path) -> None:
    """One layer of width 64 with one head."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=8192,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    make_tokenizer(target)
    make_model(target)
