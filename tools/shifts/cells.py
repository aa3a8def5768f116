"""The cells of the study: what changes, when, by how much and on which engine, drawn by number.

Knows nothing of how a cell is run.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from throttllem.core.types import Request
from throttllem.sim.shifts import Pace, Shift, faster, held_down, longer, other_client

CELLS = 200
SEED = 7000
"""Apart from those that the margins were tuned with."""
KINDS = ("load step", "length drift", "slower engine", "another client", "GPUs held down")
ENGINES = (
    ("a100-40gb-sxm", "llama-2-13b", 2),
    ("a100-40gb-sxm", "llama-3-8b", 1),
    ("h100-80gb-sxm", "llama-3-70b", 4),
)
"""GPU, model and tensor parallel degree."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShiftCell:
    """One cell. `load`: the busiest minute before the shift, as a share of the engine's maximum. `size` is a factor on
    the rate, on output lengths or on seconds; the other client's sequences; the limit as a share of the maximum clock.
    It lasts to the end, but for another client and GPUs that are held down, which end at `until_s`.
    """

    number: int
    kind: str
    engine: tuple[str, str, int]
    load: float
    at_s: float
    until_s: float
    size: float

    def requests(self, plain: Iterable[Request]) -> Iterable[Request]:
        """The requests with what the shift does to them."""
        match self.kind:
            case "load step":
                return faster(plain, self.at_s, self.size)
            case "length drift":
                return longer(plain, self.at_s, self.size)
        return plain

    def shifts(self, clocks_mhz: tuple[int, ...]) -> tuple[Shift, ...]:
        """What the shift does to the engine."""
        match self.kind:
            case "slower engine":
                return (Pace(at_s=self.at_s, factor=self.size),)
            case "another client":
                return other_client(self.at_s, self.until_s, round(self.size), 1000)
            case "GPUs held down":
                limit = max(mhz for mhz in clocks_mhz if mhz <= self.size * clocks_mhz[-1])
                return held_down(self.at_s, self.until_s, limit)
        return ()


def cell(number: int, seed: int) -> ShiftCell:
    """The cell of a number: kinds and engines in turns, the rest drawn."""
    rng = np.random.default_rng((seed, number))
    kind = KINDS[number % len(KINDS)]
    load, at_s, lasts_s = rng.uniform(0.3, 0.7), rng.uniform(150.0, 300.0), rng.uniform(60.0, 240.0)
    low, high = {
        "load step": (0.7, min(2.0, 0.95 / load)),
        "length drift": (0.7, 1.4),
        "slower engine": (1.1, 1.3),
        "another client": (4.0, 24.0),
        "GPUs held down": (0.6, 0.9),
    }[kind]
    return ShiftCell(
        number=number,
        kind=kind,
        engine=ENGINES[number // len(KINDS) % len(ENGINES)],
        load=load,
        at_s=at_s,
        until_s=at_s + lasts_s,
        size=rng.uniform(low, high),
    )
