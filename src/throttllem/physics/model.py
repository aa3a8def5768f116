"""A decoder-only transformer as figures of its `config.json`, and the bytes and parameters that follow from them.

Knows nothing of GPUs, nor of how an engine shards it.
"""

# Dense layers, mixtures of experts, latent attention (MLA), sliding windows and quantised weights are parts of one
# model, each optional: a part that is None is not there. What a checkpoint quantises differs: FP8 and 4-bit integers
# mostly cover all matrices of the layers (`weights`), MXFP4 those of the routed experts alone (`experts.weights`).
# Embedding, head and router stay at the width of the activations.

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Self

from pydantic import Field, NonNegativeInt, model_validator

from throttllem.physics.laws import Frozen

LARGEST = 10**9
"""No figure of a model is above it."""
Figure = Annotated[int, Field(gt=0, le=LARGEST)]


class Weights(StrEnum):
    """The number format of stored weights; the value is its name in TOML."""

    BF16 = "bf16"
    FP8 = "fp8"
    """Activations are quantised too, and the products run on FP8 tensor cores where a GPU has them."""
    INT8 = "int8"
    INT4 = "int4"
    """AWQ and GPTQ: unpacked to bfloat16 in the kernel."""
    MXFP4 = "mxfp4"
    NVFP4 = "nvfp4"

    @property
    def unpacked(self) -> bool:
        """Whether kernels unpack them to bfloat16 for the tensor cores."""
        return self in (Weights.INT4, Weights.MXFP4, Weights.NVFP4)

    @property
    def bytes_per_parameter(self) -> float:
        """With scales: of 128 values (INT4: float16 and a zero point), 32 (MXFP4: one byte), 16 (NVFP4: one byte)."""
        return {
            Weights.BF16: 2.0,
            Weights.FP8: 1.0,
            Weights.INT8: 1.0,
            Weights.INT4: 0.5 + 2.5 / 128,
            Weights.MXFP4: 0.5 + 1 / 32,
            Weights.NVFP4: 0.5 + 1 / 16,
        }[self]


class Experts(Frozen):
    """Mixture of experts: in every layer that has them a token is sent to `active` of `count` experts."""

    count: Figure
    """Routed experts of a layer."""
    active: Figure
    """Of them, those of one token."""
    intermediate: Figure
    """Of one expert."""
    shared_intermediate: int = Field(default=0, ge=0, le=LARGEST)
    """Of all shared experts of a layer together: every token uses them."""
    dense_layers: NonNegativeInt = 0
    """Layers without experts, wherever they are; their width is `Model.intermediate`."""
    weights: Weights | None = None
    """Format of the routed experts' matrices; None: the model's."""


class Latent(Frozen):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): one compressed vector per token, for all heads."""

    kv_rank: Figure
    """Width of the compressed keys and values (`kv_lora_rank`)."""
    rotary: Figure
    """Width of the shared rotary key beside it, and of each query's rotary part (`qk_rope_head_dim`)."""
    key: Figure
    """Width of a head's key without its rotary part (`qk_nope_head_dim`)."""
    value: Figure
    """Width of a head's value (`v_head_dim`)."""
    query_rank: Figure | None = None
    """Width of the compressed queries (`q_lora_rank`); None: queries are not compressed."""


class Window(Frozen):
    """Sliding-window attention: in `layers` of the layers a token attends to the last `tokens` alone."""

    tokens: Figure
    layers: Figure


class Model(Frozen):
    """One decoder-only transformer."""

    name: str
    huggingface: tuple[str, ...] = ()
    """Checkpoints with these figures, as OWNER/NAME."""
    layers: Figure
    hidden: Figure
    heads: Figure
    kv_heads: Figure
    """With `latent`: as many as `heads`."""
    head_dim: Figure
    """With `latent`: `key` plus `rotary`."""
    intermediate: Figure
    """Of a layer without experts."""
    vocabulary: Figure
    max_context_tokens: Figure
    weights: Weights = Weights.BF16
    """Format of the matrices of the layers."""
    activation_bytes: float = Field(default=2.0, gt=0, le=8)
    """Per value of activations, embedding and head; 2 for bfloat16."""
    kv_bytes: float = Field(default=2.0, gt=0, le=8)
    """Per value of the KV cache; 1 for FP8."""
    gated: bool = True
    """A feed-forward part has gate, up and down; else up and down alone (Falcon, GPT-NeoX)."""
    tied_embeddings: bool = False
    """The head is the embedding: stored once."""
    experts: Experts | None = None
    latent: Latent | None = None
    window: Window | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.heads % self.kv_heads:
            raise ValueError("heads must be a multiple of kv_heads")
        if self.window and self.window.layers > self.layers:
            raise ValueError("window.layers must be at most layers")
        if self.experts and self.experts.active > self.experts.count:
            raise ValueError("experts.active must be at most experts.count")
        if self.experts and self.experts.dense_layers >= self.layers:
            raise ValueError("experts.dense_layers must be below layers")
        return self

    def same_figures(self, other: Model) -> bool:
        """Whether it is the other but for the name and the longest context, which are settings of a site as well."""
        free = {"name": "", "huggingface": (), "max_context_tokens": 1}
        return self.model_copy(update=free) == other.model_copy(update=free)

    def same_architecture(self, other: Model) -> bool:
        """Whether it is the other but for number formats, vocabulary and what `same_figures` leaves out: a quantised or
        fine-tuned variant of the same model.
        """
        return self._architecture() == other._architecture()

    def _architecture(self) -> Model:
        free = {"name": "", "huggingface": (), "max_context_tokens": 1, "vocabulary": 1, "tied_embeddings": False}
        formats = {"weights": Weights.BF16, "activation_bytes": 2.0, "kv_bytes": 2.0}
        experts = self.experts and self.experts.model_copy(update={"weights": None})
        return self.model_copy(update={**free, **formats, "experts": experts})

    @property
    def described(self) -> str:
        """Its size, to compare with what is published of it."""
        active = f" ({self.active_parameters / 1e9:.3g} active)" if self.experts else ""
        size = f"{self.parameters / 1e9:.4g} billion parameters{active}, {self.weight_bytes / 1e9:.3g} GB"
        return f"{size}, {self.kv_bytes_per_token / 1e3:.3g} kB of KV cache a token"

    def with_cache(self, dtype: str) -> Model:
        """The model served with a KV cache of this type: "bfloat16", "fp8", or "auto" for its own."""
        own = {"auto": self.kv_bytes, "bfloat16": 2.0, "fp8": 1.0}
        return self.model_copy(update={"kv_bytes": own[dtype]})

    @property
    def parts(self) -> tuple[str, ...]:
        """What it has beside dense bfloat16 layers with full attention, each a part of the law of its own."""
        formats = dict.fromkeys(each.value for each in (self.weights, self.expert_weights) if each is not Weights.BF16)
        there = {"experts": self.experts, "latent": self.latent, "window": self.window}
        return (*(name for name, part in there.items() if part), *formats)

    @property
    def expert_layers(self) -> int:
        """Layers with experts."""
        return self.layers - self.experts.dense_layers if self.experts else 0

    @property
    def dense_layers(self) -> int:
        """Layers without experts."""
        return self.layers - self.expert_layers

    @property
    def expert_weights(self) -> Weights:
        """Format of the experts' matrices."""
        return (self.experts.weights if self.experts else None) or self.weights

    @property
    def attention_parameters(self) -> int:
        """Of the matrices of one layer's attention: queries, keys, values and output."""
        if (latent := self.latent) is None:
            return self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        query = self.heads * (latent.key + latent.rotary)
        queries = latent.query_rank * (self.hidden + query) if latent.query_rank else self.hidden * query
        compressed = self.hidden * (latent.kv_rank + latent.rotary)
        expanded = latent.kv_rank * self.heads * (latent.key + latent.value)
        return queries + compressed + expanded + self.heads * latent.value * self.hidden

    @property
    def dense_parameters(self) -> int:
        """Of the feed-forward matrices of one layer without experts."""
        return (3 if self.gated else 2) * self.hidden * self.intermediate

    @property
    def expert_parameters(self) -> int:
        """Of the feed-forward matrices of one routed expert."""
        return 3 * self.hidden * self.experts.intermediate if self.experts else 0

    @property
    def shared_parameters(self) -> int:
        """Of the feed-forward matrices of one layer's shared experts."""
        return 3 * self.hidden * self.experts.shared_intermediate if self.experts else 0

    @property
    def parameters(self) -> int:
        """All layers, embedding and head (norms, biases and routers are left out: under 0.1 %)."""
        return self._parameters(self.experts.count if self.experts else 0)

    @property
    def active_parameters(self) -> int:
        """Those that one token passes through; of the embedding one row, which is left out unless it is the head."""
        active = self._parameters(self.experts.active if self.experts else 0)
        return active - (0 if self.tied_embeddings else self.vocabulary * self.hidden)

    def _parameters(self, experts: int) -> int:
        attention = self.layers * self.attention_parameters + self.dense_layers * self.dense_parameters
        routed = self.expert_layers * (experts * self.expert_parameters + self.shared_parameters)
        return attention + routed + self._embeddings

    @property
    def _embeddings(self) -> int:
        return (1 if self.tied_embeddings else 2) * self.vocabulary * self.hidden

    @property
    def weight_bytes(self) -> float:
        """All parameters as they are stored."""
        routed = self.experts.count * self.expert_parameters if self.experts else 0
        others = self.layers * self.attention_parameters + self.dense_layers * self.dense_parameters
        others += self.expert_layers * self.shared_parameters
        return (
            others * self.weights.bytes_per_parameter
            + self.expert_layers * routed * self.expert_weights.bytes_per_parameter
            + self._embeddings * self.activation_bytes
        )

    @property
    def kv_values_per_token(self) -> int:
        """Values of the KV cache that one layer holds of a token."""
        if self.latent:
            return self.latent.kv_rank + self.latent.rotary
        return 2 * self.kv_heads * self.head_dim

    @property
    def kv_bytes_per_token(self) -> float:
        """Keys and values of one token over all layers. Layers with a window count whole: engines may not free them."""
        return self.layers * self.kv_values_per_token * self.kv_bytes
