import pytest

from throttllem.physics.model import Experts, Latent, Model, Weights, Window

MIXTRAL = Model(
    name="mixtral-8x7b",
    layers=32,
    hidden=4096,
    heads=32,
    kv_heads=8,
    head_dim=128,
    intermediate=14336,
    vocabulary=32000,
    max_context_tokens=32768,
    experts=Experts(count=8, active=2, intermediate=14336),
)
DEEPSEEK = Model(
    name="deepseek-v3",
    layers=61,
    hidden=7168,
    heads=128,
    kv_heads=128,
    head_dim=192,
    intermediate=18432,
    vocabulary=129280,
    max_context_tokens=163840,
    weights=Weights.FP8,
    experts=Experts(count=256, active=8, intermediate=2048, shared_intermediate=2048, dense_layers=3),
    latent=Latent(kv_rank=512, rotary=64, key=128, value=128, query_rank=1536),
)
GPT_OSS = Model(
    name="gpt-oss-120b",
    layers=36,
    hidden=2880,
    heads=64,
    kv_heads=8,
    head_dim=64,
    intermediate=2880,
    vocabulary=201088,
    max_context_tokens=131072,
    experts=Experts(count=128, active=4, intermediate=2880, weights=Weights.MXFP4),
    window=Window(tokens=128, layers=18),
)


@pytest.mark.parametrize(
    ("model", "billions", "active_billions"),
    [(MIXTRAL, 46.7, 12.9), (DEEPSEEK, 671.0, 37.0), (GPT_OSS, 116.8, 5.1)],
    ids=lambda value: getattr(value, "name", None),
)
def test_parameters_are_the_published_ones(model: Model, billions: float, active_billions: float) -> None:
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
