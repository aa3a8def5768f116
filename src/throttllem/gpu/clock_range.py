"""A range of SM clocks, as NVML locks them. Knows nothing of GPUs."""

from __future__ import annotations

from typing import NamedTuple, Self


class _Range(NamedTuple):
    low_mhz: int
    high_mhz: int


class ClockRange(_Range):
    """Lowest and highest MHz, both included. In JSON it is a list of the two."""

    __slots__ = ()

    def __new__(cls, low_mhz: int, high_mhz: int) -> Self:
        """Raises ValueError unless 0 < low_mhz <= high_mhz."""
        if not 0 < low_mhz <= high_mhz:
            raise ValueError(f"clocks {low_mhz} to {high_mhz} MHz: must be two positive numbers, the lower one first")
        return super().__new__(cls, low_mhz, high_mhz)

    @classmethod
    def parse(cls, text: str) -> Self:
        """ "600-1410" of the command line. Raises ValueError."""
        low_mhz, _, high_mhz = text.partition("-")
        return cls(int(low_mhz), int(high_mhz))

    def __str__(self) -> str:
        return f"{self.low_mhz} to {self.high_mhz} MHz"
