"""A GPU that is like another one: its data sheet in that one's laws. The only place that scales inherited constants.

Knows nothing of files and of measurements.
"""

# What a data sheet says of a law's constants (docs/physics.md, "Inherited constants"):
#
# - fractions of the peak bandwidth and of the peak FLOP/s stay: the peaks themselves are facts of the data sheet;
# - the FP8 peak goes with the peak, unless it is given; none on a chip before Ada;
# - fixed times (kernels, all-reduce, host) and shares of them that follow the clock stay;
# - watts go with the power limit, except those that are given;
# - the voltage's knee, and the clocks above which compute-bound work is no faster and watts rise no further, go with
#   the top clock;
# - below the memory's knee the multiprocessors cannot issue requests fast enough for the bandwidth: it goes with the
#   bandwidth per multiprocessor, or with the top clock where their number is not known, and is at most the top clock.

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from throttllem.physics.catalogue import Gpu

FACTS = (
    "clock_min_mhz",
    "clock_max_mhz",
    "clock_step_mhz",
    "memory_bytes",
    "bandwidth_bytes_per_s",
    "peak_flop_per_s",
    "peak_fp8_flop_per_s",
    "multiprocessors",
)
"""Of a data sheet; fields of a GPU."""
POWER_FACTS = ("limit_w", "idle_w", "bare_idle_w")
"""Of a data sheet, or of an idle GPU; fields of the power law."""
_WITH_LIMIT = ("idle_w", "bare_idle_w", "static_w", "memory_w", "core_w", "compute_w", "attention_w", "unpack_w")
_LAWS = ("time", "power")
_OWN = ("name", "like", "nvml_names", "compute_capability", "peak_fp8_flop_per_s", "multiprocessors", "origin")
"""Never those of another GPU, as they stand."""
_FP8_SINCE = 8.9
"""Compute capability."""


def inherited(like: Gpu, entry: Mapping[str, Any]) -> dict[str, Any]:
    """The tree of a GPU: the keys of `entry` over those of `like`, whose laws are scaled by the facts in `entry`.

    `entry` may have POWER_FACTS beside its other keys, and parts of the tables `time` and `power`. Where it has no
    basis of a law, that law is modelled.
    """
    given = {path for key, value in entry.items() for path in _paths(key, value)}
    own = {key: value for key, value in entry.items() if key not in (*_LAWS, *POWER_FACTS)}
    laws = {law: dict(entry.get(law) or {}) for law in _LAWS}
    laws["power"] = {key: entry[key] for key in POWER_FACTS if key in entry} | laws["power"]
    tree = like.model_dump(exclude=set(_OWN)) | own
    lent = ["memory_fraction", "activation_bytes", "startup_s", "startup_w"]
    if "peak_fp8_flop_per_s" not in own and (fp8 := _fp8(like, tree)) is not None:
        tree["peak_fp8_flop_per_s"] = fp8
        lent.append("peak_fp8_flop_per_s")
    time, power = _scaled(like, tree, laws["power"].get("limit_w"))
    tree |= {"like": like.name, "time": time | laws["time"], "power": power | laws["power"]}
    for law in _LAWS:
        if f"{law}_basis" not in entry:
            tree[f"{law}_basis"] = _modelled(like, law, tree)
    lent += [f"{law}.{name}" for law in _LAWS for name in tree[law]]
    said = {path for paths in tree.get("origin", {}).values() for path in paths}
    origin = f"modelled (inherited from {like.name})"
    tree["origin"] = tree.get("origin", {}) | {origin: tuple(p for p in lent if p not in given | said)}
    return tree


def _paths(key: str, value: object) -> list[str]:
    """The constants that a key of an entry sets."""
    if isinstance(value, Mapping):
        return [f"{key}.{name}" for name in value]
    return [f"power.{key}" if key in POWER_FACTS else key]


def _fp8(like: Gpu, tree: Mapping[str, Any]) -> float | None:
    """Products a second of 8-bit floats, by those of `like`; None: there are none."""
    capability = re.fullmatch(r"[0-9]+\.[0-9]", str(tree.get("compute_capability")))
    if like.peak_fp8_flop_per_s is None or (capability and float(capability[0]) < _FP8_SINCE):
        return None
    faster: float = tree["peak_flop_per_s"] / like.peak_flop_per_s
    return like.peak_fp8_flop_per_s * faster


def _scaled(like: Gpu, tree: Mapping[str, Any], limit_w: float | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The laws of `like`, by the facts in `tree`."""
    time, power = like.time.model_dump(), like.power.model_dump()
    power_ratio = 1.0 if limit_w is None else limit_w / power["limit_w"]
    clock_ratio = tree["clock_max_mhz"] / like.clock_max_mhz
    memory_ratio = clock_ratio
    if like.multiprocessors and (multiprocessors := tree.get("multiprocessors")):
        bandwidth_ratio = tree["bandwidth_bytes_per_s"] / like.bandwidth_bytes_per_s
        memory_ratio = bandwidth_ratio * like.multiprocessors / multiprocessors
    power |= {name: power[name] * power_ratio for name in _WITH_LIMIT} | {"knee_mhz": power["knee_mhz"] * clock_ratio}
    time["memory_knee_mhz"] = min(time["memory_knee_mhz"] * memory_ratio, tree["clock_max_mhz"])
    if power["ceiling_mhz"] is not None:
        power["ceiling_mhz"] *= clock_ratio
    if time["compute_knee_mhz"] is not None:
        time["compute_knee_mhz"] *= clock_ratio
    return time, power


def _modelled(like: Gpu, law: str, tree: Mapping[str, Any]) -> dict[str, Any]:
    """The basis of an inherited law."""
    there = like.time_basis if law == "time" else like.power_basis
    of = f", for {' and '.join(there.models)} alone" if there.models else ""
    return {
        "kind": "modelled",
        "source": f"inherited from {like.name} and scaled by the data sheet ({there.kind} there{of}: {there.source})",
        "clock_min_mhz": tree["clock_min_mhz"],
        "clock_max_mhz": tree["clock_max_mhz"],
        "tp": there.tp,
        "batch_max": there.batch_max,
        "context_max_tokens": there.context_max_tokens,
    }
