"""The generators against the published statistics of the traces that they are like."""

import numpy as np
import pytest

from throttllem.sim.traces.generators import NAMES, TraceError, generate


@pytest.mark.parametrize(
    ("name", "requests", "prompt", "answer"),
    [("azure-conv-like", 19_366, (1155, 1020), (211, 129)), ("azure-code-like", 8_819, (2048, 1500), (28, 13))],
)
def test_published_statistics(name, requests, prompt, answer):
    """Count: Poisson noise only (4 sigma). Lengths: mean 6 % and median 4 % of ours, for their noise over a draw of
    8,819 or more (standard errors: 1 % of most means, 2 % of code's heavy-tailed answers) and the rounding of knots."""
    trace = generate(name, {}, 1)
    assert abs(trace.arrival_s.size - requests) < 4 * requests**0.5
    for tokens, (mean, median) in ((trace.prompt_tokens, prompt), (trace.output_tokens, answer)):
        assert tokens.mean() == pytest.approx(mean, rel=0.06)
        # One token is the resolution of code's median answer, 13.
        assert np.median(tokens) == pytest.approx(median, rel=0.04, abs=1)
    assert 3400 < trace.arrival_s[-1] < 3600


def _rate_spread(arrival_s, window_s):
    """Squared coefficient of variation of the rate, with the Poisson part of the variance taken out."""
    counts, _ = np.histogram(arrival_s, np.arange(0, 3601, window_s))
    return (counts.var() - counts.mean()) / counts.mean() ** 2


def test_code_comes_in_bursts_and_chat_does_not():
    """Azure 2023, windows of 10 s: 2.8 (code), 0.04 (first half of conv). Averaged over seeds, within a factor of 2."""
    code = np.mean([_rate_spread(generate("azure-code-like", {}, seed).arrival_s, 10) for seed in range(8)])
    conv = np.mean([_rate_spread(generate("azure-conv-like", {}, seed).arrival_s, 10) for seed in range(8)])
    assert 1.4 < code < 5.6
    assert 0.02 < conv < 0.08


def test_long_prompts_have_the_published_means():
    """Mooncake's synthetic trace: prompts of 15,325 tokens, outputs of 149; means to 5 %."""
    trace = generate("mooncake-like", {"seconds": "4000"}, 1)
    assert trace.prompt_tokens.mean() == pytest.approx(15_325, rel=0.05)
    assert trace.output_tokens.mean() == pytest.approx(149, rel=0.05)
    assert np.median(trace.prompt_tokens) == pytest.approx(11_587, rel=0.05)


def test_long_prompts_can_be_left_out():
    options = {"seconds": "400"}
    every, short = (generate("mooncake-like", {**options, **more}, 1) for more in ({}, {"longest": "8000"}))
    kept = every.prompt_tokens <= 8000
    assert 0.3 < kept.mean() < 0.6
    assert np.array_equal(short.arrival_s, every.arrival_s[kept])
    assert np.array_equal(short.output_tokens, every.output_tokens[kept])
    with pytest.raises(TraceError, match="longest 1 leaves no request"):
        generate("mooncake-like", {**options, "longest": "1"}, 1)


def test_a_day_rises_and_falls():
    """The same requests, at a fifth of the mean rate at its ends and 1.8 times it in the middle."""
    options = {"seconds": "6000", "rate": "5"}
    flat, day = (generate("poisson", {**options, **more}, 1).arrival_s for more in ({}, {"day": "3000"}))
    assert flat.size == day.size
    counts, _ = np.histogram(day, np.arange(0, 6001, 300))
    rates = (counts / 1500).reshape(2, 10)
    assert rates[:, 0] == pytest.approx(0.2, abs=0.15)
    assert rates[:, 4:6].mean() == pytest.approx(1.75, abs=0.15)


def test_poisson_is_not_modulated():
    trace = generate("poisson", {"rate": "5", "seconds": "3600", "input": "7", "output": "3"}, 1)
    assert trace.arrival_s.size == pytest.approx(18_000, abs=4 * 18_000**0.5)
    # The index of dispersion of 360 windows is 1 with a standard deviation of (2 / 360) ** 0.5 = 0.075.
    counts, _ = np.histogram(trace.arrival_s, np.arange(0, 3601, 10))
    assert counts.var() / counts.mean() == pytest.approx(1, abs=0.3)
    assert set(trace.prompt_tokens) == {7}
    assert set(trace.output_tokens) == {3}


def test_poisson_defaults():
    trace = generate("poisson", {}, 1)
    assert trace.arrival_s.size == pytest.approx(600, abs=100)
    assert (trace.prompt_tokens[0], trace.output_tokens[0]) == (1023, 99)


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_requests(name):
    first, again, other = (generate(name, {"seconds": "200"}, seed) for seed in (7, 7, 8))
    by_option = generate(name, {"seconds": "200", "seed": "7"}, 8)
    for one, two, three in zip(first, again, by_option, strict=True):
        assert np.array_equal(one, two)
        assert np.array_equal(one, three)
    assert not np.array_equal(first.arrival_s, other.arrival_s)


@pytest.mark.parametrize("name", NAMES)
def test_rate_and_seconds_mean_what_they_say(name):
    trace = generate(name, {"rate": "20", "seconds": "100"}, 3)
    assert trace.arrival_s.size == pytest.approx(2000, abs=4 * 2000**0.5)
    assert (np.diff(trace.arrival_s) >= 0).all()
    assert trace.arrival_s[0] >= 0
    assert trace.arrival_s[-1] < 100
    assert trace.prompt_tokens.min() >= 1
    assert trace.output_tokens.min() >= 1


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("poisson", {"rte": "2"}, "unknown option 'rte'; did you mean rate?"),
        ("azure-conv-like", {"input": "4"}, "unknown option 'input'; known: seconds, rate, seed"),
        ("poisson", {"rate": "-1"}, "rate = '-1': must be a positive number"),
        ("poisson", {"rate": "nan"}, "rate = 'nan': must be a positive number"),
        ("poisson", {"seconds": "soon"}, "seconds = 'soon': must be a positive number"),
        ("poisson", {"input": "0"}, "input = '0': must be a whole number of 1 or more"),
        ("poisson", {"output": "1.5"}, "output = '1.5': must be a whole number"),
        ("azure-code-like", {"seed": "-1"}, "seed = '-1': must be a whole number of 0 or more"),
        ("poisson", {"rate": "1e9"}, "over 10,000,000 requests"),
        ("poisson", {"rate": "1e-6", "seconds": "1"}, "gives no request"),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(TraceError) as caught:
        generate(name, options, 0)
    assert str(caught.value).startswith(f"{name}: ")
    assert message in str(caught.value)


def test_a_negative_seed_is_refused():
    with pytest.raises(TraceError, match="seed = -3: must be 0 or more"):
        generate("poisson", {}, -3)
