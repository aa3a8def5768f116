"""Makes a tiny random Llama with a tokenizer and a chat template, for engines that only have to be real, not clever.

Run by the Python of an engine's own environment: `python tiny_model.py FOLDER [--least]`. No network: the tokenizer is
trained on the standard library's sources. Text and speed mean nothing; tokens, batches and KV blocks do.
"""

import sys
import sysconfig
from pathlib import Path

import torch  # type: ignore[import-not-found, unused-ignore]
from tokenizers import ByteLevelBPETokenizer
from transformers import (  # type: ignore[import-not-found, unused-ignore]
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

VOCABULARY = 8192
TINY = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
"""8 MB, a few milliseconds per token on one core."""
LEAST = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
}
"""The least that vLLM serves: a step of it is over long before a modelled GPU's would be."""
BEGIN, END = "<s>", "</s>"
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}]\n{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)


def make_tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer: every text has tokens, and tokens join to the text."""
    sources = sorted(str(path) for path in Path(sysconfig.get_path("stdlib")).glob("*.py"))
    trained = ByteLevelBPETokenizer()
    trained.train(sources, vocab_size=VOCABULARY, special_tokens=[BEGIN, END], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, bos_token=BEGIN, eos_token=END)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


def make_model(folder: Path, **shape: int) -> None:
    """Random weights, the same ones each time."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=8192, bos_token_id=0, eos_token_id=1, **shape)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def main() -> None:
    """Write both into the folder named on the command line."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    make_tokenizer(folder)
    make_model(folder, **(LEAST if "--least" in sys.argv[2:] else TINY))


if __name__ == "__main__":
    main()
