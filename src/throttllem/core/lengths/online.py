"""Output lengths learned from the requests that have finished: the length predictor of a live engine.

It predicts a median, and a bound that only a fraction `exceed` of outputs exceeds. Knows nothing of clocks and files:
the same calls in the same order give the same predictions.
"""

# Three ideas.
#
# 1. Histograms that forget. Each output of n tokens adds 1 to the bin of n, and all counts fade by 1 - 1/memory at each
#    output, so the shape follows what clients send now. Bins are one token wide at first, then an eighth of their
#    length. An output that was cut at max_tokens would have been longer, by how much is unknown: its weight is spread
#    over the longer bins in proportion to what they hold (the product-limit estimate; Efron, 1967), or, where they hold
#    nothing, goes to the bin `BEYOND` all others.
#
# 2. A tree of groups. Lengths depend on the model, on the caller, and on the shape of the request (prompt and
#    max_tokens). A request belongs to one group of each size: model > caller > coarse shape > fine shape. The smallest
#    group knows best but has seen least; so each borrows the shape of the next larger one, as if it were
#    `prior_answers` outputs of its own, and no group is opened before the one above has that many.
#
# 3. Bounds that correct themselves. The bound is the quantile that leaves out a `level` of the histogram. If outputs
#    were drawn from it independently, level = exceed would do; they are not (drift, bursts of one kind). So the level
#    moves with what happens: down a step when a bound was exceeded, up by exceed/(1 - exceed) of a step when it held,
#    which balances where the fraction exceeded is `exceed` (adaptive conformal inference; Gibbs and Candes, NeurIPS
#    2021). A caller has a level of its own once it has enough outputs, before that its model's level holds.

from __future__ import annotations

import math
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from throttllem.core.lengths.prediction import LengthPredictor, Prediction
from throttllem.core.types import Request, check

VERSION = 1
BEYOND = 8 * 18
"""The last bin: longer than any output that was seen, or than 2^20 tokens."""
_NAME_CHARS = 64
_MOST_ISSUED = 8192
_REACH = 3.0

Counts = NDArray[np.float32]
Key = tuple[str | int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class OnlineLengthOptions:
    """How `OnlineLengthPredictor` learns. `exceed` is the fraction of outputs that may be longer than their bound.

    `memory_answers`: how many outputs of a group count, older ones fade. `prior_answers`: how many outputs of its own
    the borrowed ones count as; before a group has as many, no smaller one is opened below it. `rate`: how far one
    output that exceeds its bound moves the level of the quantile, as a fraction of it. `own_level_answers`: from how
    many outputs on a caller has a level of its own. `start`: a new model's level as a fraction of `exceed`, for the
    outputs that end first are the short ones. `most_groups`: beyond, those unused for longest are dropped.
    """

    exceed: float = 0.1
    memory_answers: float = 500.0
    prior_answers: float = 10.0
    rate: float = 0.1
    own_level_answers: int = 100
    start: float = 0.25
    most_groups: int = 4096

    def __post_init__(self) -> None:
        check("length", exceed=(self.exceed, 0.001, 0.5), memory_answers=(self.memory_answers, 10, 1e6))
        check("length", prior_answers=(self.prior_answers, 1, 1e4), rate=(self.rate, 0, 1), start=(self.start, 0.01, 1))
        check("length", own_level_answers=(self.own_level_answers, 1, 1e9), most_groups=(self.most_groups, 8, 1e6))

    @property
    def least_answers(self) -> int:
        """With fewer, even the longest of them is exceeded too often: 9 for one in ten."""
        return math.ceil(round(1 / self.exceed, 6)) - 1

    @property
    def kept_answers(self) -> float:
        """`memory_answers`, or more where `exceed` is small: a quantile needs some outputs beyond it."""
        return max(self.memory_answers, 5 / self.exceed)


@dataclass(slots=True, kw_only=True)
class Group:
    """What is known of one model, caller or shape: faded counts by length, their sum, and how many outputs ever.

    `level` is the fraction that its bounds leave out now; None: it has none of its own.
    """

    counts: Counts
    weight: float = 0.0
    answers: int = 0
    level: float | None = None


class _Curve(NamedTuple):
    """Counts by bin, and their cumulative sums; lists, in which one look-up costs a tenth of an array's."""

    counts: list[float]
    sums: list[float]


@dataclass(frozen=True, slots=True)
class Issued:
    """A bound that was given out, and the key of the group whose level it rests on."""

    tokens: float
    level_of: Key


@dataclass(frozen=True, slots=True, kw_only=True)
class OnlineMemory:
    """All that an `OnlineLengthPredictor` knows: its groups, the longest unused first, and the bounds given out."""

    options: OnlineLengthOptions
    groups: tuple[tuple[Key, Group], ...]
    issued: tuple[tuple[int, Issued], ...]


class OnlineLengthPredictor(LengthPredictor):
    """Predicts lengths, learns from what came out. Not thread-safe: one owner.

    Without `least_answers` outputs of the request's model it knows nothing: plan with max_tokens.
    """

    def __init__(self, options: OnlineLengthOptions | None = None) -> None:
        self.options = options or OnlineLengthOptions()
        self._least_answers = self.options.least_answers
        self._keep = 1 - 1 / self.options.kept_answers
        self._groups: OrderedDict[Key, Group] = OrderedDict()
        self._issued: dict[int, Issued] = {}
        self._ready: tuple[tuple[Key, ...], _Curve] | None = None

    def predict(self, request: Request) -> Prediction | None:
        """The median of what is known, and the bound that outputs exceed as rarely as `exceed`; None: too little is.

        The bound is remembered: `learn` compares it with the output. The last one for a request counts.
        """
        path = _path(request)
        if self._ready is not None and self._ready[0] == path:
            curve = self._ready[1]
        elif (known := self._known(path)) is not None:
            curve = _curve(known)
        else:
            return None
        level_of = self._level_of(path)
        weight, level = self._groups[level_of].weight, self._level(level_of)
        bound = self._upper(curve, weight, level, request.max_tokens)
        if request.id not in self._issued and len(self._issued) >= _MOST_ISSUED:
            del self._issued[next(iter(self._issued))]
        self._issued[request.id] = Issued(bound, level_of)
        return Prediction(_quantile(curve, 0.5, request.max_tokens), bound)

    def renew(self, request: Request, generated_tokens: int) -> float | None:
        """The bound of an output that is longer than `generated_tokens` already; None: plan with max_tokens.

        Of the outputs as long as that, a fraction `exceed` exceeds it. It is not remembered: `learn` judges `predict`.
        """
        path = _path(request)
        if (known := self._known(path)) is None:
            return None
        level_of = self._level_of(path)
        longer = _longer_than(known, generated_tokens)
        share = float(longer.sum()) / float(known.sum())
        level = min(self.options.exceed, self._level(level_of))
        tokens = self._upper(_curve(longer), share * self._groups[level_of].weight, level, request.max_tokens)
        return max(tokens, generated_tokens + 1.0) if tokens < request.max_tokens else None

    def learn(self, request: Request, output_tokens: int) -> None:
        """An output has ended; one that reached max_tokens would have been longer."""
        if (issued := self._issued.pop(request.id, None)) is not None:
            self._judge(issued, request.max_tokens, output_tokens)
        path, above, cut = _path(request), math.inf, output_tokens >= request.max_tokens
        at = bin_of(output_tokens)
        for key in path:
            if above < self.options.prior_answers:
                break
            if (group := self._groups.get(key)) is None:
                group = self._groups[key] = Group(counts=np.zeros(BEYOND + 1, np.float32))
            above = group.answers
            self._count(group, at, cut)
        for key in filter(self._groups.__contains__, reversed(path)):
            self._groups.move_to_end(key)
        while len(self._groups) > self.options.most_groups:
            self._groups.popitem(last=False)
        # The next request is likely of this kind, and waits for its prediction. Here nothing waits.
        known = self._known(path)
        self._ready = None if known is None else (path, _curve(known))

    def forget(self, request: Request) -> None:
        """The request ended before its output did: its bound is not judged."""
        self._issued.pop(request.id, None)

    # ---- state ---------------------------------------------------------------------------------------------------

    def memory(self) -> OnlineMemory:
        """All that it knows, to the last bit; a copy, which stays as it is while this one learns."""
        groups = tuple((key, replace(group, counts=group.counts.copy())) for key, group in self._groups.items())
        return OnlineMemory(options=self.options, groups=groups, issued=tuple(self._issued.items()))

    @classmethod
    def from_memory(cls, memory: OnlineMemory) -> OnlineLengthPredictor:
        """A predictor that continues from `memory`, and takes its groups over."""
        made = cls(memory.options)
        made._groups.update(memory.groups)
        made._issued.update(memory.issued)
        return made

    def copy(self) -> OnlineLengthPredictor:
        """The same predictor, which learns no more with this one: to be written out while this one goes on."""
        return self.from_memory(self.memory())

    def state(self) -> dict[str, Any]:
        """All that was learned, as JSON can hold it; bounds of requests that still run are not in it."""
        return {"version": VERSION, "exceed": self.options.exceed, "groups": list(self.groups())}

    def groups(self) -> Iterator[dict[str, Any]]:
        """The groups of `state`, one after the other: all at once they are large."""
        return (_written(key, group) for key, group in self._groups.items())

    @classmethod
    def from_state(cls, state: Mapping[str, Any], options: OnlineLengthOptions | None = None) -> OnlineLengthPredictor:
        """What `state` gave. Levels learned for another `exceed` start over. ValueError: it is no such state."""
        made = cls(options)
        if state.get("version") != VERSION:
            raise ValueError(f"lengths: version {state.get('version')}, this is version {VERSION}")
        same = state.get("exceed") == made.options.exceed
        try:
            groups = [_read(written, same) for written in state["groups"]]
        except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
            raise ValueError(f"lengths: a group cannot be read ({error!r})") from error
        made._groups.update(groups[-made.options.most_groups :])
        return made

    # ---- histograms and levels -----------------------------------------------------------------------------------

    def _count(self, group: Group, at: int, cut: bool) -> None:
        """Add one output in bin `at`; one that was cut is shared among the longer ones, as they are."""
        counts = group.counts
        counts *= self._keep
        if not cut:
            counts[at] += 1
        elif (longer := float(counts[at + 1 :].sum())) > 0:
            counts[at + 1 :] *= 1 + 1 / longer
        else:
            counts[BEYOND] += 1
        group.weight = group.weight * self._keep + 1
        group.answers += 1

    def _judge(self, issued: Issued, max_tokens: int, output_tokens: int) -> None:
        """Move the level of a bound: up a little where it held, down by more where it did not."""
        if (group := self._groups.get(issued.level_of)) is None:
            return
        level, exceed = self._level(issued.level_of), self.options.exceed
        # Every bound is max_tokens at the lowest level; what good times taught, up to the highest, is soon unlearned.
        low, high = 1 / (self.options.kept_answers + 2), min(_REACH * exceed, (1 + exceed) / 2)
        # Steps in proportion: a run of long outputs must not carry the level to the lowest at once.
        if output_tokens > issued.tokens:
            group.level = max(level * math.exp(-self.options.rate), low)
        elif issued.tokens < max_tokens or level < exceed:
            # That max_tokens held is no evidence for bounds below it: the level rises to `exceed`, not above.
            group.level = min(level * math.exp(self.options.rate * exceed / (1 - exceed)), high)

    def _level_of(self, path: tuple[Key, ...]) -> Key:
        """The group whose level holds: the caller, once it has enough outputs to be judged by, else the model."""
        caller = self._groups.get(path[1])
        return path[1] if caller and caller.answers >= self.options.own_level_answers else path[0]

    def _level(self, level_of: Key) -> float:
        """The group's own level; a caller's starts at its model's, a model's below `exceed`."""
        for key in (level_of, level_of[:1]):
            group = self._groups.get(key)
            if group is not None and group.level is not None:
                return group.level
        return self.options.start * self.options.exceed

    def _known(self, path: tuple[Key, ...]) -> Counts | None:
        """Counts of the smallest group with what the groups above lend it; None: the model has too few."""
        model = self._groups.get(path[0])
        if model is None or model.answers < self._least_answers:
            return None
        counts, mass = model.counts, model.weight
        for key in path[1:]:
            if (group := self._groups.get(key)) is None:
                break
            lent = min(self.options.prior_answers, mass)
            counts = group.counts + counts * np.float32(lent / mass)
            mass = group.weight + lent
        return counts

    def _upper(self, curve: _Curve, mass: float, level: float, max_tokens: int) -> float:
        """The quantile that leaves out `level`, corrected for how few outputs it comes from; max_tokens if too few."""
        part = (1 - level) * (mass + 1) / mass if mass > 0 else 1.0
        return _quantile(curve, part, max_tokens) if part < 1 else float(max_tokens)


def bin_of(tokens: int) -> int:
    """The bin of a length: one each below 16, then eight for every doubling, up to 2^20."""
    if tokens < 16:
        return max(tokens, 0)
    octave = tokens.bit_length() - 4
    return min(8 * octave + (tokens >> octave), BEYOND - 1)


def shortest_of(at: int) -> int:
    """The shortest length in a bin."""
    octave = max(at // 8 - 1, 0)
    return (at - 8 * octave) << octave


def _path(request: Request) -> tuple[Key, ...]:
    """The groups of a request, from the largest to the smallest."""
    model, caller = request.model[:_NAME_CHARS], request.caller[:_NAME_CHARS]
    cut, prompt = request.max_tokens.bit_length(), request.prompt_tokens
    coarse, fine = prompt.bit_length(), bin_of(prompt) // 2
    return (model,), (model, caller), (model, caller, cut, coarse), (model, caller, cut, coarse, fine)


def _curve(counts: Counts) -> _Curve:
    return _Curve(counts.tolist(), counts.cumsum().tolist())


def _quantile(curve: _Curve, part: float, max_tokens: int) -> float:
    """The length that `part` of the counts does not exceed, within a bin by its share; at most max_tokens."""
    counts, sums = curve
    wanted = part * sums[-1]
    at = bisect_left(sums, wanted)
    if at >= BEYOND:
        return float(max_tokens)
    inside = (wanted - (sums[at] - counts[at])) / counts[at] if counts[at] > 0 else 1.0
    low, high = shortest_of(at), shortest_of(at + 1)
    return float(min(max(math.ceil(low - 1 + inside * (high - low)), 1), max_tokens))


def _longer_than(counts: Counts, tokens: int) -> Counts:
    """The counts of longer outputs; of the bin that the length is in, the part above it."""
    at = bin_of(tokens)
    longer = counts.copy()
    longer[:at] = 0
    low, high = shortest_of(at), shortest_of(at + 1)
    longer[at] *= max(high - 1 - tokens, 0) / (high - low)
    return longer


def _written(key: Key, group: Group) -> dict[str, Any]:
    # Nine digits hold a float32 exactly.
    counts = [[int(at), float(f"{group.counts[at]:.9g}")] for at in np.flatnonzero(group.counts > 1e-6)]
    return {"key": list(key), "weight": group.weight, "answers": group.answers, "level": group.level, "counts": counts}


def _read(written: Mapping[str, Any], same_exceed: bool) -> tuple[Key, Group]:
    key: Key = tuple(written["key"])
    counts = np.zeros(BEYOND + 1, np.float32)
    for at, count in written["counts"]:
        counts[range(BEYOND + 1)[at]] = count if 0 <= count < 1e9 else math.nan
    weight, answers, level = float(written["weight"]), int(written["answers"]), written["level"]
    sound = counts.sum() > 0 and 0 < weight < math.inf and answers > 0 and (level is None or 0 < level < 1)
    if not sound or not all(isinstance(part, str | int) for part in key):
        raise ValueError(f"key {key}")
    return key, Group(counts=counts, weight=weight, answers=answers, level=level if same_exceed else None)
