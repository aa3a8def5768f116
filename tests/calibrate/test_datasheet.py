import pytest

from throttllem.calibrate.datasheet import KEYS, with_datasheet
from throttllem.physics.catalogue import Catalogue

LIKE = Catalogue.load().gpu("a40-48gb")
L40S = ("clock_max_mhz=2520", "bandwidth_bytes_per_s=864e9", "peak_flop_per_s=362e12", "limit_w=350", "idle_w=35")


def test_figures_go_in_and_first_guesses_move_along() -> None:
    gpu = with_datasheet(LIKE, L40S)
    assert (gpu.clock_max_mhz, gpu.bandwidth_bytes_per_s, gpu.peak_flop_per_s) == (2520, 864e9, 362e12)
    assert (gpu.power.limit_w, gpu.power.idle_w) == (350, 35)
    assert gpu.power.core_w == pytest.approx(LIKE.power.core_w * 350 / 300)
    assert gpu.power.knee_mhz == pytest.approx(LIKE.power.knee_mhz * 2520 / 1740)
    assert gpu.time.memory_knee_mhz == pytest.approx(LIKE.time.memory_knee_mhz * 2520 / 1740)
    assert gpu.memory_bytes == LIKE.memory_bytes


def test_nothing_given_nothing_changed() -> None:
    assert with_datasheet(LIKE, ()) is LIKE


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("clock_max=2520", "did you mean clock_max_mhz"),
        ("limit_w", "write key=value"),
        ("limit_w=much", "'much' is not a number"),
        ("clock_max_mhz=2521", "clock_max_mhz must be clock_min_mhz plus"),
        ("memory_bytes=-1", "--sheet memory_bytes"),
        ("limit_w=nan", "limit_w"),
        ("idle_w=400", "must be below power.limit_w"),
    ],
)
def test_impossible_figures_are_refused(setting: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        with_datasheet(LIKE, [setting])


def test_every_key_is_a_figure_of_the_entry() -> None:
    for key in KEYS:
        assert isinstance(getattr(LIKE.power if key.endswith("_w") else LIKE, key), int | float | None)
