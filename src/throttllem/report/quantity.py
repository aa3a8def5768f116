"""How quantities are written for people: in the terminal's table, on the page and in its plots."""

from __future__ import annotations

from throttllem.sim.result import SloOutcome

ABSENT = "–"
"""What was not measured, or does not apply."""


def kilojoules(energy_j: float) -> str:
    """Energy in kJ, without its unit: one decimal below 1,000 kJ, thousands grouped above."""
    return f"{energy_j / 1e3:,.1f}" if energy_j < 1e6 else f"{energy_j / 1e3:,.0f}"


def seconds(value_s: float | None) -> str:
    """Seconds, without the unit."""
    if value_s is None:
        return ABSENT
    return f"{value_s:.2f}" if value_s < 10 else f"{value_s:,.1f}"


def milliseconds(value_s: float | None) -> str:
    """Milliseconds, without the unit."""
    if value_s is None:
        return ABSENT
    return f"{value_s * 1e3:.1f}" if value_s < 0.1 else f"{value_s * 1e3:,.0f}"


def percent(fraction: float | None, *, decimals: int = 1) -> str:
    """A fraction in per cent, without the sign for per cent."""
    return ABSENT if fraction is None else f"{fraction * 100:.{decimals}f}"


def change(fraction_saved: float | None) -> str:
    """A saving as a signed change in per cent: 0.312 saved is -31.2."""
    if fraction_saved is None:
        return ABSENT
    text = f"{-fraction_saved * 100:+.1f}"
    return "0.0" if text in {"+0.0", "-0.0"} else text.replace("-", "−")


def promises(slo: SloOutcome) -> str:
    """The promises in force, in words."""
    parts = [
        f"E2E {seconds(slo.e2e_s)} s" if slo.e2e_s is not None else "",
        f"mean TBT of a request {milliseconds(slo.tbt_s)} ms" if slo.tbt_s is not None else "",
        f"TTFT {seconds(slo.ttft_s)} s" if slo.ttft_s is not None else "",
    ]
    return ", ".join(part for part in parts if part) or "none"
