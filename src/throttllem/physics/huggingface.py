"""A model from the `config.json` of its checkpoint, as Hugging Face's transformers name its figures.

Reads what vLLM serves as a decoder of text. What it cannot read is an error that names the key; what it had to assume
is a note. Knows nothing of the catalogue.
"""

# The keys of an architecture follow from its family (`model_type`). Most families use the same names as Llama. A few
# use older ones (GPT-2: n_embd, n_layer ...), so each figure has a list of names, the usual one first. A checkpoint
# need not state what is the default of its family: `_DEFAULTS` has those that files are known to leave out.
#
# Vision models nest the decoder in `text_config` (or another of `_NESTED`); the vision part is left out.

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from throttllem.physics.model import Experts, Latent, Model, Weights, Window

Values = Mapping[str, Any]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_NESTED = ("text_config", "language_config", "llm_config", "thinker_config")
_PARTS = ("attn_config", "ffn_config")
"""Tables of DBRX and MPT whose keys are read like the others."""

_TIED = {"tie_word_embeddings": True}
_QWEN = {"use_sliding_window": False}
_DEFAULTS: Mapping[str, Values] = {
    "bloom": _TIED,
    "cohere": _TIED,
    "cohere2": {**_TIED, "sliding_window_pattern": 4},
    "falcon": {**_TIED, "multi_query": True},
    "gemma": {**_TIED, "head_dim": 256},
    "gemma2": {**_TIED, "head_dim": 256, "sliding_window": 4096, "sliding_window_pattern": 2},
    "gemma3_text": {
        **_TIED,
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
    },
    "gpt2": _TIED,
    "gpt_bigcode": {**_TIED, "multi_query": True},
    "gpt_oss": {"head_dim": 64, "sliding_window": 128, "sliding_window_pattern": 2},
    "llama4_text": {"attention_chunk_size": 8192, "sliding_window_pattern": 4, "interleave_moe_layer_step": 1},
    "mpt": {**_TIED, "expansion_ratio": 4},
    "opt": _TIED,
    "qwen2": _QWEN,
    "qwen2_moe": _QWEN,
    "qwen3": _QWEN,
    "qwen3_moe": _QWEN,
    "starcoder2": _TIED,
}
"""By family, what a file may leave out."""

_NOT_GATED = _words("apertus arcee bloom falcon gpt2 gpt_bigcode gpt_neox gptj mpt nemotron opt phi starcoder2")
"""Families whose feed-forward part is two matrices, not three."""

_KNOWN = _words(
    "baichuan chatglm dbrx deepseek deepseek_v2 deepseek_v3 ernie4_5 ernie4_5_moe exaone exaone4 glm glm4 "
    "glm4_moe glm4_moe_lite granite granitemoe granitemoeshared hunyuan_v1_dense internlm2 kimi_k2 llama "
    "minicpm minicpm3 minimax_m2 ministral3 mistral mixtral olmo olmo2 olmo3 olmoe phi3 phimoe qwen "
    "qwen2_5_vl qwen2_5_vl_text qwen2_vl qwen2_vl_text qwen3_vl_moe_text qwen3_vl_text seed_oss smollm3 stablelm"
)
"""Families of Llama's kind, or whose keys are among those read here, with nothing left out."""

_NOT_READ = {
    "is_encoder_decoder": "it is an encoder with a decoder",
    "cross_attention_layers": "layers attend to images",
    "hidden_size_per_layer_input": "layers have embeddings of their own",
    "block_configs": "every layer has figures of its own",
    **dict.fromkeys(
        _words(
            "conv_L_cache hybrid_override_pattern linear_attn_config linear_num_key_heads mamba_d_conv "
            "mamba_d_state mamba_num_heads ssm_cfg state_size rwkv_hidden_size"
        ),
        "it has layers without attention (state space or linear)",
    ),
}
"""Keys of what the physics has no terms for, and what that is."""
_MOST_LAYERS = 10_000
_LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention")


class ConfigError(ValueError):
    """A config.json that cannot be read as a model; the message names file, key and the way out."""


@dataclass(slots=True)
class _Config:
    """The figures of one decoder, by name. `notes` collects what was assumed."""

    file: str
    values: Values
    notes: list[str] = field(default_factory=list)

    @property
    def family(self) -> str:
        """`model_type`, empty if there is none."""
        return str(self.values.get("model_type") or "")

    def refuse(self, key: str, why: str) -> ConfigError:
        """The error for a key."""
        return ConfigError(
            f"{self.file}: {key}: {why}; describe the model in a TOML file instead, as a table [model.NAME] "
            "(docs/guides/own-gpu-or-model.md), and give that with --catalogue"
        )

    def get(self, *keys: str) -> Any:
        """The value of the first key that has one, else None."""
        return next((value for key in keys if (value := self.values.get(key)) is not None), None)

    def whole(self, *keys: str) -> int | None:
        """The same as a whole number; a list of equal numbers (one a layer) is that number. 0 counts as absent."""
        key = next((key for key in keys if self.values.get(key) is not None), None)
        if key is None:
            return None
        value = self.values[key]
        if isinstance(value, list) and value and all(each == value[0] for each in value):
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, int | float) or not (0 <= value < math.inf) or value % 1:
            raise self.refuse(key, f"{value!r} is not a whole number")
        return int(value) or None

    def listed(self, key: str) -> list[Any]:
        """A list, empty if it is missing."""
        value = self.get(key)
        if value is not None and not isinstance(value, list):
            raise self.refuse(key, f"{value!r} is not a list")
        return value or []

    def table(self, value: object, key: str) -> Values:
        """A value that must be an object, empty if it is missing."""
        if value is not None and not isinstance(value, dict):
            raise self.refuse(key, f"{value!r} is not an object")
        return value or {}

    def number(self, value: object, key: str) -> float:
        """A value that must be a number above 0."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
            raise self.refuse(key, f"{value!r} is not a number above 0")
        return value

    def needed(self, *keys: str) -> int:
        """The same; ConfigError if it is missing."""
        found = self.whole(*keys)
        if found is None:
            others = f" (or {', '.join(keys[1:])})" if len(keys) > 1 else ""
            raise self.refuse(keys[0], f"missing{others}")
        return found


def read_model(path: Path, name: str) -> tuple[Model, tuple[str, ...]]:
    """The model of a `config.json` (a file, or the folder that has it), called `name`, and notes on what was assumed.

    Raises ConfigError.
    """
    file = path / "config.json" if path.is_dir() else path
    values = _json(file)
    if "quantization_config" not in values and (beside := file.with_name("hf_quant_config.json")).is_file():
        values = {**values, "quantization_config": {"quant_method": "modelopt", **_json(beside)}}
    return model_of(values, name, str(file))


def model_of(values: Values, name: str, file: str = "config.json") -> tuple[Model, tuple[str, ...]]:
    """The same from the file's content. Raises ConfigError."""
    config = _config(values, file)
    for key, why in _NOT_READ.items():
        if config.get(key):
            raise config.refuse(key, f"{why}, which is not modelled")
    for kind in config.listed("layer_types"):
        if kind not in _LAYER_TYPES:
            raise config.refuse("layer_types", f"{kind!r} is not modelled")
    weights, expert_weights, kv_bytes = _quantisation(config)
    layers, heads = _layers(config), _heads(config)
    latent, experts = _latent(config), _experts(config, expert_weights)
    figures = {
        "name": name,
        "layers": layers,
        "hidden": config.needed("hidden_size", "n_embd", "d_model", "n_embed"),
        "heads": heads,
        "kv_heads": heads if latent else _kv_heads(config, heads),
        "head_dim": latent.key + latent.rotary if latent else _head_dim(config, heads),
        "intermediate": _intermediate(config, experts),
        "vocabulary": config.needed("vocab_size", "padded_vocab_size"),
        "max_context_tokens": (context := _context(config)),
        "weights": weights,
        "kv_bytes": kv_bytes,
        "gated": config.family not in _NOT_GATED,
        "tied_embeddings": bool(config.get("tie_word_embeddings")),
        "experts": experts,
        "latent": latent,
        "window": _window(config, layers, context),
    }
    try:
        return Model.model_validate(figures), tuple(config.notes)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "its figures"
        raise config.refuse(where, first["msg"].removeprefix("Value error, ")) from error


def cached(repository: str) -> Path | None:
    """The newest `config.json` of `OWNER/NAME` in the hub's cache, where an engine of this user on this machine has
    loaded it; None: there is none.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        return None
    home = os.environ.get("HF_HOME", "~/.cache/huggingface")
    hub = Path(os.environ.get("HF_HUB_CACHE", f"{home}/hub")).expanduser()
    found = hub.glob(f"models--{repository.replace('/', '--')}/snapshots/*/config.json")
    return max(found, key=lambda file: file.stat().st_mtime, default=None)


def _json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror}); give a config.json, or its folder") from error
    except ValueError as error:
        raise ConfigError(f"{file}: not JSON: {error}; give a config.json, or its folder") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: holds no object; give a config.json, or its folder")
    return values


def _config(values: Values, file: str) -> _Config:
    """The decoder's figures: of the nested table if there is one, over the family's defaults."""
    flat: dict[str, Any] = dict(values)
    notes = []
    for _ in range(2):  # the decoder of an omni model is two tables deep
        key = next((key for key in _NESTED if isinstance(flat.get(key), dict)), None)
        if key is not None:
            outer = {name: flat[name] for name in ("model_type", "quantization_config", *_TIED) if name in flat}
            flat = outer | flat[key]
            notes = [f"{file}: the decoder of {key} alone is modelled, no vision or audio part"]
    for part in _PARTS:
        if isinstance(flat.get(part), dict):
            flat |= flat[part]
    family = str(flat.get("model_type") or "")
    config = _Config(file=file, values={**_DEFAULTS.get(family, {}), **flat}, notes=notes)
    if family not in _KNOWN | _DEFAULTS.keys() | _NOT_GATED:
        notes.append(
            f"{file}: model_type {family!r} is not known: it is read by the usual keys, as a decoder with gated "
            "layers; compare its parameters with the published ones"
        )
    if config.get("index_topk"):
        notes.append(f"{file}: index_topk: attention is modelled over the whole context, not over its selected part")
    return config


def _layers(config: _Config) -> int:
    found = config.needed("num_hidden_layers", "n_layer", "n_layers", "num_layers")
    if found > _MOST_LAYERS:
        raise config.refuse("num_hidden_layers", f"{found} is more than {_MOST_LAYERS}")
    return found


# ---- attention ----------------------------------------------------------------------------------------------------


def _heads(config: _Config) -> int:
    return config.needed("num_attention_heads", "n_head", "n_heads", "num_heads")


def _kv_heads(config: _Config, heads: int) -> int:
    """Falcon's first models and StarCoder say `multi_query` for one head, whatever else their files hold."""
    if config.get("multi_query") and not config.get("new_decoder_architecture", "multi_query_group_num"):
        return 1
    return (
        config.whole("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num", "kv_n_heads") or heads
    )


def _head_dim(config: _Config, heads: int) -> int:
    found = config.whole("head_dim", "kv_channels", "attention_head_dim")
    if found is not None:
        return found
    hidden = config.needed("hidden_size", "n_embd", "d_model", "n_embed")
    if hidden % heads:
        raise config.refuse("head_dim", f"missing, and {hidden} cannot be divided among {heads} heads")
    return hidden // heads


def _latent(config: _Config) -> Latent | None:
    """Multi-head latent attention, by the keys of DeepSeek-V2."""
    rank = config.whole("kv_lora_rank")
    if rank is None:
        return None
    return Latent(
        kv_rank=rank,
        rotary=config.needed("qk_rope_head_dim"),
        key=config.needed("qk_nope_head_dim"),
        value=config.needed("v_head_dim"),
        query_rank=config.whole("q_lora_rank"),
    )


def _window(config: _Config, layers: int, context: int) -> Window | None:
    """Sliding windows, or the chunks of Llama 4. None where no layer has one, or it is as long as the context."""
    tokens = config.whole("sliding_window", "attention_chunk_size")
    if tokens is None or tokens >= context or config.get("use_sliding_window") is False:
        return None
    count = _window_layers(config, layers)
    return Window(tokens=tokens, layers=count) if count else None


def _window_layers(config: _Config, layers: int) -> int:
    """Layers with a window: listed one by one, or all but every n-th, or from a layer on, or all."""
    if kinds := config.listed("layer_types"):
        return sum(kind != "full_attention" for kind in kinds)
    if flags := config.listed("no_rope_layers"):  # Llama 4: a layer without rotary embedding attends to everything
        return sum(map(bool, flags))
    pattern = config.get("sliding_window_pattern", "_sliding_window_pattern")
    if pattern and isinstance(pattern, str):  # as LLLG
        return sum(pattern[layer % len(pattern)] == "L" for layer in range(layers))
    if isinstance(pattern, int) and pattern > 0:
        return layers - layers // pattern
    first = config.get("max_window_layers")
    return max(0, layers - first) if isinstance(first, int) else layers


def _context(config: _Config) -> int:
    """The longest context; YaRN's factor is on the context that the model was first trained with."""
    names = ("max_position_embeddings", "n_positions", "seq_length", "max_sequence_length", "max_seq_len", "n_ctx")
    scaling = config.get("rope_scaling", "rope_parameters")
    if isinstance(scaling, dict) and (scaling.get("rope_type") or scaling.get("type")) == "yarn":
        first, factor = scaling.get("original_max_position_embeddings"), scaling.get("factor")
        if first and factor:
            return int(config.number(first, "rope_scaling") * config.number(factor, "rope_scaling"))
    return config.needed(*names)


# ---- feed-forward -------------------------------------------------------------------------------------------------


def _intermediate(config: _Config, experts: Experts | None) -> int:
    """Of a layer without experts; where there is none, that of an expert."""
    found = config.whole("intermediate_size_mlp") if config.family == "llama4_text" else None
    found = found or config.whole("intermediate_size", "ffn_hidden_size", "n_inner", "ffn_dim")
    if found is not None:
        return found // 2 if config.family == "qwen" else found  # the first Qwen counts gate and up together
    if experts is not None:
        return experts.intermediate
    if config.family in _NOT_GATED:
        ratio = config.number(config.get("expansion_ratio") or 4, "expansion_ratio")
        return int(ratio * config.needed("hidden_size", "n_embd", "d_model", "n_embed"))
    return config.needed("intermediate_size", "ffn_hidden_size", "n_inner", "ffn_dim")


def _experts(config: _Config, weights: Weights | None) -> Experts | None:
    """A mixture of experts, by any of the names for their number."""
    count = config.whole("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    if count is None or count == 1:
        return None
    intermediate = config.whole("moe_intermediate_size", "expert_ffn_hidden_size") or config.needed(
        "intermediate_size", "ffn_hidden_size", "moe_intermediate_size"
    )
    return Experts(
        count=count,
        active=config.needed(
            "num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk", "moe_top_k", "moe_k"
        ),
        intermediate=intermediate,
        shared_intermediate=_shared(config, intermediate),
        dense_layers=_dense_layers(config),
        weights=weights,
    )


def _shared(config: _Config, intermediate: int) -> int:
    """The width of all shared experts of a layer together."""
    if config.family == "llama4_text":
        return intermediate
    width = config.whole("shared_expert_intermediate_size", "shared_intermediate_size")
    count = config.whole("n_shared_experts", "num_shared_experts", "num_shared_expert", "moe_num_shared_experts")
    return width or (count or 0) * intermediate


def _dense_layers(config: _Config) -> int:
    """How many layers of a mixture have no experts."""
    layers = _layers(config)
    if kinds := config.listed("mlp_layer_types"):
        return sum(kind == "dense" for kind in kinds)
    if listed := config.listed("moe_layers"):
        return layers - len(listed)
    has_experts = _expert_rule(config)
    return sum(not has_experts(layer) for layer in range(layers))


def _expert_rule(config: _Config) -> Callable[[int], bool]:
    """Whether a layer has experts, by the keys that say where they begin and how often they come."""
    first = config.whole("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index") or 0
    last = config.get("moe_layer_end_index")
    last = last if isinstance(last, int) and last >= 0 else None
    only_dense = config.listed("mlp_only_layers")
    step = config.whole("decoder_sparse_step", "interleave_moe_layer_step", "moe_layer_interval") or 1
    each = config.get("moe_layer_freq")
    each = each if isinstance(each, list) and len(each) >= _layers(config) else None  # a list says it for each layer
    every = 1 if each else config.whole("moe_layer_freq") or 1

    def has_experts(layer: int) -> bool:
        there = bool(each[layer]) if each else layer % every == 0
        within = layer >= first and (last is None or layer <= last)
        return there and within and layer not in only_dense and (layer + 1) % step == 0

    return has_experts


# ---- number formats -----------------------------------------------------------------------------------------------


def _quantisation(config: _Config) -> tuple[Weights, Weights | None, float]:
    """Formats of all matrices and of the experts' (None: the same), and bytes per value of the KV cache."""
    dtype = config.get("dtype", "torch_dtype") or "bfloat16"
    if dtype not in ("bfloat16", "float16"):
        config.notes.append(f"{config.file}: dtype {dtype}: an engine serves it as bfloat16, which is modelled")
    found = config.table(config.get("quantization_config"), "quantization_config")
    if not found:
        return Weights.BF16, None, 2.0
    method = str(found.get("quant_method") or "").lower()
    if method == "mxfp4":
        return Weights.BF16, Weights.MXFP4, 2.0
    if method in ("compressed-tensors", "compressed_tensors"):
        return _compressed(config, found)
    if method == "modelopt" or "quantization" in found:
        return _modelopt(config, config.table(found.get("quantization"), "quantization") or found)
    if method in ("fp8", "fbgemm_fp8"):
        return Weights.FP8, None, 2.0
    if method in ("awq", "gptq", "gptq_marlin", "awq_marlin", "auto-round", "bitsandbytes"):
        bits = found.get("bits") or found.get("w_bit") or (4 if found.get("load_in_4bit") else None)
        return _integers(config, 8 if found.get("load_in_8bit") else bits), None, 2.0
    raise config.refuse("quantization_config.quant_method", f"{method!r} is not modelled")


def _integers(config: _Config, bits: object) -> Weights:
    if bits not in (4, 8):
        raise config.refuse("quantization_config.bits", f"{bits!r}: 4 and 8 are modelled")
    return Weights.INT4 if bits == 4 else Weights.INT8


def _compressed(config: _Config, found: Values) -> tuple[Weights, Weights | None, float]:
    """LLM Compressor: groups of layers, each with its scheme; all groups must have one format."""
    key = "quantization_config.config_groups"
    groups = [config.table(group, key) for group in config.table(found.get("config_groups"), key).values()]
    schemes = [config.table(group.get("weights"), key) for group in groups]
    formats = {(str(scheme.get("type")), str(scheme.get("num_bits"))) for scheme in schemes}
    if len(formats) != 1:
        raise config.refuse("quantization_config.config_groups", f"{len(formats)} formats, where one is modelled")
    kind, bits = formats.pop()
    cache = config.table(found.get("kv_cache_scheme"), "quantization_config.kv_cache_scheme")
    kv_bytes = 1.0 if cache.get("num_bits") == 8 else 2.0
    if kind == "float" and bits == "8":
        return Weights.FP8, None, kv_bytes
    if kind == "float" and bits == "4":
        return Weights.MXFP4 if schemes[0].get("group_size") == 32 else Weights.NVFP4, None, kv_bytes
    return _integers(config, int(bits) if bits.isdecimal() else bits), None, kv_bytes


def _modelopt(config: _Config, found: Values) -> tuple[Weights, Weights | None, float]:
    """NVIDIA's Model Optimizer."""
    algorithm = str(found.get("quant_algo") or "").upper()
    formats = {
        "FP8": Weights.FP8,
        "FP8_PB_WO": Weights.FP8,
        "NVFP4": Weights.NVFP4,
        "MXFP4": Weights.MXFP4,
        "W4A16_AWQ": Weights.INT4,
        "W4A8_AWQ": Weights.INT4,
        "W8A8_SQ_PER_CHANNEL": Weights.INT8,
    }
    if algorithm not in formats:
        raise config.refuse("quantization_config.quant_algo", f"{algorithm!r} is not modelled")
    scheme = config.table(found.get("kv_cache_scheme"), "quantization_config.kv_cache_scheme")
    cache = found.get("kv_cache_quant_algo") or scheme.get("num_bits")
    return formats[algorithm], None, 1.0 if cache in ("FP8", 8) else 2.0
