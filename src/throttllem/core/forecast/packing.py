"""How an engine packs waiting prompts into one iteration. The batcher does it; the projection foresees it.

Knows nothing of KV blocks or requests: lengths in, tokens per prompt out.
"""

from __future__ import annotations

from collections.abc import Iterable


def pack(prompt_tokens: Iterable[int], decode_sequences: int, *, budget: int, slots: int, chunked: bool) -> list[int]:
    """Tokens of each waiting prompt that the next iteration processes, first come first served.

    `prompt_tokens` are the tokens still to be processed of each prompt in order; `decode_sequences` take one token of
    `budget` each; at most `slots` prompts join. Whole prompts (TensorRT-LLM) go while they fit, the first one always;
    chunked (vLLM) the last one is cut to what is left. The list ends at the first prompt that gets nothing.
    """
    left = budget - decode_sequences
    taken: list[int] = []
    for tokens in prompt_tokens:
        if len(taken) == slots:
            break
        share = min(tokens, left) if chunked else tokens
        if share <= 0 or (share > left and taken):
            break
        taken.append(share)
        left -= share
    return taken
