"""Which kind of GPU a board is: from what its driver reports to an entry of the catalogue, or to one made from facts.

Pure. Knows nothing of NVML; `gpu/nvml.py` reads a `Board`.
"""

# The theory
#
# A board is of a listed kind if its name is one of the entry's `nvml_names` and no fact contradicts the entry: memory,
# maximum clock, compute capability. A power limit is a setting of a site as well, so it is no contradiction. A fact
# that the driver does not report contradicts nothing.
#
# Every other board is unlisted: it gets an entry of its own, like the nearest one of the catalogue, with the facts
# that the driver reports; one that cannot be (a limit of 1 W) counts as not reported.
#
# Nearest is by compute capability, among the same class of chip: the chips of servers with HBM (x.0 and 10.3) and those
# with GDDR differ more from each other than two generations of one class. Of several it is the nearest by memory, clock
# and power limit.
#
# A slice (MIG) is like its whole GPU. Drivers report the whole one's multiprocessors, bus and limit beside the slice's
# memory: it has its share of them. A board with unified memory reports next to nothing, and no card of the catalogue is
# near: what is missing is the data sheet's of the largest board of that chip.

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from throttllem.did_you_mean import did_you_mean
from throttllem.physics.catalogue import Catalogue, Gpu
from throttllem.physics.inheritance import inherited
from throttllem.physics.laws import implausible

_MEMORY_APART = 0.10
"""Relative: ECC, reserved memory and the age of the driver change what is reported by up to 8 %."""
_HBM = ("6.0", "7.0", "8.0", "9.0", "10.0", "10.3")
"""Compute capabilities of chips with HBM."""
_FORM = 3.0
"""Weight of the maximum clock: it differs between the forms of one chip (SXM, PCIe, NVL)."""
_MIG = re.compile(r"\s+MIG\s+(?:(\d+)c\.)?(?:(\d+)g\.)?\S+$")
"""With the slices of the cores: those of a compute instance, and of its GPU instance."""
_SLICES = 7
"""Of a whole GPU; 4 of those of `_FOUR`."""
_FOUR = re.compile(r"\b(A30|RTX PRO)\b")
_FACTS = ("memory_bytes", "bandwidth_bytes_per_s", "multiprocessors", "limit_w")
_FEWEST_CLOCKS = 3
"""Fewer do not say what lies between them."""
_MAKER = re.compile(r"^(nvidia\s+|tesla\s+)+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Board:
    """What a driver reports of one GPU; None or empty: it does not report that. `clocks_mhz`: those that can be set,
    ascending.
    """

    name: str
    memory_bytes: float | None = None
    clocks_mhz: tuple[int, ...] = ()
    limit_w: float | None = None
    compute_capability: str | None = None
    bandwidth_bytes_per_s: float | None = None
    multiprocessors: int | None = None

    def __post_init__(self) -> None:
        for name in _FACTS:
            if (value := getattr(self, name)) is not None and implausible(name, value):
                object.__setattr__(self, name, None)
        clocks = tuple(clock for clock in self.clocks_mhz if clock > 0 and not implausible("clock_mhz", clock))
        object.__setattr__(self, "clocks_mhz", clocks)

    @property
    def text(self) -> str:
        """ "NVIDIA L40S (48.3 GB, up to 2520 MHz, 350 W, compute capability 8.9)"."""
        facts = [
            self.memory_bytes and f"{self.memory_bytes / 1e9:.1f} GB",
            self.clocks_mhz and f"up to {self.clocks_mhz[-1]} MHz",
            self.limit_w and f"{self.limit_w:.0f} W",
            self.compute_capability and f"compute capability {self.compute_capability}",
        ]
        return f"{self.name} ({', '.join(fact for fact in facts if fact) or 'the driver reports no more'})"


class _Unified(NamedTuple):
    """The largest board of a chip whose memory is its host's, by its data sheet."""

    name: str
    memory_bytes: float
    bandwidth_bytes_per_s: float
    multiprocessors: int
    limit_w: float


_THOR = _Unified("a Jetson AGX Thor", 128e9, 273e9, 20, 130.0)
_UNIFIED = {
    "8.7": _Unified("a Jetson AGX Orin of 64 GB", 64e9, 204.8e9, 16, 60.0),
    "10.1": _THOR,
    "11.0": _THOR,
    "12.1": _Unified("a DGX Spark", 128e9, 273e9, 48, 140.0),
}
"""By compute capability."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recognised:
    """`gpu`: the kind of a board. `listed`: it is in the catalogue; else it was made for the board, `why` says how."""

    board: Board
    gpu: Gpu
    listed: bool
    why: str = ""

    @property
    def note(self) -> str | None:
        """What every place that shows figures of an unlisted kind says; None: it is listed."""
        return None if self.listed else f"{self.board.text} {self.why}; add it with --catalogue, then calibrate"

    def entry(self) -> str:
        """An unlisted kind as the entry to paste into a catalogue file."""
        gpu, board = self.gpu, self.board
        fp8, guess = gpu.peak_fp8_flop_per_s, self._guess
        lines = [
            f"[gpu.{gpu.name}]",
            f'like = "{gpu.like}"',
            f"nvml_names = [{_quoted(board.name)}]",
            *([f'compute_capability = "{gpu.compute_capability}"'] if gpu.compute_capability else []),
            f"clock_min_mhz = {gpu.clock_min_mhz}",
            f"clock_max_mhz = {gpu.clock_max_mhz}",
            f"clock_step_mhz = {gpu.clock_step_mhz}",
            f"memory_bytes = {gpu.memory_bytes:.4g}{guess('memory_bytes')}",
            f"bandwidth_bytes_per_s = {gpu.bandwidth_bytes_per_s:.4g}"
            + (guess("bandwidth_bytes_per_s") or "  # read from the driver"),
            f"peak_flop_per_s = {gpu.peak_flop_per_s:.4g}  # GUESSED from {gpu.like}: data sheet, dense bfloat16",
            *([f"peak_fp8_flop_per_s = {fp8:.4g}  # GUESSED from {gpu.like}: data sheet, dense"] if fp8 else []),
            *([f"multiprocessors = {gpu.multiprocessors}{guess('multiprocessors')}"] if gpu.multiprocessors else []),
            f"limit_w = {gpu.power.limit_w:.4g}{guess('power.limit_w')}",
        ]
        return "\n".join(lines) + "\n"

    def _guess(self, constant: str) -> str:
        """The comment of a fact that the driver did not report."""
        origin = self.gpu.origin_of(constant)
        return "" if origin == "datasheet" else f"  # UNKNOWN to the driver, {origin}: see the data sheet"


def recognise(board: Board, catalogue: Catalogue) -> Recognised:
    """The kind of a board, listed or made for it. Of two entries that it fits, the later one is taken: the user's."""
    called = [gpu for gpu in catalogue.gpus.values() if _called(board, gpu)]
    fits = [gpu for gpu in called if not differences(board, gpu)]
    if fits:
        return Recognised(board=board, gpu=fits[-1], listed=True)
    whole = replace(board, name=_MIG.sub("", board.name))
    parents = [gpu for gpu in catalogue.gpus.values() if _MIG.search(board.name) and _called(whole, gpu)]
    like = parents[-1] if parents else _nearest(_filled(board), catalogue.gpus.values())
    gpu = _made(board, like)
    why = f"is no GPU of the catalogue: modelled after {like.name}"
    if _MIG.search(board.name):
        why = f"is a slice (MIG) of a GPU: no kind of the catalogue; modelled after {like.name}"
    elif called:
        why = f"has the name of {called[-1].name}, but {differences(board, called[-1])}: modelled after {like.name}"
    elif board.compute_capability != like.compute_capability:
        why += f", the nearest architecture ({like.compute_capability})"
    why += _unreported(board, like)
    return Recognised(board=board, gpu=gpu, listed=False, why=why)


def contradiction(board: Board, gpu: Gpu, catalogue: Catalogue) -> str | None:
    """Why a board cannot be of the kind that a user named; None: nothing contradicts it."""
    found = recognise(board, catalogue)
    if found.listed and found.gpu.name == gpu.name:
        return None
    why = differences(board, gpu)
    if why is None and (not found.listed or _called(board, gpu)):
        return None
    kind = f"it is {found.gpu.name}" if found.listed else f"it is no GPU of the catalogue, like {found.gpu.like}"
    return f"{board.text} is not {gpu.name}: {why or kind}; {way_out(found, catalogue)}"


def way_out(found: Recognised, catalogue: Catalogue) -> str:
    """What to do about a board that is not of the kind that was named."""
    if found.listed:
        return f"leave --gpu out, or name {found.gpu.name}"
    near = did_you_mean(found.gpu.name, sorted(catalogue.gpus), most=3)
    return (
        f"leave --gpu out, and it is modelled after {found.gpu.like}; or add it ({near} Known: "
        f"{', '.join(sorted(catalogue.gpus))}): `throttllem doctor` prints its entry for --catalogue"
    )


def differences(board: Board, gpu: Gpu) -> str | None:
    """What of a board contradicts an entry: memory, maximum clock, compute capability; None: nothing."""
    found = []
    if board.memory_bytes is not None and abs(math.log(board.memory_bytes / gpu.memory_bytes)) > _MEMORY_APART:
        found.append(f"{board.memory_bytes / 1e9:.1f} GB, not {gpu.memory_bytes / 1e9:.1f}")
    if board.clocks_mhz and board.clocks_mhz[-1] != gpu.clock_max_mhz:
        found.append(f"up to {board.clocks_mhz[-1]} MHz, not {gpu.clock_max_mhz}")
    ours, theirs = board.compute_capability, gpu.compute_capability
    if ours is not None and theirs is not None and ours != theirs:
        found.append(f"compute capability {ours}, not {theirs}")
    return " and ".join(found) or None


def _called(board: Board, gpu: Gpu) -> bool:
    """Whether a board has one of the names of an entry."""
    return _bare(board.name) in {_bare(name) for name in gpu.nvml_names}


def _bare(name: str) -> str:
    """Without the maker, which drivers before R450 leave out; "Tesla" came and went as well."""
    return _MAKER.sub("", " ".join(name.lower().split()))


def _nearest(board: Board, gpus: Iterable[Gpu]) -> Gpu:
    """The entry to model an unlisted board after."""
    return min(gpus, key=lambda gpu: _distance(board, gpu))


def _distance(board: Board, gpu: Gpu) -> tuple[bool, float, float]:
    """Class of chip, then generation, then how far apart the facts are."""
    ours, theirs = board.compute_capability, gpu.compute_capability
    other_class, generations = False, 0.0
    if ours is not None:
        other_class = theirs is None or (ours in _HBM) != (theirs in _HBM)
        generations = math.inf if theirs is None else abs(float(ours) - float(theirs))
    facts = (
        (1.0, board.memory_bytes, gpu.memory_bytes),
        (_FORM, board.clocks_mhz[-1] if board.clocks_mhz else None, gpu.clock_max_mhz),
        (1.0, board.limit_w, gpu.power.limit_w),
        (1.0, board.bandwidth_bytes_per_s, gpu.bandwidth_bytes_per_s),
    )
    apart = sum(weight * abs(math.log(ours / theirs)) for weight, ours, theirs in facts if ours)
    return other_class, generations, apart


def _quoted(text: str) -> str:
    """As a text of TOML, which is JSON's but for one character."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _unreported(board: Board, like: Gpu) -> str:
    """What is not known of an unlisted board, and in whose place it stands."""
    names = {"memory_bytes": "memory", "limit_w": "power limit", "bandwidth_bytes_per_s": "bandwidth"}
    missing = [word for name, word in names.items() if getattr(board, name) is None]
    lender = _UNIFIED[board.compute_capability].name if board.compute_capability in _UNIFIED else like.name
    said = f"; not reported, so taken from {lender}: {', '.join(missing)}" if missing else ""
    if len(board.clocks_mhz) < _FEWEST_CLOCKS:
        said += f"; {len(board.clocks_mhz) or 'none'} of its clocks reported"
    if board.compute_capability in _UNIFIED:
        said += f"; its memory is its host's (unified) and {like.name} is a card: seconds and watts are a rough guess"
    return said


def _filled(board: Board) -> Board:
    """With the data sheet's facts where a board with unified memory does not report its own."""
    if (largest := _UNIFIED.get(board.compute_capability or "")) is None:
        return board
    return replace(board, **{name: getattr(board, name) or getattr(largest, name) for name in _FACTS})


def _share(board: Board, like: Gpu) -> Board:
    """A slice with its share of the whole GPU, which is `like` or near it."""
    if (found := _MIG.search(board.name)) is None:
        return board
    cores = int(found[1] or found[2] or 1) / (4 if _FOUR.search(board.name) else _SLICES)
    memory = min(1.0, board.memory_bytes / like.memory_bytes) if board.memory_bytes else min(1.0, cores)
    multiprocessors = board.multiprocessors or like.multiprocessors
    return replace(
        board,
        memory_bytes=board.memory_bytes or like.memory_bytes * memory,
        bandwidth_bytes_per_s=(board.bandwidth_bytes_per_s or like.bandwidth_bytes_per_s) * memory,
        multiprocessors=multiprocessors and max(1, round(multiprocessors * min(1.0, cores))),
        limit_w=(board.limit_w or like.power.limit_w) * min(1.0, cores),
    )


def _clocks(board: Board, like: Gpu) -> Sequence[int]:
    """Those of the board; of a single one, that and the lowest of `like`."""
    if len(board.clocks_mhz) == 1:
        return min(like.clock_min_mhz, board.clocks_mhz[0] // 2), board.clocks_mhz[0]
    return board.clocks_mhz or like.clocks_mhz


def _made(board: Board, like: Gpu) -> Gpu:
    """An entry for an unlisted board: the facts that the driver reports, the rest scaled from `like`."""
    reported, board = board, _share(_filled(board), like)
    clocks = _clocks(board, like)
    entry: dict[str, Any] = {
        "nvml_names": (board.name,),
        "compute_capability": board.compute_capability,
        "clock_min_mhz": clocks[0],
        "clock_max_mhz": clocks[-1],
        "clock_step_mhz": _step(clocks),
        "memory_bytes": board.memory_bytes or like.memory_bytes,
        "bandwidth_bytes_per_s": board.bandwidth_bytes_per_s or like.bandwidth_bytes_per_s,
        "multiprocessors": board.multiprocessors or like.multiprocessors,
        "limit_w": board.limit_w or like.power.limit_w,
    }
    cores = 1.0
    if like.multiprocessors and board.multiprocessors:
        cores = board.multiprocessors / like.multiprocessors
    speed = cores * clocks[-1] / like.clock_max_mhz
    entry["peak_flop_per_s"] = like.peak_flop_per_s * speed
    name = re.sub(r"[^a-z0-9]+", "-", _bare(board.name)).strip("-") or "unknown"
    unknown = [fact for fact in _FACTS if getattr(reported, fact) is None or getattr(reported, fact) != entry[fact]]
    guessed = tuple("power.limit_w" if fact == "limit_w" else fact for fact in unknown)
    largest, scaled = _UNIFIED.get(board.compute_capability or ""), f"modelled (scaled from {like.name})"
    entry["origin"] = {f"modelled (as {largest.name})" if largest else scaled: guessed}
    entry["origin"][scaled] = (*entry["origin"].get(scaled, ()), "peak_flop_per_s")
    return Gpu.model_validate({"name": f"{name}-{entry['memory_bytes'] / 1e9:.0f}gb", **inherited(like, entry)})


def _step(clocks: Sequence[int]) -> int:
    """The smallest step that leads from the lowest to the highest clock over clocks that can be set.

    Some GPUs alternate between two steps (7 and 8 MHz): every second clock is on a grid.
    """
    there, low, high = set(clocks), clocks[0], clocks[-1]
    steps = sorted({clock - low for clock in clocks[1:]})
    return next((step for step in steps if there.issuperset(range(low, high + 1, step)) and not (high - low) % step), 1)
