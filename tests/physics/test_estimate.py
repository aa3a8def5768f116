import pytest

from throttllem.physics.catalogue import Catalogue
from throttllem.physics.engine import EnginePhysics
from throttllem.physics.estimate import estimate, reach

CATALOGUE = Catalogue.load()
ENGINE = EnginePhysics(CATALOGUE.gpu("a100-40gb-sxm"), CATALOGUE.model("llama-2-13b"), 4)


def test_is_the_law_itself() -> None:
    got = estimate(ENGINE, 1050, 32, 1000, 1024)
    assert (got.iteration_s, got.power_w) == ENGINE.iteration(1050, 32, 32_000, 1024, 1024**2 / 2)
    assert set(got.to_json()) == {"iteration_s", "power_w", "basis"}
    assert set(got.basis) == {"iteration_s", "power_w"}


def test_inside_the_fitted_range_is_calibrated() -> None:
    assert estimate(ENGINE, 1410, 32, 1000).basis["iteration_s"].startswith("calibrated: operator latencies")
    run = EnginePhysics(CATALOGUE.gpu("a100-40gb-sxm"), CATALOGUE.model("qwen3-8b"), 1)
    assert estimate(run, 1410, 8, 1000, 300).basis["power_w"].startswith("calibrated: watts of one served run")


@pytest.mark.parametrize(
    ("clock_mhz", "batch", "model", "tp", "reason"),
    [
        (405, 1, "llama-2-13b", 4, "405 MHz is outside 1410 to 1410 MHz"),
        (1410, 200, "llama-2-13b", 4, "batch 200 is above 10"),
        (1410, 8, "llama-2-13b", 8, "tp 8 is not among 1"),
        (1410, 8, "llama-3-8b", 1, "llama-3-8b is not qwen3-8b"),
    ],
)
def test_outside_it_is_modelled_with_the_reason(clock_mhz: int, batch: int, model: str, tp: int, reason: str) -> None:
    engine = EnginePhysics(CATALOGUE.gpu("a100-40gb-sxm"), CATALOGUE.model(model), tp)
    basis = estimate(engine, clock_mhz, batch, 100).basis["power_w"]
    assert basis.startswith("modelled: ")
    assert reason in basis


def test_long_prompts_and_parts_of_models_that_were_not_fitted_are_modelled() -> None:
    pcie = EnginePhysics(CATALOGUE.gpu("a100-40gb-pcie"), CATALOGUE.model("llama-3-8b"), 1)
    assert estimate(pcie, 1410, 32, 900, 2048).basis["power_w"].startswith("calibrated")
    basis = estimate(pcie, 1410, 32, 900, 4096).basis
    assert basis["power_w"].startswith("modelled: prefill of 4096 tokens is above 2048")
    assert basis["iteration_s"].startswith("calibrated")
    a100 = EnginePhysics(CATALOGUE.gpu("a100-40gb-sxm"), CATALOGUE.model("gpt-oss-20b"), 1)
    assert "gpt-oss-20b has experts and window and mxfp4, which were not fitted" in str(
        estimate(a100, 1410, 8, 900).basis["iteration_s"]
    )
    h100 = EnginePhysics(CATALOGUE.gpu("h100-80gb-sxm"), CATALOGUE.model("gpt-oss-20b"), 1)
    assert "it was 7.5% off" in estimate(h100, 1980, 8, 900).basis["iteration_s"]  # that of models with parts
    assert "the clock's effect on gpt-oss-20b (fitted on llama-3-70b)" in estimate(h100, 1380, 8, 900).basis["power_w"]


def test_what_the_clock_does_elsewhere_is_modelled() -> None:
    engine = EnginePhysics(CATALOGUE.gpu("a100-40gb-sxm"), CATALOGUE.model("llama-2-13b"), 2)
    assert estimate(engine, 1410, 8, 3000).basis["iteration_s"].startswith("calibrated")
    basis = estimate(engine, 1395, 8, 3000).basis["iteration_s"]
    assert basis.startswith("modelled: the clock's effect at tp 2 (fitted at 1); the clock's effect at context 3000")


def test_the_gpu_that_was_measured_is_calibrated_and_its_model_named() -> None:
    a100, qwen = CATALOGUE.gpu("a100-80gb-sxm"), CATALOGUE.model("qwen3-8b")
    basis = estimate(EnginePhysics(a100, qwen, 1), 1410, 8, 1000, 300).basis
    assert basis["power_w"].startswith("calibrated: watts of one served run of Qwen3-8B on an A100-80GB")
    assert basis["iteration_s"].startswith("calibrated: operator latencies of an A100-SXM4-80GB")
    assert (
        "llama-3-8b is not qwen3-8b"
        in estimate(EnginePhysics(a100, CATALOGUE.model("llama-3-8b"), 1), 1410, 8, 1000).basis["power_w"]
    )
    a10 = estimate(EnginePhysics(CATALOGUE.gpu("a10-24gb"), qwen, 1), 1695, 1, 1000).basis
    assert (
        "inherited from a40-48gb and scaled by the data sheet (calibrated there, for llama-3-8b alone" in a10["power_w"]
    )


@pytest.mark.parametrize(
    ("clock_mhz", "batch", "context", "prefill", "kind"),
    [
        (1410, 32, 900, 0, "measured: a source lies within 10% of this point"),
        (1080, 35, 900, 0, "measured"),
        (795, 32, 900, 0, "calibrated"),
        (1410, 25, 900, 0, "calibrated"),
        (1410, 32, 500, 0, "calibrated"),
        (1410, 32, 900, 64, "calibrated"),
        (1410, 8, 3000, 0, "modelled"),
        (600, 32, 900, 0, "modelled"),
    ],
)
def test_close_to_a_measured_point_is_measured(
    clock_mhz: int, batch: int, context: int, prefill: int, kind: str
) -> None:
    engine = EnginePhysics(CATALOGUE.gpu("a100-40gb-pcie"), CATALOGUE.model("llama-3-8b"), 1)
    assert estimate(engine, clock_mhz, batch, context, prefill).basis["power_w"].startswith(kind)
    assert not estimate(engine, clock_mhz, batch, context, prefill).basis["iteration_s"].startswith("measured")


def test_summed_operators_are_measured_at_the_top_clock_only() -> None:
    engine = EnginePhysics(CATALOGUE.gpu("h100-80gb-sxm"), CATALOGUE.model("llama-3-70b"), 4)
    assert estimate(engine, 1980, 64, 1100).basis["iteration_s"].startswith("measured")
    assert estimate(engine, 1980, 64, 1500).basis["iteration_s"].startswith("calibrated")
    assert estimate(engine, 1380, 64, 1100).basis["iteration_s"].startswith("calibrated")


def test_the_held_out_error_is_stated() -> None:
    pcie = EnginePhysics(CATALOGUE.gpu("a100-40gb-pcie"), CATALOGUE.model("llama-3-8b"), 1)
    assert estimate(pcie, 795, 32, 900).basis["power_w"].endswith("; held out, it was 4.7% off (median)")
    h100 = EnginePhysics(CATALOGUE.gpu("h100-80gb-sxm"), CATALOGUE.model("llama-3-70b"), 4)
    assert "it was 2.4% off" in estimate(h100, 1980, 24, 900).basis["iteration_s"]
    assert "it was 10.0% off" in estimate(h100, 1380, 24, 900).basis["iteration_s"]
    assert "held out" not in estimate(ENGINE, 1050, 32, 1000).basis["power_w"]  # calibration points only


def test_the_reach_of_a_whole_simulation() -> None:
    gpu, model = CATALOGUE.gpu("a100-40gb-sxm"), CATALOGUE.model("llama-2-13b")
    four = reach(EnginePhysics(gpu, model, 4), 1200)
    assert four["seconds"]["kind"] == "calibrated"
    assert four["seconds"]["below_top"] == "the clock's effect at tp 4 (fitted at 1)"
    assert four["watts"]["kind"] == "modelled"
    assert four["watts"]["why"] == "tp 4 is not among 1; llama-2-13b is not qwen3-8b"
    sweep = reach(EnginePhysics(CATALOGUE.gpu("a100-40gb-pcie"), CATALOGUE.model("llama-3-8b"), 1), 1200)
    assert sweep["watts"] == {
        "kind": "calibrated",
        "why": "",
        "clocks_mhz": [705, 1410],
        "below_top": "",
        "error": 0.047,
    }
    assert "context 3000 (fitted up to 1300)" in str(reach(EnginePhysics(gpu, model, 4), 3000)["seconds"]["below_top"])


def test_a_users_measured_law_is_called_measured() -> None:
    gpu = CATALOGUE.gpu("a100-40gb-sxm")
    mine = gpu.model_copy(
        update={
            "time_basis": gpu.time_basis.model_copy(update={"kind": "measured", "source": "me", "median_error": None})
        }
    )
    engine = EnginePhysics(mine, CATALOGUE.model("llama-2-13b"), 4)
    assert estimate(engine, 1410, 1, 100).basis["iteration_s"] == "measured: me"
    assert estimate(engine, 300, 1, 100).basis["iteration_s"].startswith("modelled: 300 MHz is outside 705 to 1410")


@pytest.mark.parametrize(
    ("point", "message"),
    [
        ((1000, 1, 100, 0), "clock 1000 MHz: a100-40gb-sxm can be set to 210 to 1410 MHz in steps of 15"),
        ((1425, 1, 100, 0), "clock 1425 MHz"),
        ((1410, 0, 100, 0), "batch 0: must be 1 or more"),
        ((1410, 1, 0, 0), "context 0 tokens: llama-2-13b holds 1 to 4096 per request"),
        ((1410, 1, 4097, 0), "context 4097 tokens"),
        ((1410, 1, 100, -1), "prefill -1 tokens: llama-2-13b holds 0 to 4096"),
        ((1410, 100, 4000, 0), "= 400000 tokens: the KV cache of llama-2-13b on 4 x a100-40gb-sxm holds 0 to"),
    ],
)
def test_bad_points_name_value_and_range(point: tuple[int, int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        estimate(ENGINE, *point)
