"""Which of the known models a checkpoint's name stands for: `Qwen/Qwen3-8B-FP8` is qwen3-8b with FP8 weights.

Only names whose figures are certain count: those listed with a model, and their usual variants. Reads no file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from throttllem.physics.model import Model, Weights

_VARIANT = re.compile(r"-(instruct|it|chat|hf|base|thinking|preview|2[45]\d\d)$")
"""Fine-tuned by the maker; the figures are those of the base model."""

_FORMATS = (
    (r"-bf16", Weights.BF16),
    (r"-fp8(-dynamic|-block)?", Weights.FP8),
    (r"-nvfp4(a16)?", Weights.NVFP4),
    (r"-mxfp4", Weights.MXFP4),
    (r"-(gptq-)?int8|-quantized\.w8a8|-w8a8", Weights.INT8),
    (r"-awq(-int4|-marlin)?|-gptq(-int4)?|-int4|-quantized\.w4a16|-w4a16|(-unsloth)?-bnb-4bit", Weights.INT4),
)
"""Endings of the name of a checkpoint in another number format."""


def recognised(name: str, models: Iterable[Model]) -> Model | None:
    """The model of a checkpoint `OWNER/NAME` (the owner does not matter), or of a folder of that name; else None."""
    short, weights = name.rstrip("/").rpartition("/")[2].lower(), None
    for ending, found in _FORMATS:
        if match := re.search(f"({ending})$", short):
            short, weights = short[: match.start()], found
            break
    plain = _base(short)
    for model in models:
        listed = {model.name.lower(), *(each.rpartition("/")[2].lower() for each in model.huggingface)}
        if short in listed or plain in listed or plain in {_base(each) for each in listed}:
            return model if weights is None else _stored(model, name, weights)
    return None


def named_by_figures(model: Model, models: Iterable[Model]) -> str | None:
    """The name of the known model of the same figures; with its number format (`qwen3-8b-fp8`) if that alone differs,
    which `recognised` reads. None: there is none.
    """
    same = [known for known in models if _plain(known).same_figures(_plain(model))]
    formats = (model.weights, model.expert_weights)
    stored_so = (known.name for known in same if (known.weights, known.expert_weights) == formats)
    return next(stored_so, None) or (f"{same[0].name}-{model.expert_weights}" if same else None)


def _plain(model: Model) -> Model:
    """Without its number formats."""
    return _stored(model, model.name, Weights.BF16).model_copy(update={"kv_bytes": 2.0})


def _stored(model: Model, name: str, weights: Weights) -> Model:
    """The model with all its matrices in that format."""
    experts = model.experts and model.experts.model_copy(update={"weights": None})
    return model.model_copy(update={"name": name, "weights": weights, "experts": experts})


def _base(name: str) -> str:
    while match := _VARIANT.search(name):
        name = name[: match.start()]
    return name
