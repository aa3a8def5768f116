"""Every claim of the paper, in its order, with its figures; below them what this project adds.

Figures: throttLL'eM (HPCA 2025, arXiv 2408.05235), abstract and evaluation. Knows nothing of measurements.
"""

from __future__ import annotations

from throttllem.reproduce.claims import Claim, Figure, Form, Rule


def _gain(paper: float, form: Form, name: str = "") -> Figure:
    return Figure(paper=paper, rule=Rule.GAIN, form=form, name=name)


def _shown(form: Form, name: str = "", words: str = "") -> Figure:
    return Figure(paper=0.0, rule=Rule.SHOWN, form=form, name=name, words=words)


def _one(id_: str, text: str, paper: float, rule: Rule, form: Form, name: str = "") -> Claim:
    return Claim(id=id_, text=text, figures=(Figure(paper=paper, rule=rule, form=form, name=name),))


PAPER = (
    _one("model-r2", "R2 of the performance model, worst engine", 0.97, Rule.ABOVE, Form.PLAIN),
    _one("model-mae", "mean error of the model over engines", 1.0, Rule.BELOW, Form.PLAIN, "iterations/s"),
    Claim(
        id="model-mape",
        text="MAPE of the model, best and worst engine",
        figures=(
            Figure(paper=0.028, rule=Rule.SHOWN, form=Form.SHARE, name="best"),
            Figure(paper=0.058, rule=Rule.ERROR, form=Form.SHARE, name="worst"),
        ),
    ),
    _one("projection-batch", "mean projection error of the batch", 0.0019, Rule.AT_MOST, Form.FINE),
    _one("projection-kv", "mean projection error of KV blocks", 0.0226, Rule.AT_MOST, Form.FINE),
    _one("kv-tbt", "correlation of KV use with TBT", 0.92, Rule.STRENGTH, Form.PLAIN),
    _one("kv-throughput", "correlation of KV use with throughput", -0.92, Rule.STRENGTH, Form.PLAIN),
    Claim(
        id="sweet-spot",
        text="clock of most tokens/J at the largest batch",
        figures=(
            Figure(paper=1050, rule=Rule.SHOWN, form=Form.MHZ),
            Figure(paper=0.374, rule=Rule.SHOWN, form=Form.MORE, name="tokens/J"),
            Figure(paper=0.0625, rule=Rule.SHOWN, form=Form.LESS, name="throughput"),
        ),
        calibrated=True,
    ),
    Claim(
        id="too-low",
        text="energy per token rises again below",
        figures=(Figure(paper=840, rule=Rule.SHOWN, form=Form.MHZ),),
        calibrated=True,
    ),
    Claim(
        id="throttle-energy",
        text="throttling alone over engines: energy",
        figures=(_gain(0.247, Form.LESS, "mean"), _gain(0.307, Form.LESS, "best")),
    ),
    Claim(
        id="throttle-tpj",
        text="the same: tokens per joule",
        figures=(
            _gain(0.363, Form.MORE, "mean"),
            _gain(0.443, Form.MORE, "best"),
            _gain(0.300, Form.MORE, "mean at 30 % error"),
        ),
    ),
    Claim(id="scale-only", text="autoscaling alone: energy", figures=(_gain(0.208, Form.LESS),)),
    Claim(id="throttle-only-tp4", text="throttling alone at TP 4: energy", figures=(_gain(0.306, Form.LESS),)),
    Claim(
        id="both-oracle",
        text="throttling and autoscaling, oracle lengths",
        figures=(_gain(0.438, Form.LESS), _gain(0.78, Form.FACTOR, "tokens/J")),
    ),
    Claim(
        id="both-30",
        text="the same with 30 % length error",
        figures=(_gain(0.417, Form.LESS), _gain(0.71, Form.FACTOR, "tokens/J")),
    ),
    Claim(
        id="baseline-tpj",
        text="Triton fixed at TP 4: tokens per joule",
        figures=(Figure(paper=0.69, rule=Rule.SHOWN, form=Form.PLAIN),),
        calibrated=True,
    ),
    Claim(
        id="slo",
        text="p99 of E2E and of a request's mean TBT within the SLOs, every throttllem run",
        figures=(
            Figure(paper=1.0, rule=Rule.EVERY, form=Form.SHARE, name="E2E", words="E2E met"),
            Figure(paper=1.0, rule=Rule.EVERY, form=Form.SHARE, name="TBT", words="TBT met"),
        ),
    ),
    Claim(
        id="tp1",
        text="TP 1: baseline near its SLO, little room to save",
        figures=(
            Figure(paper=1.0, rule=Rule.NEAR, form=Form.PLAIN, name="of its SLO", words="p99 near its SLO"),
            Figure(
                paper=0.5,
                rule=Rule.AT_MOST,
                form=Form.SHARE,
                name="of TP 4's saving",
                words="little to save: at most half of TP 4's saving",
            ),
        ),
    ),
)
"""The ids of the paper's evaluation, each once."""

OURS = (
    Claim(
        id="ours-least-energy",
        text="least-energy over engines: energy",
        figures=(_shown(Form.LESS, "mean"), _shown(Form.LESS, "best"), _shown(Form.LESS, "mean at 30 % error")),
    ),
    Claim(
        id="ours-least-energy-autoscale",
        text="least-energy and autoscaling against fixed TP 4",
        figures=(_shown(Form.LESS), _shown(Form.FACTOR, "tokens/J")),
    ),
    Claim(
        id="ours-half-load",
        text="sizes 1, 2, 4 at half the load: energy against fixed TP 4",
        figures=(
            _shown(Form.LESS, "scaling"),
            _shown(Form.LESS, "throttllem too"),
            _shown(Form.LESS, "least-energy too"),
        ),
    ),
    Claim(
        id="ours-decision-time",
        text="one decision: mean, worst p99 of a run",
        figures=(_shown(Form.MILLISECONDS, "mean", "35 ms, model and scheduler"), _shown(Form.MILLISECONDS, "p99")),
    ),
)
"""What this project shows beside them."""
