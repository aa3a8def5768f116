"""config.json files of every kind: facts of the published checkpoints, as far as they are read."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from throttllem.physics.catalogue import Catalogue
from throttllem.physics.huggingface import ConfigError, model_of, read_model
from throttllem.physics.model import Latent, Weights, Window


def usual(family, hidden, layers, heads, kv_heads, intermediate, vocabulary, **more):
    return {
        "model_type": family,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": intermediate,
        "vocab_size": vocabulary,
        "max_position_embeddings": 131072,
        "torch_dtype": "bfloat16",
        **more,
    }


def experts(count, active, intermediate, **more):
    return {"num_experts": count, "num_experts_per_tok": active, "moe_intermediate_size": intermediate, **more}


MLA = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}
TIED = {"tie_word_embeddings": True}
SPARSE_QWEN = {"decoder_sparse_step": 1, "mlp_only_layers": [], "sliding_window": 32768, "use_sliding_window": False}

PUBLISHED = {
    "Llama-3.1-8B": (usual("llama", 4096, 32, 32, 8, 14336, 128256), 8.03, None),
    "Llama-3.2-3B": (usual("llama", 3072, 28, 24, 8, 8192, 128256, head_dim=128, **TIED), 3.21, None),
    "Llama-3.1-70B": (usual("llama", 8192, 80, 64, 8, 28672, 128256), 70.6, None),
    "Llama-3.1-405B": (usual("llama", 16384, 126, 128, 8, 53248, 128256), 405.9, None),
    "Mistral-7B-v0.1": (usual("mistral", 4096, 32, 32, 8, 14336, 32000, sliding_window=4096), 7.24, None),
    "Mistral-Small-3-24B": (usual("mistral", 5120, 40, 32, 8, 32768, 131072, head_dim=128), 23.6, None),
    "Qwen2.5-7B": (usual("qwen2", 3584, 28, 28, 4, 18944, 152064), 7.61, None),
    "Qwen2.5-14B": (usual("qwen2", 5120, 48, 40, 8, 13824, 152064), 14.77, None),
    "Qwen2.5-32B": (usual("qwen2", 5120, 64, 40, 8, 27648, 152064), 32.76, None),
    "Qwen2.5-72B": (usual("qwen2", 8192, 80, 64, 8, 29568, 152064), 72.7, None),
    "Qwen3-8B": (usual("qwen3", 4096, 36, 32, 8, 12288, 151936, head_dim=128), 8.19, None),
    "Qwen3-14B": (usual("qwen3", 5120, 40, 40, 8, 17408, 151936, head_dim=128), 14.77, None),
    "Qwen3-32B": (usual("qwen3", 5120, 64, 64, 8, 25600, 151936, head_dim=128), 32.76, None),
    "Phi-4": (usual("phi3", 5120, 40, 40, 10, 17920, 100352, sliding_window=None), 14.66, None),
    "Gemma-2-9B": (usual("gemma2", 3584, 42, 16, 8, 14336, 256000), 9.24, None),
    "Gemma-3-27B": (
        {
            "model_type": "gemma3",
            "vision_config": {"hidden_size": 1152},
            "text_config": {
                "model_type": "gemma3_text",
                "hidden_size": 5376,
                "intermediate_size": 21504,
                "num_attention_heads": 32,
                "num_hidden_layers": 62,
                "num_key_value_heads": 16,
                "head_dim": 128,
                "sliding_window": 1024,
            },
        },
        27.0,
        None,
    ),
    "GLM-4-9B": (usual("glm4", 4096, 40, 32, 2, 13696, 151552, head_dim=128), 9.40, None),
    "ChatGLM-4-9B": (
        {
            "model_type": "chatglm",
            "hidden_size": 4096,
            "num_layers": 40,
            "num_attention_heads": 32,
            "multi_query_attention": True,
            "multi_query_group_num": 2,
            "kv_channels": 128,
            "ffn_hidden_size": 13696,
            "padded_vocab_size": 151552,
            "seq_length": 131072,
        },
        9.40,
        None,
    ),
    "Falcon-7B": (
        {
            "model_type": "falcon",
            "hidden_size": 4544,
            "num_hidden_layers": 32,
            "num_attention_heads": 71,
            "num_kv_heads": 71,
            "multi_query": True,
            "new_decoder_architecture": False,
            "vocab_size": 65024,
        },
        6.92,
        None,
    ),
    "Baichuan2-13B": (
        {
            "model_type": "baichuan",
            "hidden_size": 5120,
            "intermediate_size": 13696,
            "num_hidden_layers": 40,
            "num_attention_heads": 40,
            "vocab_size": 125696,
            "model_max_length": 4096,
        },
        13.90,
        None,
    ),
    "Persimmon-8B": (usual("persimmon", 4096, 36, 64, None, 16384, 262144), 9.40, None),
    "Kimi-K2": (
        usual("kimi_k2", 7168, 61, 64, 64, 18432, 163840, q_lora_rank=1536, **MLA)
        | {"n_routed_experts": 384, "num_experts_per_tok": 8, "moe_intermediate_size": 2048, "n_shared_experts": 1}
        | {"first_k_dense_replace": 1, "moe_layer_freq": 1},
        1026.0,
        32.0,
    ),
    "GPT-NeoX-20B": (
        {
            "model_type": "gpt_neox",
            "hidden_size": 6144,
            "num_hidden_layers": 44,
            "num_attention_heads": 64,
            "intermediate_size": 24576,
            "vocab_size": 50432,
            "max_position_embeddings": 2048,
            "torch_dtype": "float16",
        },
        20.6,
        None,
    ),
    "GPT-2-XL": (
        {"model_type": "gpt2", "n_embd": 1600, "n_layer": 48, "n_head": 25, "vocab_size": 50257, "n_positions": 1024},
        1.56,
        None,
    ),
    "Phi-2": (usual("phi", 2560, 32, 32, 32, 10240, 51200), 2.78, None),
    "Mixtral-8x7B": (
        usual("mixtral", 4096, 32, 32, 8, 14336, 32000, num_local_experts=8, num_experts_per_tok=2),
        46.7,
        12.9,
    ),
    "Mixtral-8x22B": (
        usual("mixtral", 6144, 56, 48, 8, 16384, 32768, num_local_experts=8, num_experts_per_tok=2),
        140.6,
        39.1,
    ),
    "Qwen2-57B-A14B": (
        usual("qwen2_moe", 3584, 28, 28, 4, 18944, 151936)
        | experts(64, 8, 2560, shared_expert_intermediate_size=20480)
        | SPARSE_QWEN,
        57.4,
        14.2,
    ),
    "Qwen3-30B-A3B": (
        usual("qwen3_moe", 2048, 48, 32, 4, 6144, 151936, head_dim=128) | experts(128, 8, 768) | SPARSE_QWEN,
        30.5,
        3.3,
    ),
    "Qwen3-235B-A22B": (
        usual("qwen3_moe", 4096, 94, 64, 4, 12288, 151936, head_dim=128) | experts(128, 8, 1536) | SPARSE_QWEN,
        235.1,
        22.0,
    ),
    "gpt-oss-20b": (
        usual("gpt_oss", 2880, 24, 64, 8, 2880, 201088, num_local_experts=32, experts_per_token=4),
        20.9,
        3.6,
    ),
    "gpt-oss-120b": (
        usual("gpt_oss", 2880, 36, 64, 8, 2880, 201088, num_local_experts=128, num_experts_per_tok=4),
        116.8,
        5.1,
    ),
    "Llama-4-Scout": (
        {
            "model_type": "llama4",
            "text_config": usual("llama4_text", 5120, 48, 40, 8, 8192, 202048, head_dim=128)
            | {"intermediate_size_mlp": 16384, "num_local_experts": 16, "num_experts_per_tok": 1}
            | {"interleave_moe_layer_step": 1, "no_rope_layers": [1, 1, 1, 0] * 12},
        },
        107.8,  # 109 with the vision part
        17.0,
    ),
    "Llama-4-Maverick": (
        {
            "model_type": "llama4",
            "text_config": usual("llama4_text", 5120, 48, 40, 8, 8192, 202048, head_dim=128)
            | {"intermediate_size_mlp": 16384, "num_local_experts": 128, "num_experts_per_tok": 1}
            | {"interleave_moe_layer_step": 2},
        },
        400.0,
        17.0,
    ),
    "DeepSeek-V2-Lite": (
        usual("deepseek_v2", 2048, 27, 16, 16, 10944, 102400, q_lora_rank=None, **MLA)
        | {"n_routed_experts": 64, "num_experts_per_tok": 6, "moe_intermediate_size": 1408, "n_shared_experts": 2}
        | {"first_k_dense_replace": 1, "moe_layer_freq": 1},
        15.7,
        2.4,
    ),
    "DeepSeek-V3": (
        usual("deepseek_v3", 7168, 61, 128, 128, 18432, 129280, q_lora_rank=1536, **MLA)
        | {"n_routed_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 2048, "n_shared_experts": 1}
        | {"first_k_dense_replace": 3, "moe_layer_freq": 1, "num_nextn_predict_layers": 1},
        671.0,
        37.0,
    ),
    "GLM-4.5-Air": (
        usual("glm4_moe", 4096, 46, 96, 8, 10944, 151552, head_dim=128)
        | {"n_routed_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 1408, "n_shared_experts": 1}
        | {"first_k_dense_replace": 1},
        106.5,  # given as 106
        None,
    ),
    "Phi-3.5-MoE": (
        usual("phimoe", 4096, 32, 32, 8, 6400, 32064, num_local_experts=16, num_experts_per_tok=2),
        41.9,
        6.6,
    ),
    "OLMoE-7B": (usual("olmoe", 2048, 16, 16, 16, 1024, 50304, num_experts=64, num_experts_per_tok=8), 6.92, 1.3),
    "DBRX": (
        {
            "model_type": "dbrx",
            "d_model": 6144,
            "n_layers": 40,
            "n_heads": 48,
            "vocab_size": 100352,
            "max_seq_len": 32768,
            "attn_config": {"kv_n_heads": 8},
            "ffn_config": {"ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4},
        },
        132.0,
        36.0,
    ),
}
"""By name: the file, and billions of parameters of the decoder, all and active, as published."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_ones(name):
    config, billions, active = PUBLISHED[name]
    model, notes = model_of(config, name)
    assert model.parameters / 1e9 == pytest.approx(billions, rel=0.005)
    if active is not None:
        both = model.active_parameters + (0 if model.tied_embeddings else model.vocabulary * model.hidden)
        assert both / 1e9 == pytest.approx(active, rel=0.03) or model.active_parameters / 1e9 == pytest.approx(
            active, rel=0.03
        )
    assert all("vision" in note for note in notes)


def model(name, **more):
    return model_of(PUBLISHED[name][0] | more, name)[0]


@pytest.mark.parametrize(
    ("name", "window"),
    [
        ("Mistral-7B-v0.1", Window(tokens=4096, layers=32)),
        ("Qwen3-30B-A3B", None),
        ("Phi-4", None),
        ("Gemma-2-9B", Window(tokens=4096, layers=21)),
        ("Gemma-3-27B", Window(tokens=1024, layers=52)),
        ("gpt-oss-120b", Window(tokens=128, layers=18)),
        ("Llama-4-Scout", Window(tokens=8192, layers=36)),
    ],
)
def test_windows(name, window):
    assert model(name).window == window


def test_windows_of_listed_layers_and_from_a_layer_on():
    listed = model("Mistral-7B-v0.1", layer_types=["sliding_attention", "full_attention"] * 16)
    assert listed.window == Window(tokens=4096, layers=16)
    late = model("Qwen2.5-7B", sliding_window=4096, use_sliding_window=True, max_window_layers=21)
    assert late.window == Window(tokens=4096, layers=7)


def test_latent_attention_and_where_experts_are():
    deepseek = model("DeepSeek-V3")
    assert deepseek.latent == Latent(kv_rank=512, rotary=64, key=128, value=128, query_rank=1536)
    assert (deepseek.head_dim, deepseek.kv_bytes_per_token) == (192, 61 * 576 * 2)
    assert deepseek.experts.dense_layers == 3
    assert model("Llama-4-Maverick").experts.dense_layers == 24
    assert model("Qwen3-30B-A3B", mlp_only_layers=[0, 47], decoder_sparse_step=2).experts.dense_layers == 24 + 1
    listed = model("Qwen3-30B-A3B", mlp_layer_types=["dense"] * 3 + ["sparse"] * 45)
    assert listed.experts.dense_layers == 3


FP8_GROUP = {"weights": {"num_bits": 8, "type": "float"}}
INT4_GROUP = {"weights": {"num_bits": 4, "type": "int", "group_size": 128}}


@pytest.mark.parametrize(
    ("quantisation", "weights", "expert_weights", "kv_bytes"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, Weights.FP8, Weights.FP8, 2),
        ({"quant_method": "awq", "bits": 4}, Weights.INT4, Weights.INT4, 2),
        ({"quant_method": "gptq", "bits": 8}, Weights.INT8, Weights.INT8, 2),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, Weights.INT4, Weights.INT4, 2),
        ({"quant_method": "mxfp4"}, Weights.BF16, Weights.MXFP4, 2),
        ({"quant_method": "compressed-tensors", "config_groups": {"group_0": INT4_GROUP}}, Weights.INT4, None, 2),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": FP8_GROUP},
                "kv_cache_scheme": {"num_bits": 8, "type": "float"},
            },
            Weights.FP8,
            None,
            1,
        ),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8"}, Weights.NVFP4, None, 1),
    ],
)
def test_the_format_of_weights_is_apart_from_that_of_the_cache(quantisation, weights, expert_weights, kv_bytes):
    found = model("gpt-oss-20b", quantization_config=quantisation)
    assert (found.weights, found.expert_weights, found.kv_bytes) == (weights, expert_weights or weights, kv_bytes)


KEPT = {
    "compressed-tensors": {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": INT4_GROUP | {"targets": ["Linear"]}},
        "ignore": [
            "lm_head",
            "re:.*self_attn.*",
            "re:.*shared_experts.*",
            r"re:.*mlp\.(gate|up|gate_up|down)_proj.*",
        ],
    },
    "groups": {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": INT4_GROUP | {"targets": [r"re:.*mlp\.experts\..*"]}},
    },
    "awq": {
        "quant_method": "awq",
        "bits": 4,
        "modules_to_not_convert": ["self_attn", "shared_experts", "model.layers.0.mlp", "gate"],
    },
    "gptq": {
        "quant_method": "gptq",
        "bits": 4,
        "dynamic": {r"-:.*self_attn.*": {}, r"-:.*shared_expert": {}, r"-:model\.layers\.0\.": {}},
    },
    "modelopt": {
        "quant_method": "modelopt",
        "quant_algo": "W4A16_AWQ",
        "exclude_modules": ["model.layers.*.self_attn*", "*shared_experts*", "model.layers.0.*", "lm_head"],
    },
}


@pytest.mark.parametrize("writer", KEPT)
def test_modules_that_a_file_leaves_out_stay_bfloat16(writer):
    """As Kimi-K2-Thinking: its routed experts alone are quantised."""
    found, notes = model_of(PUBLISHED["Kimi-K2"][0] | {"quantization_config": KEPT[writer]}, "kimi")
    assert (found.weights, found.expert_weights) == (Weights.BF16, Weights.INT4)
    assert notes == ()
    routed = 60 * 384 * 3 * 7168 * 2048
    expected = routed * Weights.INT4.bytes_per_parameter + 2 * (found.parameters - routed)
    assert found.weight_bytes == pytest.approx(expected)


@pytest.mark.parametrize(
    ("kept", "weights", "noted"),
    [
        (["lm_head", "visual", "model.layers.0.mlp.gate"], Weights.FP8, None),
        (
            ["model.layers.1", "model.layers.2.mlp.up_proj"],
            Weights.FP8,
            "96% of the parameters of the layers are in fp8",
        ),
        (["mlp", "o_proj"], Weights.BF16, "% of the parameters of the layers are in fp8, the others in bf16"),
        (["re:.*"], Weights.BF16, None),
    ],
)
def test_layers_in_two_formats_are_noted(kept, weights, noted):
    quantised = {"quant_method": "fp8", "modules_to_not_convert": kept}
    found, notes = model_of(PUBLISHED["Qwen3-8B"][0] | {"quantization_config": quantised}, "mixed")
    assert found.weights is weights
    assert len(notes) == (noted is not None) and (not noted or noted in notes[0])


def test_where_a_file_says_its_format():
    group = {"quant_method": "compressed-tensors", "config_groups": {"g": FP8_GROUP}}
    assert model("Qwen3-8B", compression_config=group).weights is Weights.FP8
    assert model("Qwen3-8B", compression_config=group, quantization_config=None).weights is Weights.FP8
    inner = PUBLISHED["Llama-4-Scout"][0]["text_config"] | {"quantization_config": None}
    assert model("Llama-4-Scout", text_config=inner, quantization_config=group).weights is Weights.FP8


def test_heads_of_keys_that_a_file_leaves_out():
    def left_out(name):
        config = {key: value for key, value in PUBLISHED[name][0].items() if key != "num_key_value_heads"}
        return model_of(config, name)

    for name in ("Mistral-7B-v0.1", "Mixtral-8x7B"):
        found, notes = left_out(name)
        assert (found.kv_heads, notes) == (8, ())
    found, notes = left_out("Llama-3.1-8B")
    assert found.kv_heads == 32
    assert len(notes) == 1 and "num_key_value_heads: missing" in notes[0]


BAD = [
    ({"hidden_size": 10**400}, "hidden_size: more than 1e+09"),
    ({"max_position_embeddings": 1e30}, "max_position_embeddings: more than 1e+09"),
    ({"model_type": "bert"}, "model_type: 'bert' generates no text"),
    ({"architectures": ["BrandNewForMaskedLM"]}, "generates no text"),
    ({"attn_type_list": [0, 1] * 18}, "attn_type_list: layers of number 0"),
    ({"parallel_attn_mlp_res": True}, "parallel_attn_mlp_res: its layers have a dense part"),
    ({"share_q_dim": 2048}, "share_q_dim: its attention"),
    ({"zero_expert_num": 256}, "zero_expert_num: its layers"),
    ({"word_embed_proj_dim": 512}, "word_embed_proj_dim: 512"),
    (
        {"num_experts": 10**9, "num_experts_per_tok": 1, "moe_intermediate_size": 9, "n_shared_experts": 10**9},
        "shared_intermediate: Input should be less",
    ),
    ({"quantization_config": {"quant_method": "fp8", "ignored_layers": "x"}}, "ignored_layers: not a list of modules"),
    ({"quantization_config": {"quant_method": "fp8", "ignored_layers": ["re:("]}}, "no regular expression"),
    ({"hidden_size": None}, "hidden_size: missing"),
    ({"vocab_size": "many"}, "vocab_size: 'many' is not a whole number"),
    ({"head_dim": None, "num_attention_heads": 30}, "head_dim: missing, and 4096 cannot be divided among 30 heads"),
    ({"num_key_value_heads": 5}, "multiple of kv_heads"),
    ({"is_encoder_decoder": True}, "is_encoder_decoder: it is an encoder"),
    ({"mamba_d_state": 128}, "mamba_d_state: it has layers without attention"),
    ({"sliding_window": 64, "layer_types": ["linear_attention"] * 36}, "layer_types: 'linear_attention'"),
    ({"quantization_config": {"quant_method": "aqlm"}}, "quantization_config.quant_method: 'aqlm'"),
    ({"quantization_config": {"quant_method": "gptq", "bits": 3}}, "quantization_config.bits: 3"),
    ({"num_experts": 8}, "num_experts_per_tok"),
]


@pytest.mark.parametrize(("change", "problem"), BAD)
def test_what_cannot_be_read_names_the_key_and_the_way_out(change, problem):
    with pytest.raises(ConfigError, match=r"config\.json: .*describe the model in a TOML file") as caught:
        model("Qwen3-8B", **change)
    assert problem in str(caught.value)


def test_an_unknown_family_is_read_with_a_note():
    found, notes = model_of(PUBLISHED["Qwen3-8B"][0] | {"model_type": "brand_new"}, "new")
    assert found.parameters == model("Qwen3-8B").parameters
    assert len(notes) == 1 and "model_type 'brand_new' is not known" in notes[0]
    assert "do not rely on its seconds and watts" in notes[0]


def test_a_file_or_its_folder(tmp_path: Path):
    file = tmp_path / "config.json"
    with pytest.raises(ConfigError, match=r"config\.json: cannot be read"):
        read_model(tmp_path, "mine")
    file.write_text("{")
    with pytest.raises(ConfigError, match="not JSON"):
        read_model(file, "mine")
    file.write_text(json.dumps(PUBLISHED["Qwen3-8B"][0]))
    assert read_model(tmp_path, "mine") == read_model(file, "mine")
    beside = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(beside))
    found, _ = read_model(tmp_path, "mine")
    assert (found.name, found.weights, found.kv_bytes) == ("mine", Weights.FP8, 1.0)


def test_the_catalogue_agrees_with_the_files():
    """Each shipped model of a published checkpoint has the figures that its file gives."""
    catalogue, compared = Catalogue.load(), 0
    for name, (config, *_) in PUBLISHED.items():
        if (known := catalogue.checkpoint(f"someone/{name}")) is not None:
            found, _ = model_of(config, known.name)
            free = {"huggingface": (), "max_context_tokens": 1, "weights": known.weights}
            if known.experts:
                free["experts"] = known.experts.model_copy(update={"weights": None})
            assert known.model_copy(update=free) == found.model_copy(update=free | {"experts": found.experts}), name
            compared += 1
    assert compared >= 15


ODD = st.sampled_from([None, True, 0, -1, 3, 2.5, 1e30, float("nan"), "", "x", [], [0, 1], ["a"], [[1]], {}, {"a": 1}])
KEYS = (
    "layer_types moe_layers moe_layer_freq mlp_only_layers rope_scaling quantization_config no_rope_layers head_dim "
    "sliding_window_pattern num_experts first_k_dense_replace model_type text_config attn_config num_hidden_layers"
)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(PUBLISHED)), st.dictionaries(st.sampled_from(sorted(KEYS.split())), ODD, max_size=3))
def test_a_file_is_read_or_refused(name, changed):
    try:
        found, _ = model_of(PUBLISHED[name][0] | changed, name)
    except ConfigError:
        return
    assert found.weight_bytes > 0
