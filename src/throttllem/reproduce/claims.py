"""The paper's claims as figures, each with a criterion fixed before any run, and the judgement of our figures.

Source of every figure: throttLL'eM (HPCA 2025, arXiv 2408.05235), abstract and evaluation; claims `ours-...` are this
project's and have no figure to meet. Knows nothing of how a figure is measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

CLOSE = 0.85
"""A figure within a relative 15 % of the paper's counts as reproduced: simulated hardware scatters about as much
from one calibration to the next."""


class Standing(StrEnum):
    """The verdict on a claim."""

    REPRODUCED = "reproduced"
    BETTER = "better"
    NOT_REPRODUCED = "not reproduced"
    OURS = "ours"


class Rule(StrEnum):
    """When a figure holds; the value is the text of the criterion."""

    ABOVE = "above the figure"
    BELOW = "below the figure"
    GAIN = "at least 85 % of the paper's gain; better above it"
    ERROR = "at most the paper's error; better below it"
    AT_MOST = "at most the figure"
    STRENGTH = "the same sign and at least 85 % as strong"
    EVERY = "in every run"
    NEAR = "at least 85 % of the figure"
    WITHIN = "within 15 % of the figure"
    SHOWN = "shown, not judged"

    def judge(self, paper: float, ours: float) -> Standing:
        """The standing of one figure; OURS for a figure that is only shown."""
        match self:
            case Rule.SHOWN:
                return Standing.OURS
            case Rule.ABOVE:
                holds, better = ours > paper, False
            case Rule.BELOW:
                holds, better = ours < paper, False
            case Rule.GAIN:
                holds, better = ours >= CLOSE * paper, ours > paper
            case Rule.ERROR:
                holds, better = ours <= paper, ours < paper
            case Rule.AT_MOST:
                holds, better = ours <= paper, False
            case Rule.STRENGTH:
                holds, better = ours * paper > 0 and abs(ours) >= CLOSE * abs(paper), False
            case Rule.WITHIN:
                holds, better = abs(ours / paper - 1) <= 1 - CLOSE, False
            case Rule.EVERY | Rule.NEAR:
                holds, better = ours >= (1.0 if self is Rule.EVERY else CLOSE) * paper, False
        return Standing.BETTER if better else Standing.REPRODUCED if holds else Standing.NOT_REPRODUCED


class Form(StrEnum):
    """How a number is written. Savings and gains are fractions, positive where energy is saved or tokens are gained."""

    LESS = "less"
    MORE = "more"
    FACTOR = "factor"
    SHARE = "share"
    FINE = "fine"
    PLAIN = "plain"
    MHZ = "MHz"
    MILLISECONDS = "ms"

    def text(self, value: float) -> str:
        """The number with its unit."""
        return {
            # z: a difference that rounds to nothing has no sign.
            Form.LESS: f"{-value * 100:+z.1f} %",
            Form.MORE: f"{value * 100:+z.1f} %",
            Form.FACTOR: f"{1 + value:.2f}x",
            Form.SHARE: f"{value * 100:.1f} %",
            Form.FINE: f"{value * 100:.2f} %",
            Form.PLAIN: f"{value:.3g}",
            Form.MHZ: f"{value:.0f} MHz",
            Form.MILLISECONDS: f"{value * 1e3:.2f} ms",
        }[self]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One figure of a claim. `name` distinguishes several figures; `words` replace a figure without a number.

    Factors (1.78x) are stored as gains (0.78), so that 85 % is of the gain and not of the factor.
    """

    paper: float
    rule: Rule
    form: Form
    name: str = ""
    words: str | None = None

    def text(self, value: float) -> str:
        """The value with the figure's form and name."""
        return f"{self.form.text(value)} {self.name}".strip()

    def shortfall(self, ours: float) -> str:
        """Our figure and the criterion it fails; empty where the figure holds."""
        if self.rule.judge(self.paper, ours) is not Standing.NOT_REPRODUCED:
            return ""
        match self.rule:
            case Rule.GAIN | Rule.STRENGTH | Rule.NEAR:
                wanted = f"at least {self.form.text(CLOSE * self.paper)} (85 % of {self.form.text(self.paper)})"
            case Rule.WITHIN:
                low, high = (self.form.text(share * self.paper) for share in (CLOSE, 2 - CLOSE))
                wanted = f"{low} to {high} (15 % around {self.form.text(self.paper)})"
            case Rule.ERROR | Rule.AT_MOST:
                wanted = f"at most {self.form.text(self.paper)}"
            case _:
                wanted = f"{self.form.text(self.paper)} ({self.rule.value})"
        return f"{self.text(ours)} where {wanted} is required"

    @property
    def paper_text(self) -> str:
        """The paper's figure."""
        bound = {Rule.ABOVE: "> ", Rule.BELOW: "< "}.get(self.rule, "")
        return self.words if self.words is not None else bound + self.text(self.paper)


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One claim of the paper, or one of this project's own."""

    id: str
    text: str
    figures: tuple[Figure, ...]

    @property
    def paper_text(self) -> str:
        """The paper's figures, as it gives them."""
        return ", ".join(figure.paper_text for figure in self.figures if figure.paper_text)

    @property
    def criterion(self) -> str:
        """What has to hold, figure by figure."""
        parts = [f"{figure.name}: {figure.rule.value}".removeprefix(": ") for figure in self.figures]
        return "; ".join(dict.fromkeys(parts))

    def judge(self, ours: Sequence[float]) -> Standing:
        """The worst standing of the figures: better only where all are. Raises ValueError for too few or too many."""
        if len(ours) != len(self.figures):
            raise ValueError(f"claim {self.id}: {len(self.figures)} figures, and {len(ours)} were measured")
        each = {figure.rule.judge(figure.paper, value) for figure, value in zip(self.figures, ours, strict=True)}
        for standing in (Standing.NOT_REPRODUCED, Standing.REPRODUCED, Standing.BETTER):
            if standing in each:
                return standing
        return Standing.OURS


# ---- outcomes ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A claim, our figures, and the verdict.

    `basis`: what was run, as a command where there is one. `violations`: SLO violations, which undo a saving whatever
    its size. `reason`: shown if the claim fails; `detail`: always shown. `words`
    replace our figures.
    """

    claim: Claim
    ours: tuple[float, ...]
    basis: tuple[str, ...]
    detail: str = ""
    reason: str = ""
    violations: str = ""
    words: str | None = None

    @property
    def standing(self) -> Standing:
        """The verdict. A saving with SLO violations is not reproduced."""
        found = self.claim.judge(self.ours)
        return Standing.NOT_REPRODUCED if self.violations else found

    @property
    def ours_text(self) -> str:
        """Our figures, in the paper's order."""
        return self.words if self.words is not None else ", ".join(f.text(value) for f, value in self._pairs())

    @property
    def why(self) -> str:
        """The reason for the verdict: what fails, how close "close" is; then the detail."""
        parts: list[str] = []
        match self.standing:
            case Standing.NOT_REPRODUCED:
                short = "; ".join(filter(None, (f.shortfall(v) for f, v in self._pairs())))
                parts += [f"{short}.", self.reason] if short else []
                parts.append(self.violations)
            case Standing.REPRODUCED:
                parts.append(self._close())
        return " ".join(part for part in (*parts, self.detail) if part)

    def _close(self) -> str:
        """How far a gain is below the paper's where that counts as reproduced."""
        short = [
            f"{(1 - value / figure.paper) * 100:.0f} % below the paper's {figure.text(figure.paper)}"
            for figure, value in self._pairs()
            if figure.rule is Rule.GAIN and value < figure.paper
        ]
        return f"Close: {'; '.join(short)}." if short else ""

    def _pairs(self) -> Iterator[tuple[Figure, float]]:
        return zip(self.claim.figures, self.ours, strict=True)

    def to_json(self) -> dict[str, object]:
        """Plain values: numbers as they are judged (gains as fractions) beside the texts shown."""
        return {
            "id": self.claim.id,
            "claim": self.claim.text,
            "paper": self.claim.paper_text,
            "paper_values": [figure.paper for figure in self.claim.figures],
            "ours": self.ours_text,
            "ours_values": list(self.ours),
            "criterion": self.claim.criterion,
            "verdict": self.standing.value,
            "reason": self.why,
            "basis": list(self.basis),
        }


# ---- the list --------------------------------------------------------------------------------------------------


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
            Figure(paper=1050, rule=Rule.WITHIN, form=Form.MHZ),
            _gain(0.374, Form.MORE, "tokens/J"),
            Figure(paper=0.0625, rule=Rule.AT_MOST, form=Form.LESS, name="throughput"),
        ),
    ),
    _one("too-low", "energy per token rises again below", 840, Rule.WITHIN, Form.MHZ),
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
    _one("baseline-tpj", "Triton fixed at TP 4: tokens per joule", 0.69, Rule.WITHIN, Form.PLAIN),
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
        id="ours-both-online",
        text="throttling and autoscaling, lengths as the gateway predicts them",
        figures=(_shown(Form.LESS), _shown(Form.FACTOR, "tokens/J")),
    ),
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
"""This project's own."""
