"""Makes the model of the overload test: `python -m tools.evaluation.overload_model FOLDER`, by the engine's own Python.

Larger than the tiny one, so that the engine's core is the bottleneck and not the one that its clients share.
"""

import sys
from pathlib import Path

import torch  # type: ignore[import-not-found, unused-ignore]
from transformers import LlamaConfig, LlamaForCausalLM  # type: ignore[import-not-found, unused-ignore]

from tools.engines.tiny_model import VOCABULARY, make_tokenizer


def main() -> None:
    """Six layers of width 384, with the tiny model's tokenizer."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        bos_token_id=0,
        eos_token_id=1,
    )
    make_tokenizer(folder)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


if __name__ == "__main__":
    main()
