import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from throttllem.physics.catalogue import Catalogue, CatalogueError, UnknownName
from throttllem.physics.model import Weights

GPUS = {"a100-40gb-pcie", "a100-40gb-sxm", "a40-48gb", "h100-80gb-sxm"}
MODELS = {"llama-2-13b", "llama-3-70b", "llama-3-8b", "qwen3-30b-a3b", "mixtral-8x7b", "gpt-oss-120b"}
TINY = """
[model.tiny]
layers = 2
hidden = 64
heads = 4
kv_heads = 2
head_dim = 16
intermediate = 128
vocabulary = 1000
max_context_tokens = 512
"""


@pytest.fixture
def extra(tmp_path: Path) -> Path:
    return tmp_path / "mine.toml"


def test_ships_the_contract_names() -> None:
    catalogue = Catalogue.load()
    assert set(catalogue.gpus) >= GPUS
    assert catalogue.models.keys() >= MODELS


def test_clock_grids() -> None:
    catalogue = Catalogue.load()
    a100, h100 = catalogue.gpu("a100-40gb-sxm").clocks_mhz, catalogue.gpu("h100-80gb-sxm").clocks_mhz
    assert (len(a100), a100[0], a100[1], a100[-1]) == (81, 210, 225, 1410)
    assert (len(h100), h100[0], h100[-1]) == (110, 345, 1980)


@pytest.mark.parametrize(("name", "billions"), [("llama-2-13b", 13.02), ("llama-3-8b", 8.03), ("llama-3-70b", 70.55)])
def test_parameters_are_the_published_ones(name: str, billions: float) -> None:
    assert Catalogue.load().model(name).weight_bytes / 2e9 == pytest.approx(billions, rel=0.002)


def test_kv_bytes_by_hand() -> None:
    assert Catalogue.load().model("llama-2-13b").kv_bytes_per_token == 2 * 40 * 40 * 128 * 2
    assert Catalogue.load().model("llama-3-8b").kv_bytes_per_token == 2 * 32 * 8 * 128 * 2


def test_unknown_name_lists_the_nearest() -> None:
    catalogue = Catalogue.load()
    with pytest.raises(UnknownName, match=r"unknown GPU 'a100-40gb': did you mean .*a100-40gb-sxm"):
        catalogue.gpu("a100-40gb")
    with pytest.raises(UnknownName, match=r"unknown model 'llama-2-13': did you mean llama-2-13b"):
        catalogue.model("llama-2-13")
    with pytest.raises(UnknownName, match=r"known: .*llama-2-13b, .* \(a config\.json"):
        catalogue.model("zzz")


def test_extra_file_adds_and_replaces(extra: Path) -> None:
    extra.write_text(TINY + TINY.replace("tiny", "llama-3-8b"))
    catalogue = Catalogue.load(extra)
    assert catalogue.model("tiny").layers == 2
    assert catalogue.model("llama-3-8b").layers == 2
    assert catalogue.model("llama-2-13b").layers == 40


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[model", "not valid TOML"),
        ("[models.tiny]", "unknown key 'models': write tables"),
        ("model = 3", "model: must hold tables"),
        (TINY.replace("layers = 2\n", ""), "model.tiny.layers: missing; add it"),
        (TINY.replace("hidden = 64", "hidden = 1" + 400 * "0"), "model.tiny.hidden: 1000+: must be"),
        (TINY.replace("hidden = 64", "hidden = 1" + 5000 * "0"), "not valid TOML: .*digits"),
        (TINY.replace("layers = 2", "layers = true"), "model.tiny.layers: must be a number or a text, not true"),
        (TINY + "colour = 1", "model.tiny.colour: unknown key; remove it"),
        (TINY.replace("layers = 2", "layers = 0"), "model.tiny.layers: .*greater than 0"),
        (TINY.replace("kv_heads = 2", "kv_heads = 3"), "model.tiny: .*multiple of kv_heads"),
        (TINY + 'name = "x"', "model.tiny.name: leave it out"),
        (
            TINY.replace("tiny", "tiny1.5-7b"),
            r"\[model.tiny1.5-7b\]: a name with a dot .* write \[model.\"tiny1.5-7b\"\]",
        ),
        ("[gpu.a.b.c]\nclock_min_mhz = 1", r'\[gpu.a.b.c\]: .*write \[gpu."a.b.c"\]'),
        (TINY + 'weights = "fp7"', "model.tiny.weights: .*'bf16', 'fp8', 'int8', 'int4', 'mxfp4' or 'nvfp4'"),
        (TINY + "experts = {count = 4, active = 8, intermediate = 8}", "model.tiny: .*experts.active"),
        (TINY + "window = {tokens = 128, layers = 3}", "model.tiny: .*window.layers"),
    ],
)
def test_bad_extra_file_names_file_key_and_fix(extra: Path, text: str, message: str) -> None:
    extra.write_text(text)
    with pytest.raises(CatalogueError, match=f"mine.toml: {message}"):
        Catalogue.load(extra)


def test_a_checkpoint_by_name_by_file_and_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    catalogue = Catalogue.load()
    qwen = catalogue.model("qwen3-8b")
    for name in ("Qwen/Qwen3-8B", "qwen3-8b", "/models/Qwen3-8B", "someone/Qwen3-8B-Base"):
        assert catalogue.model(name) == qwen
    assert catalogue.model("Qwen/Qwen3-30B-A3B-Instruct-2507-FP8").weights is Weights.FP8
    assert catalogue.model("Qwen/Qwen2.5-7B-Instruct-AWQ").weights is Weights.INT4
    assert catalogue.model("unsloth/gpt-oss-20b-BF16").expert_weights is Weights.BF16
    assert catalogue.checkpoint("someone/Qwen3-8B-cooking") is None
    config = {"model_type": "qwen3", "hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32}
    config |= {"num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 12288, "vocab_size": 151936}
    folder = tmp_path / "models--someone--Qwen3-8B-cooking" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1000}))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    found = catalogue.model("someone/Qwen3-8B-cooking")
    assert (
        found == catalogue.model(str(folder)) == qwen.model_copy(update={"huggingface": (), "max_context_tokens": 1000})
    ), "the same figures: the same name, so that what was measured with it counts"


def test_a_quantised_folder_is_named_after_its_model(tmp_path: Path) -> None:
    config = {"model_type": "qwen3", "hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32}
    config |= {"num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 12288, "vocab_size": 151936}
    config |= {"max_position_embeddings": 1000, "quantization_config": {"quant_method": "fp8"}}
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    found = Catalogue.load().model(str(folder))
    assert found.name == "qwen3-8b-fp8"
    assert found.same_figures(Catalogue.load().model(found.name)), "and that name is read as the same"


def test_missing_extra_file(extra: Path) -> None:
    with pytest.raises(CatalogueError, match=r"mine.toml: cannot be read"):
        Catalogue.load(extra)


def test_constants_are_frozen_and_checked() -> None:
    gpu = Catalogue.load().gpu("a100-40gb-sxm")
    with pytest.raises(ValidationError, match="frozen"):
        gpu.startup_s = 1.0
    for change, message in (
        ({"clock_step_mhz": 7}, "clock_step_mhz"),
        ({"power": gpu.power.model_dump() | {"knee_mhz": 2000.0}}, "power.knee_mhz"),
        ({"power": gpu.power.model_dump() | {"static_w": 400.0}}, "power.limit_w"),
    ):
        with pytest.raises(ValidationError, match=message):
            type(gpu).model_validate(gpu.model_dump() | change)
