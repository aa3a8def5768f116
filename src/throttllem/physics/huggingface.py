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

import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from throttllem.physics.model import LARGEST, Experts, Latent, Model, Weights, Window

Values = Mapping[str, Any]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_NESTED = ("text_config", "language_config", "llm_config", "thinker_config")
_PARTS = ("attn_config", "ffn_config")
"""Tables of DBRX and MPT whose keys are read like the others."""

_QUANTISED = ("quantization_config", "compression_config")
"""Where a file says how its weights are stored; the second is the older key of LLM Compressor."""
_TIED = {"tie_word_embeddings": True}
_QWEN = {"use_sliding_window": False}
_DEFAULTS: Mapping[str, Values] = {
    "bloom": _TIED,
    "cohere": _TIED,
    "cohere2": {**_TIED, "sliding_window_pattern": 4},
    "falcon": {**_TIED, "multi_query": True, "max_position_embeddings": 2048},
    "gemma": {**_TIED, "head_dim": 256},
    "gemma2": {**_TIED, "head_dim": 256, "num_key_value_heads": 4, "sliding_window": 4096, "sliding_window_pattern": 2},
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
    "glm": {"num_key_value_heads": 2},
    "glm4": {"num_key_value_heads": 2},
    "gpt_oss": {"num_key_value_heads": 8, "head_dim": 64, "sliding_window": 128, "sliding_window_pattern": 2},
    "llama4_text": {
        "num_key_value_heads": 8,
        "attention_chunk_size": 8192,
        "sliding_window_pattern": 4,
        "interleave_moe_layer_step": 1,
    },
    "mistral": {"num_key_value_heads": 8},
    "mixtral": {"num_key_value_heads": 8},
    "mpt": {**_TIED, "expansion_ratio": 4},
    "opt": _TIED,
    "phimoe": {"num_key_value_heads": 8},
    "qwen2": _QWEN,
    "qwen2_moe": _QWEN,
    "qwen3": _QWEN,
    "qwen3_moe": {**_QWEN, "num_key_value_heads": 4},
    "smollm3": {"num_key_value_heads": 4},
    "starcoder2": {**_TIED, "num_key_value_heads": 2},
}
"""By family, what a file may leave out."""

_NOT_GATED = _words(
    "apertus arcee bloom falcon gpt2 gpt_bigcode gpt_neox gptj mpt nemotron opt persimmon phi starcoder2"
)
"""Families whose feed-forward part is two matrices, not three."""

_ONE_EACH = _words("baichuan bloom gpt2 gpt_neox gptj mpt opt persimmon phi qwen")
"""Families that have keys and values for every head, and no key that says so."""

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
    "block_configs": "its layers have different figures",
    "num_key_value_heads_per_layer": "its layers have different figures",
    "parallel_attn_mlp_res": "its layers have a dense part beside the experts",
    "share_q_dim": "its attention factorises the queries",
    "zero_expert_num": "its layers have two attentions, and experts that compute nothing",
    "attention_types": "its layers alternate between attentions by a list of their own",
    **dict.fromkeys(
        _words(
            "conv_L_cache hybrid_override_pattern linear_attn_config linear_num_key_heads mamba_d_conv "
            "linear_num_value_heads lru_width mamba_d_state mamba_num_heads ssm_cfg state_size rwkv_hidden_size"
        ),
        "it has layers without attention (state space or linear)",
    ),
}
"""Keys of what the physics has no terms for, and what that is."""
_ENCODERS = _words(
    "albert bert camembert clip deberta deberta-v2 distilbert electra ernie gte longformer modernbert mpnet "
    "nomic_bert roberta siglip xlm-roberta"
)
"""Families that read a text, or an image, at once and generate none."""
_LINEAR = _words("falcon_mamba mamba mamba2 retnet rwkv rwkv5 rwkv6 rwkv7")
"""Families without attention, whose keys do not all show it."""
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
        if value > LARGEST:
            raise self.refuse(key, f"more than {LARGEST:.0e}, which is no figure of a model")
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
    if not values.get("quantization_config") and (beside := file.with_name("hf_quant_config.json")).is_file():
        values = {**values, "quantization_config": {"quant_method": "modelopt", **_json(beside)}}
    return model_of(values, name, str(file))


def model_of(values: Values, name: str, file: str = "config.json") -> tuple[Model, tuple[str, ...]]:
    """The same from the file's content. Raises ConfigError."""
    config = _config(values, file)
    _refuse_unmodelled(config)
    stored = _quantisation(config)
    layers, heads = _layers(config), _heads(config)
    try:
        latent, experts = _latent(config), _experts(config)
    except ValidationError as error:
        raise _wrong_figure(config, error) from error
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
        "kv_bytes": stored.kv_bytes,
        "gated": config.family not in _NOT_GATED,
        "tied_embeddings": bool(config.get("tie_word_embeddings")),
        "experts": experts,
        "latent": latent,
        "window": _window(config, layers, context),
    }
    try:
        model = Model.model_validate(figures)
    except ValidationError as error:
        raise _wrong_figure(config, error) from error
    return _with_formats(config, model, stored), tuple(config.notes)


def _wrong_figure(config: _Config, error: ValidationError) -> ConfigError:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"]) or "its figures"
    return config.refuse(where, first["msg"].removeprefix("Value error, "))


def _refuse_unmodelled(config: _Config) -> None:
    """ConfigError for what shows that the physics has no terms for the model."""
    architectures = " ".join(map(str, config.listed("architectures")))
    if config.family in _ENCODERS or re.search(r"ForMaskedLM|ForSequenceClassification|ForTokenClass", architectures):
        raise config.refuse("model_type", f"{config.family!r} generates no text (an encoder or a classifier)")
    if config.family in _LINEAR:
        raise config.refuse("model_type", f"{config.family!r} has layers without attention, which are not modelled")
    for key, why in _NOT_READ.items():
        if config.get(key):
            raise config.refuse(key, f"{why}, which is not modelled")
    for kind in config.listed("layer_types"):
        if kind not in _LAYER_TYPES:
            raise config.refuse("layer_types", f"{kind!r} is not modelled")
    if 0 in config.listed("attn_type_list"):  # of MiniMax; 1 is softmax
        raise config.refuse("attn_type_list", "layers of number 0 have linear attention, which is not modelled")
    embedding, hidden = config.get("word_embed_proj_dim"), config.get("hidden_size")
    if embedding is not None and embedding != hidden:
        raise config.refuse("word_embed_proj_dim", f"{embedding!r}: an embedding narrower than the layers ({hidden})")


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
    except (ValueError, RecursionError) as error:
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
            outer = {name: flat[name] for name in ("model_type", *_QUANTISED, *_TIED) if name in flat}
            flat = outer | {name: value for name, value in flat[key].items() if value is not None or name not in outer}
            notes = [f"{file}: the decoder of {key} alone is modelled, no vision or audio part"]
    for part in _PARTS:
        if isinstance(flat.get(part), dict):
            flat |= flat[part]
    family = str(flat.get("model_type") or "")
    config = _Config(file=file, values={**_DEFAULTS.get(family, {}), **flat}, notes=notes)
    if family not in _KNOWN | _DEFAULTS.keys() | _NOT_GATED:
        notes.append(
            f"{file}: model_type {family!r} is not known: it is read by the usual keys, as a decoder with gated "
            "layers and full attention, which may be wrong; do not rely on its seconds and watts before its "
            "parameters, all and active, and bytes (`throttllem estimate`) are the published ones"
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
    found = config.whole("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num", "kv_n_heads")
    if found is None and config.family not in _ONE_EACH:
        config.notes.append(
            f"{config.file}: num_key_value_heads: missing: keys and values of all {heads} heads are modelled; if the "
            "published model has fewer, its cache is smaller"
        )
    return found or heads


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
    names = "max_position_embeddings n_positions seq_length max_sequence_length max_seq_len n_ctx model_max_length"
    scaling = config.get("rope_scaling", "rope_parameters")
    if isinstance(scaling, dict) and (scaling.get("rope_type") or scaling.get("type")) == "yarn":
        first, factor = scaling.get("original_max_position_embeddings"), scaling.get("factor")
        if first and factor:
            return int(config.number(first, "rope_scaling") * config.number(factor, "rope_scaling"))
    return config.needed(*names.split())


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


def _experts(config: _Config) -> Experts | None:
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
        dense_layers=_with_experts(config).count(False),
    )


def _shared(config: _Config, intermediate: int) -> int:
    """The width of all shared experts of a layer together."""
    if config.family == "llama4_text":
        return intermediate
    width = config.whole("shared_expert_intermediate_size", "shared_intermediate_size")
    count = config.whole("n_shared_experts", "num_shared_experts", "num_shared_expert", "moe_num_shared_experts")
    return width or (count or 0) * intermediate


def _with_experts(config: _Config) -> list[bool]:
    """For each layer of a mixture whether it has experts."""
    layers = range(_layers(config))
    if kinds := config.listed("mlp_layer_types"):
        return [kind != "dense" for kind in kinds]
    if listed := config.listed("moe_layers"):
        return [layer in listed for layer in layers]
    return [*map(_expert_rule(config), layers)]


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


@dataclass(frozen=True, slots=True)
class _Stored:
    """How a checkpoint stores its matrices: in `format` what `quantised` names and `kept` does not, else bfloat16."""

    format: Weights = Weights.BF16
    kv_bytes: float = 2.0
    quantised: tuple[str, ...] | None = None
    """Names or patterns of modules; None: all of the layers."""
    kept: tuple[str, ...] = ()


_EXPERTS_ALONE = ("experts",)
_KEPT = ("ignore", "ignored_layers", "modules_to_not_convert", "exclude_modules", "llm_int8_skip_modules")
"""The keys of modules that stay as they are: compressed-tensors, fbgemm, AWQ and FP8, Model Optimizer, bitsandbytes."""


def _quantisation(config: _Config) -> _Stored:
    dtype = config.get("dtype", "torch_dtype") or "bfloat16"
    if dtype not in ("bfloat16", "float16"):
        config.notes.append(f"{config.file}: dtype {dtype}: an engine serves it as bfloat16, which is modelled")
    found = config.table(config.get(*_QUANTISED), "quantization_config")
    if not found:
        return _Stored()
    method = str(found.get("quant_method") or "").lower()
    if method == "modelopt" or "quantization" in found:
        found = config.table(found.get("quantization"), "quantization") or found
        stored = _modelopt(config, found)
    elif method in ("compressed-tensors", "compressed_tensors") or "config_groups" in found:
        stored = _compressed(config, found)
    elif method == "mxfp4":
        stored = _Stored(Weights.MXFP4, quantised=_EXPERTS_ALONE)
    elif method in ("fp8", "fbgemm_fp8"):
        stored = _Stored(Weights.FP8)
    elif method in ("awq", "gptq", "gptq_marlin", "awq_marlin", "auto-round", "bitsandbytes"):
        bits = found.get("bits") or found.get("w_bit") or (4 if found.get("load_in_4bit") else None)
        stored = _Stored(_integers(config, 8 if found.get("load_in_8bit") else bits))
    else:
        raise config.refuse("quantization_config.quant_method", f"{method!r} is not modelled")
    return replace(stored, kept=_kept(config, found))


def _kept(config: _Config, found: Values) -> tuple[str, ...]:
    """Modules that are not quantised."""
    kept = [name for key in _KEPT for name in _modules(config, found, key)]
    rules = config.table(found.get("dynamic") or None, "quantization_config.dynamic")  # GPTQModel: -: leaves out
    return (*kept, *(f"re:{rule[2:]}" for rule in rules if rule.startswith("-:")))


def _modules(config: _Config, found: Values, key: str) -> list[str]:
    names = found.get(key)
    if names is not None and not (isinstance(names, list) and all(isinstance(each, str) for each in names)):
        raise config.refuse(f"quantization_config.{key}", "not a list of modules")
    return names or []


def _integers(config: _Config, bits: object) -> Weights:
    if bits not in (4, 8):
        raise config.refuse("quantization_config.bits", f"{bits!r}: 4 and 8 are modelled")
    return Weights.INT4 if bits == 4 else Weights.INT8


def _compressed(config: _Config, found: Values) -> _Stored:
    """LLM Compressor: groups of layers, each with its scheme; all groups must have one format."""
    key = "quantization_config.config_groups"
    groups = [config.table(group, key) for group in config.table(found.get("config_groups"), key).values()]
    schemes = [config.table(group.get("weights"), key) for group in groups]
    formats = {(str(scheme.get("type")), str(scheme.get("num_bits"))) for scheme in schemes}
    if len(formats) != 1:
        raise config.refuse("quantization_config.config_groups", f"{len(formats)} formats, where one is modelled")
    kind, bits = formats.pop()
    cache = config.table(found.get("kv_cache_scheme"), "quantization_config.kv_cache_scheme")
    if kind == "float" and bits == "8":
        weights = Weights.FP8
    elif kind == "float" and bits == "4":
        weights = Weights.MXFP4 if schemes[0].get("group_size") == 32 else Weights.NVFP4
    else:
        weights = _integers(config, int(bits) if bits.isdecimal() else bits)
    targets = [each for group in groups for each in _modules(config, group, "targets") or ["Linear"]]
    quantised = None if any("Linear" in each for each in targets) else tuple(targets)
    return _Stored(weights, 1.0 if cache.get("num_bits") == 8 else 2.0, quantised)


def _modelopt(config: _Config, found: Values) -> _Stored:
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
    return _Stored(formats[algorithm], 1.0 if cache in ("FP8", 8) else 2.0)


def _with_formats(config: _Config, model: Model, stored: _Stored) -> Model:
    """The model with its formats: one of the routed experts, one of all other matrices.

    Of each the format that most of its parameters have; a note says how many have the other.
    """
    if stored.format is Weights.BF16:
        return model
    covered = _covered(config, stored)
    has_experts = _with_experts(config) if model.experts else [False] * model.layers
    all_parameters, quantised = [0.0, 0.0], [0.0, 0.0]
    for layer, sparse in enumerate(has_experts):
        for routed, parameters, names in _matrices(model, sparse):
            all_parameters[routed] += parameters
            quantised[routed] += parameters * sum(covered(f"layers.{layer}.{name}") for name in names) / len(names)
    shares = [part / whole if whole else 0.0 for part, whole in zip(quantised, all_parameters, strict=True)]
    formats = [stored.format if share > 0.5 else Weights.BF16 for share in shares]
    for part, share, found in zip(("layers", "routed experts"), shares, formats, strict=True):
        if 0.005 < share < 0.995:
            config.notes.append(
                f"{config.file}: quantization_config: {share:.0%} of the parameters of the {part} are in "
                f"{stored.format}, the others in bf16: all are modelled in {found}"
            )
    experts = model.experts and model.experts.model_copy(
        update={"weights": None if formats[0] is formats[1] else formats[1]}
    )
    return model.model_copy(update={"weights": formats[0], "experts": experts})


def _matrices(model: Model, sparse: bool) -> Iterator[tuple[bool, float, tuple[str, ...]]]:
    """Of a layer: whether of the routed experts, parameters, and the names of modules that share them equally."""
    if latent := model.latent:
        query, wide = model.heads * (latent.key + latent.rotary), model.heads * (latent.key + latent.value)
        if latent.query_rank:
            yield False, latent.query_rank * model.hidden, ("self_attn.q_a_proj",)
            yield False, latent.query_rank * query, ("self_attn.q_b_proj",)
        else:
            yield False, model.hidden * query, ("self_attn.q_proj",)
        yield False, model.hidden * (latent.kv_rank + latent.rotary), ("self_attn.kv_a_proj_with_mqa",)
        yield False, latent.kv_rank * wide, ("self_attn.kv_b_proj",)
        yield False, model.heads * latent.value * model.hidden, ("self_attn.o_proj",)
    else:
        width = model.hidden * model.head_dim
        yield False, 2 * width * model.heads, ("self_attn.q_proj", "self_attn.o_proj")
        yield False, 2 * width * model.kv_heads, ("self_attn.k_proj", "self_attn.v_proj")
    wide_names = ("gate_proj", "up_proj", "down_proj")[0 if model.gated else 1 :]
    if not sparse:
        yield False, model.dense_parameters, tuple(f"mlp.{name}" for name in wide_names)
    elif model.experts:
        yield False, model.shared_parameters, tuple(f"mlp.shared_experts.{name}" for name in wide_names)
        yield True, model.experts.count * model.expert_parameters, tuple(f"mlp.experts.0.{name}" for name in wide_names)


_ROOTS = ("model.", "language_model.model.", "model.language_model.")
_ALIASES = (
    ("self_attn.", "attention.", "attn."),
    ("mlp.", "feed_forward.", "block_sparse_moe.", "ffn."),
    ("shared_experts.", "shared_expert."),
    ("gate_proj", "gate_up_proj", "w1"),
    ("up_proj", "gate_up_proj", "w3"),
    ("down_proj", "w2"),
    *((f"{each}_proj", "qkv_proj") for each in "qkv"),
)
"""The same module in other families, and where an engine fuses it."""


def _covered(config: _Config, stored: _Stored) -> Callable[[str], bool]:
    """Whether a module is quantised."""
    kept = _matcher(config, stored.kept)
    if stored.quantised is None:
        return lambda name: not kept(name)
    quantised = _matcher(config, stored.quantised)
    return lambda name: quantised(name) and not kept(name)


def _matcher(config: _Config, patterns: Iterable[str]) -> Callable[[str], bool]:
    """Whether a module is among `patterns`: a name, or a part of one between dots; with *, of any text; or, after
    `re:`, an expression that fits its beginning.
    """
    expressions, plain = [], set()
    for pattern in patterns:
        if pattern.startswith("re:"):
            expressions.append(pattern[3:])
        elif "*" in pattern:
            text = re.escape(pattern.strip(".")).replace(r"\*", ".*")
            expressions.append(rf"(?:.*\.)?{text}(?:\..*)?$")
        else:
            plain.add(re.sub(r"^.*?(?=layers\.\d)", "", pattern.strip(".")))
    try:
        compiled = [re.compile(each) for each in expressions]
    except re.error as error:
        raise config.refuse("quantization_config", f"a pattern of modules is no regular expression: {error}") from error

    def matches(name: str) -> bool:
        if not (plain or compiled):
            return False
        layers, number, module = name.split(".", 2)
        for alias in (f"{layers}.{number}.{each}" for each in _spelled(module)):
            if plain:
                parts = alias.split(".")
                runs = itertools.combinations(range(len(parts) + 1), 2)
                if any(".".join(parts[first:last]) in plain for first, last in runs):
                    return True
            if any(each.match(root + alias) for each in compiled for root in _ROOTS):
                return True
        return False

    return matches


@cache
def _spelled(name: str) -> frozenset[str]:
    """The name within its layer as families and engines spell it."""
    found = {name}
    for usual, *others in _ALIASES:
        found |= {re.sub(rf"(?<![^.]){re.escape(usual)}", other, each) for each in found for other in others}
    return frozenset(found)
