"""Tabulates the trees of a performance model: the table of one engine size, equal to the trees at every point.

Knows nothing of how trees are trained, nor of files.
"""

# A forest of constant leaves is a step function: on the grid of all its thresholds it is constant within each cell, so
# a table with one value per cell is exact. Every leaf is a box of cells. Adding its value to all its cells would touch
# the grid once per leaf; instead it is added, with alternating sign, to the corners of its box in a difference array
# (at most 16 in four dimensions), and one cumulative sum along each axis turns that array into the table.

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import lightgbm
import numpy as np
import numpy.typing as npt

from throttllem.core.forecast.performance_table import Hull, PerformanceTable
from throttllem.core.types import EngineSpec
from throttllem.profiling.train import FEATURES, Trained

TP = FEATURES.index("tp")
AXES = ("prefill_tokens", "batch", "kv_blocks", "clock_mhz")
"""The axes of the table, the slowest first."""
AXIS_FEATURES = tuple(FEATURES.index(name) for name in AXES)

Box = tuple[tuple[float, float], ...]
Edges = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaf:
    """A value and its box: `box[axis]` = (low, high], in the order of AXES, for one tensor parallel degree."""

    box: Box
    value: float


def bake(trained: Trained, spec: EngineSpec) -> PerformanceTable:
    """The table of one engine size, over 0 to `max_batch`, `kv_blocks` and the prefill budget of `spec`.

    Its clocks are those of `spec`, all of which were measured (`profile.spec_of`; a simulated profile has every clock).
    Raises ValueError if the profile is of another GPU, model or block size, or lacks this size.
    """
    hull = _hull(trained, spec)
    seconds = list(leaves(trained.seconds, spec.tp))
    watts = list(leaves(trained.watts, spec.tp))
    spans = (spec.prefill_budget_tokens, spec.max_batch, spec.kv_blocks)
    edges = [_edges((*seconds, *watts), axis, last) for axis, last in enumerate(spans)]
    edges.append(np.array(spec.clocks_mhz, dtype=np.int64))
    bins = [np.searchsorted(edges[axis], np.arange(last + 1)).astype(np.int32) for axis, last in enumerate(spans)]
    return PerformanceTable(
        clocks_mhz=spec.clocks_mhz,
        prefill_bin=bins[0],
        batch_bin=bins[1],
        kv_bin=bins[2],
        seconds=np.square(_positive(_sums(seconds, edges))).astype(np.float32),
        watts=np.exp(_sums(watts, edges)).astype(np.float32),
        hull=hull,
        clocks_measured=spec.tp in trained.clocks_measured,
        switches=trained.switches[spec.tp],
    )


def leaves(booster: lightgbm.Booster, tp: int) -> Iterator[Leaf]:
    """Every leaf of this tensor parallel degree. Raises ValueError for splits that `train` does not make."""
    anywhere = ((-math.inf, math.inf),) * len(AXES)
    for tree in booster.dump_model()["tree_info"]:
        yield from _descend(tree["tree_structure"], anywhere, tp)


def _descend(node: dict[str, Any], box: Box, tp: int) -> Iterator[Leaf]:
    if "leaf_value" in node:
        yield Leaf(box=box, value=node["leaf_value"])
        return
    if node["decision_type"] != "<=" or node["missing_type"] != "None":
        raise ValueError(f"cannot bake a split {node['decision_type']} with missing values as {node['missing_type']}")
    threshold: float = node["threshold"]
    if node["split_feature"] == TP:
        yield from _descend(node["left_child"] if tp <= threshold else node["right_child"], box, tp)
        return
    axis = AXIS_FEATURES.index(node["split_feature"])
    low, high = box[axis]
    if low < threshold:
        left = (*box[:axis], (low, min(high, threshold)), *box[axis + 1 :])
        yield from _descend(node["left_child"], left, tp)
    if threshold < high:
        right = (*box[:axis], (max(low, threshold), high), *box[axis + 1 :])
        yield from _descend(node["right_child"], right, tp)


def _hull(trained: Trained, spec: EngineSpec) -> Hull:
    for name in ("gpu", "model", "block_tokens"):
        of_profile, wanted = getattr(trained, name), getattr(spec, name)
        if of_profile != wanted:
            raise ValueError(f"the profile is of {name} {of_profile!r}, the engine has {wanted!r}")
    hull = trained.hulls.get(spec.tp)
    if hull is None:
        known = ", ".join(str(tp) for tp in trained.hulls)
        raise ValueError(f"no row of the profile is of tp {spec.tp}; profiled: {known}")
    return hull


def _edges(every: tuple[Leaf, ...], axis: int, last: int) -> Edges:
    """The last value of each bin: all thresholds from 0 to `last`, rounded down, and `last`.

    Values are whole numbers, so a threshold rounded down splits them like the threshold itself.
    """
    ends = {leaf.box[axis][1] for leaf in every}
    return np.array(sorted({math.floor(end) for end in ends if 0 <= end < last} | {last}), dtype=np.int64)


def _positive(root: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    if root.min() <= 0.0:
        raise ValueError("the trees predict an iteration of no time; the profile is too small or too uneven to use")
    return root


def _sums(every: list[Leaf], edges: list[Edges]) -> npt.NDArray[np.float64]:
    """The sum of the leaves in each cell, shape (cells, clocks)."""
    values = np.array([leaf.value for leaf in every])
    boxes = np.array([leaf.box for leaf in every])
    # Of each leaf and axis: the first bin, and the one past the last. A leaf beyond the table has none and cancels out.
    ends = [np.searchsorted(edge, np.floor(boxes[:, axis]), side="right") for axis, edge in enumerate(edges)]
    shape = tuple(edge.size + 1 for edge in edges)
    difference = np.zeros(math.prod(shape))
    for corner in itertools.product((0, 1), repeat=len(AXES)):
        place = np.ravel_multi_index(tuple(ends[axis][:, side] for axis, side in enumerate(corner)), shape)
        sign = -1.0 if sum(corner) % 2 else 1.0
        difference += np.bincount(place, weights=sign * values, minlength=difference.size)
    total = difference.reshape(shape)
    for axis in range(len(AXES)):
        np.cumsum(total, axis=axis, out=total)
    inner = total[tuple(slice(edge.size) for edge in edges)]
    return inner.reshape(-1, edges[-1].size)
