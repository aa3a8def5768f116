"""What other clocks would save before any profile: a range, what it rests on, and nothing where nothing is known."""

import pytest

from throttllem.config import BatchingOptions
from throttllem.core.types import Slo
from throttllem.engines.simulated.fleet import build_fleet
from throttllem.gateway.energy.prior_estimate import PriorEstimate
from throttllem.physics.catalogue import Catalogue

LOOSE, TIGHT = Slo(e2e_s=20.0), Slo(tbt_s=0.012)


def estimate(slo=LOOSE, *, known=True):
    fleet = build_fleet(Catalogue.load(), "a100-40gb-sxm", "llama-2-13b", (4,), BatchingOptions())
    made = PriorEstimate(physics=lambda: fleet.physics[4] if known else None, slo=slo)
    made.spec = fleet.specs[4]
    return made


def serve(made, requests_per_s=2.0, seconds=60, **more):
    """Chats of 1,000 prompt and 200 output tokens, second by second."""
    for _ in range(seconds):
        count = round(requests_per_s)
        tokens = {"output_tokens": 200 * count, "prompts": count, "prompt_tokens": 1000 * count}
        made.worked(seconds=1.0, joules=900.0, **tokens, **more)


def test_a_load_that_lower_clocks_hold_would_save_within_a_range():
    made = estimate()
    assert made.saving() is None, "no slice has ended"
    serve(made)
    found = made.saving()
    assert 0.1 < found.saving < 0.6
    assert 0 <= found.low <= found.saving <= found.high < 0.8 and found.low < found.high
    assert "law of a100-40gb-sxm in the catalogue" in found.basis and "no profile" in found.basis


def test_a_tight_slo_leaves_less_and_an_overload_nothing():
    loose, tight, full = estimate(), estimate(TIGHT), estimate()
    serve(loose)
    serve(tight)
    serve(full, requests_per_s=40)
    assert tight.saving().saving < loose.saving().saving
    assert full.saving().saving == pytest.approx(0.0)


def test_idle_time_saves_nothing_and_an_unknown_model_says_nothing():
    made, unknown = estimate(), estimate(known=False)
    serve(made)
    before = made.saving().saving
    made.idle(60.0, 60 * 200.0)
    assert 0 < made.saving().saving < before
    serve(unknown)
    assert unknown.saving() is None


def test_an_engine_that_speculates_has_room_for_lower_clocks():
    plain, fast = estimate(TIGHT), estimate(TIGHT)
    serve(plain)
    serve(fast, tokens_per_step=3.0)
    assert fast.saving().saving > plain.saving().saving
