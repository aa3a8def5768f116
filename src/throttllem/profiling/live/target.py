"""The engine and the GPUs that a live profile is taken of, from what the command line says. Reaches nothing yet."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from throttllem.engines.base import Kind, RemoteOptions
from throttllem.engines.http import check_address
from throttllem.engines.openai import OpenaiEngine
from throttllem.engines.remote import KINDS, remote_engine
from throttllem.engines.simulated.fleet import Fleet
from throttllem.engines.triton.engine import TritonEngine
from throttllem.gpu.device import Work
from throttllem.gpu.hardware import HardwareGpu, Mode
from throttllem.gpu.keeper_client import SOCKET
from throttllem.gpu.setters import clock_setter
from throttllem.gpu.simulated import SimulatedGpu
from throttllem.profiling.live.run_profile import Device

OVERRIDES = ("max_batch", "max_context_tokens", "kv_blocks", "block_tokens")
SCRAPE_S = 0.2
"""A live profile looks at `/metrics` more often than a gateway does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One engine of the one size in `fleet`."""

    fleet: Fleet
    remote: RemoteOptions

    def __post_init__(self) -> None:
        check_address("--url", self.remote.url)
        if len(self.fleet.sizes) != 1:
            raise ValueError("--url: one engine has one size; give --tp")

    def engine(self) -> OpenaiEngine | TritonEngine:
        """The engine, not reached yet."""
        return remote_engine(self.remote, next(iter(self.fleet.specs.values())))

    def device(self, clocks_mhz: tuple[int, ...], gpus: tuple[str, ...] | None = None, keeper: Path = SOCKET) -> Device:
        """The GPUs that are named, their clocks set through the keeper, watts counted; without, the simulated ones of
        the catalogue, whose watts are modelled.
        """
        if gpus is not None:
            setter = clock_setter(keeper=keeper)
            real = HardwareGpu(gpus, mode=Mode.ON, setter=setter, clocks_mhz=clocks_mhz)
            return Device(gpu=real, clocks_mhz=clocks_mhz)
        ((tp, spec),) = self.fleet.specs.items()
        physics = self.fleet.physics[tp]

        def watts(mhz: int, work: Work) -> float:
            return physics.iteration(
                mhz, work.decode_sequences, work.kv_tokens, work.prefill_tokens, work.prefill_pairs
            )[1]

        gpu = SimulatedGpu(spec.clocks_mhz, switch_latency_s=0.0, watts=watts, idle_w=spec.idle_w)
        return Device(gpu=gpu, clocks_mhz=clocks_mhz, modelled=watts)


def parsed_kind(text: str) -> Kind:
    """`--engine-kind`. Raises ValueError."""
    for kind in KINDS:
        if text == kind:
            return kind
    raise ValueError(f"--engine-kind {text}: must be one of {', '.join(KINDS)}")


def parsed_capacities(texts: Iterable[str]) -> dict[str, int]:
    """`--capacity name=value`, any number of them. Raises ValueError."""
    found = {}
    for text in texts:
        name, _, value = text.partition("=")
        if name not in OVERRIDES or not value.isdecimal() or int(value) < 1:
            raise ValueError(f"--capacity {text}: write NAME=N, as in kv_blocks=4096; names are {', '.join(OVERRIDES)}")
        found[name] = int(value)
    return found


def parsed_gpus(text: str | None) -> tuple[str, ...] | None:
    """`--gpus`: UUIDs or numbers."""
    return None if text is None else tuple(part.strip() for part in text.split(",") if part.strip())


def parsed_clocks(text: str | None) -> tuple[int, ...] | None:
    """`--clocks`. Raises ValueError."""
    if text is None:
        return None
    try:
        return tuple(int(clock) for clock in text.split(","))
    except ValueError:
        raise ValueError(f"--clocks {text}: must be MHz with commas between, as in 1410,1050") from None
