import pytest
from pydantic import ValidationError

from throttllem.physics.catalogue import Catalogue

CATALOGUE = Catalogue.load()
MIXTRAL, DEEPSEEK, GPT_OSS = (CATALOGUE.model(name) for name in ("mixtral-8x7b", "deepseek-v3", "gpt-oss-120b"))


@pytest.mark.parametrize(
    ("name", "billions", "active_billions"),
    [
        ("mixtral-8x7b", 46.7, 12.9),
        ("deepseek-v3", 671.0, 37.0),
        ("gpt-oss-20b", 20.9, 3.6),
        ("gpt-oss-120b", 116.8, 5.1),
        ("qwen3-8b", 8.19, 7.57),
        ("qwen3-14b", 14.8, 14.0),
        ("qwen3-32b", 32.8, 32.0),
        ("qwen3-30b-a3b", 30.5, 3.04),
        ("qwen3-235b-a22b", 235.0, 21.5),
    ],
)
def test_parameters_are_the_published_ones(name: str, billions: float, active_billions: float) -> None:
    model = CATALOGUE.model(name)
    assert model.parameters / 1e9 == pytest.approx(billions, rel=0.003)
    assert model.active_parameters / 1e9 == pytest.approx(active_billions, rel=0.03)


def test_bytes_follow_what_is_quantised() -> None:
    assert MIXTRAL.weight_bytes == 2 * MIXTRAL.parameters
    assert DEEPSEEK.weight_bytes == DEEPSEEK.parameters + 2 * 129280 * 7168  # embedding and head stay bfloat16
    assert GPT_OSS.weight_bytes / 1e9 == pytest.approx(65.2, rel=0.01)  # the checkpoint's files
    tied = MIXTRAL.model_copy(update={"tied_embeddings": True})
    assert MIXTRAL.weight_bytes - tied.weight_bytes == 2 * 32000 * 4096


def test_the_cache_holds_heads_or_one_latent_vector() -> None:
    assert MIXTRAL.kv_bytes_per_token == 2 * 32 * 8 * 128 * 2
    assert DEEPSEEK.kv_bytes_per_token == 61 * (512 + 64) * 2
    assert DEEPSEEK.model_copy(update={"kv_bytes": 1.0}).kv_bytes_per_token == 61 * (512 + 64)


def test_figures_of_no_model_are_refused() -> None:
    for name, value in {"hidden": 10**400, "layers": 10**10, "vocabulary": 10**400, "kv_bytes": 1e300}.items():
        with pytest.raises(ValidationError, match=f"(?s){name}.*less than or equal to"):
            type(MIXTRAL).model_validate(MIXTRAL.model_dump() | {name: value})
