"""The paper's claims, as figures with a criterion that was fixed before anything was run, and how ours are judged.

Knows nothing of how a figure is measured. Source of every figure: throttLL'eM (HPCA 2025, arXiv 2408.05235), its
evaluation; the rows `ours-...` are of this project and have no figure to meet.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

CLOSE = 0.85
"""A figure within a relative 15 % of the paper's counts as reproduced: simulated hardware scatters about as much
from one calibration to the next."""


class Standing(StrEnum):
    """What became of a claim."""

    REPRODUCED = "reproduced"
    BETTER = "better"
    NOT_REPRODUCED = "not reproduced"
    CALIBRATED = "calibrated"
    OURS = "ours"


class Rule(StrEnum):
    """When one figure holds, in the words that are shown."""

    ABOVE = "above the figure"
    BELOW = "below the figure"
    GAIN = "at least 85 % of the paper's gain; better above it"
    ERROR = "at most the paper's error; better below it"
    AT_MOST = "at most the figure"
    STRENGTH = "the same sign and at least 85 % as strong"
    EVERY = "in every run"
    NEAR = "at least 85 % of the figure"
    SHOWN = "shown, not judged"

    def judge(self, paper: float, ours: float) -> Standing:
        """The standing of one figure. Figures that are only shown stand as ours."""
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
            # z: a difference that rounds to nothing has no sign of its own.
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
    """One figure of a claim. `name` says which where there are several; `words` stand for it where it has no number.

    Factors (1.78x) are kept as gains (0.78), so that 85 % is of the gain and not of the whole.
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
        """What was asked for, where ours is not it; empty where the figure holds."""
        if self.rule.judge(self.paper, ours) is not Standing.NOT_REPRODUCED:
            return ""
        match self.rule:
            case Rule.GAIN | Rule.STRENGTH | Rule.NEAR:
                wanted = f"at least {self.form.text(CLOSE * self.paper)} (85 % of {self.form.text(self.paper)})"
            case Rule.ERROR | Rule.AT_MOST:
                wanted = f"at most {self.form.text(self.paper)}"
            case _:
                wanted = f"{self.form.text(self.paper)} ({self.rule.value})"
        return f"{self.text(ours)} where {wanted} was asked for"

    @property
    def paper_text(self) -> str:
        """The paper's figure."""
        bound = {Rule.ABOVE: "> ", Rule.BELOW: "< "}.get(self.rule, "")
        return self.words if self.words is not None else bound + self.text(self.paper)


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One claim. `calibrated`: a calibration point of the physics, shown and not counted: meeting it proves nothing."""

    id: str
    text: str
    figures: tuple[Figure, ...]
    calibrated: bool = False

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
        if self.calibrated:
            return Standing.CALIBRATED
        each = {figure.rule.judge(figure.paper, value) for figure, value in zip(self.figures, ours, strict=True)}
        for standing in (Standing.NOT_REPRODUCED, Standing.REPRODUCED, Standing.BETTER):
            if standing in each:
                return standing
        return Standing.OURS


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A claim, what was measured, and what that makes of it.

    `basis`: what was run, a command where there is one, so that it can be run again. `broken`: why the claim cannot
    stand whatever its figures say (promises that were not kept). `reason`: told where it fails, and where a calibration
    point is not met; `detail`: always.
    `words` replace the figures where these say too little.
    """

    claim: Claim
    ours: tuple[float, ...]
    basis: tuple[str, ...]
    detail: str = ""
    reason: str = ""
    broken: str = ""
    words: str | None = None

    @property
    def standing(self) -> Standing:
        """The verdict. A saving that was bought with broken promises is none."""
        found = self.claim.judge(self.ours)
        return Standing.NOT_REPRODUCED if self.broken and not self.claim.calibrated else found

    @property
    def ours_text(self) -> str:
        """Our figures, in the paper's order."""
        return self.words if self.words is not None else ", ".join(f.text(value) for f, value in self._pairs())

    @property
    def why(self) -> str:
        """The reason for the verdict: what fails, how close "close" is, what was calibrated; then what was measured."""
        parts: list[str] = []
        match self.standing:
            case Standing.CALIBRATED:
                parts.append(self.reason or "The physics was calibrated to this figure: shown, not counted.")
            case Standing.NOT_REPRODUCED:
                short = "; ".join(filter(None, (f.shortfall(v) for f, v in self._pairs())))
                parts += [f"{short}.", self.reason] if short else []
                parts.append(self.broken)
            case Standing.REPRODUCED:
                parts.append(self._close())
        return " ".join(part for part in (*parts, self.detail) if part)

    def _close(self) -> str:
        """How far a gain stays behind the paper's where that counts as reproduced."""
        short = [
            f"{(1 - value / figure.paper) * 100:.0f} % of the paper's {figure.text(figure.paper)} is missing"
            for figure, value in self._pairs()
            if figure.rule is Rule.GAIN and value < figure.paper
        ]
        return f"Close: {'; '.join(short)}." if short else ""

    def _pairs(self) -> Iterator[tuple[Figure, float]]:
        return zip(self.claim.figures, self.ours, strict=True)

    def to_json(self) -> dict[str, object]:
        """Plain values: numbers as they are judged (gains as fractions) beside the texts that are shown."""
        return {
            "id": self.claim.id,
            "claim": self.claim.text,
            "paper": self.claim.paper_text,
            "paper_values": [figure.paper for figure in self.claim.figures],
            "ours": self.ours_text,
            "ours_values": list(self.ours),
            "criterion": self.claim.criterion,
            "verdict": self.standing.value,
            "calibrated": self.claim.calibrated,
            "reason": self.why,
            "basis": list(self.basis),
        }
