"""How long will the answer be, learned from the answers that have finished: a length predictor for a live engine.

Finished answers are counted in histograms that forget, one for each model, caller of it and shape of request (prompt
and max_tokens); the smaller borrows from the larger until it knows enough. A bound is a quantile of them whose level
follows how often bounds were exceeded (adaptive conformal inference, Gibbs and Candes, NeurIPS 2021). Knows nothing of
clocks and files: the same calls in the same order give the same answers.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from throttllem.core.lengths.bins import BEYOND, bin_of, shortest_of
from throttllem.core.types import Request, check

VERSION = 1
_NAME_CHARS = 64
_MOST_ISSUED = 8192
_REACH = 3.0

Counts = NDArray[np.float32]
Key = tuple[str | int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class OnlineLengthOptions:
    """How `OnlineLengthPredictor` learns. `exceed` is the fraction of answers that may be longer than their bound.

    `memory_answers`: how many answers of a group count, older ones fade. `prior_answers`: as how many answers of its
    own a group counts what it borrows; before a group has as many, no smaller one is opened below it. `rate`: how far
    one answer that exceeds its bound moves the level of the quantile, as a part of it. `own_level_answers`: from how
    many answers on a caller has a level of its own. `start`: a new model's level as a part of `exceed`, for the answers
    that end first are the short ones. `most_groups`: of more, those go that were not used for longest.
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
        """With fewer, even the longest of them is exceeded more often than asked: 9 for one in ten."""
        return math.ceil(round(1 / self.exceed, 6)) - 1

    @property
    def kept_answers(self) -> float:
        """`memory_answers`, or more where `exceed` is small: a quantile needs some answers beyond it."""
        return max(self.memory_answers, 5 / self.exceed)


@dataclass(slots=True, kw_only=True)
class _Group:
    """What is known of one model, caller or shape: faded counts by length, their sum, and how many answers ever.

    `level` is the fraction that its bounds leave out now; None: it has none of its own.
    """

    counts: Counts
    weight: float = 0.0
    answers: int = 0
    level: float | None = None


class _Issued(NamedTuple):
    """A bound that was given out, and the group by whose level."""

    tokens: float
    governor: Key


class OnlineLengthPredictor:
    """Predicts lengths, learns from what came out. Not safe for threads: one owner.

    Without `least_answers` answers of the request's model it says None: plan with max_tokens.
    """

    def __init__(self, options: OnlineLengthOptions | None = None) -> None:
        self.options = options or OnlineLengthOptions()
        self._keep = 1 - 1 / self.options.kept_answers
        self._groups: OrderedDict[Key, _Group] = OrderedDict()
        self._issued: dict[int, _Issued] = {}

    def predict(self, request: Request) -> float | None:
        """The median of what is known, in tokens, at most max_tokens; None: not enough is known."""
        counts = self._known(_path(request))
        return None if counts is None else _quantile(counts, 0.5, request.max_tokens)

    def bound(self, request: Request) -> float | None:
        """Tokens that the answer exceeds as rarely as asked; None: plan with max_tokens.

        It is remembered: `learn` compares it with the answer. The last one given for a request counts.
        """
        path = _path(request)
        if (known := self._known(path)) is None:
            return None
        governor = self._governor(path)
        level = self._level(governor)
        tokens = self._upper(known, self._groups[governor].weight, level, request.max_tokens)
        if request.id not in self._issued and len(self._issued) >= _MOST_ISSUED:
            del self._issued[next(iter(self._issued))]
        self._issued[request.id] = _Issued(tokens, governor)
        return tokens if tokens < request.max_tokens else None

    def renew(self, request: Request, generated_tokens: int) -> float | None:
        """The bound of an answer that is longer than `generated_tokens` already; None: plan with max_tokens.

        Of the answers as long as that, the asked fraction exceeds it. It is not remembered: `learn` judges `bound`.
        """
        path = _path(request)
        if (known := self._known(path)) is None:
            return None
        governor = self._governor(path)
        longer = _longer_than(known, generated_tokens)
        share = float(longer.sum()) / float(known.sum())
        level = min(self.options.exceed, self._level(governor))
        tokens = self._upper(longer, share * self._groups[governor].weight, level, request.max_tokens)
        return max(tokens, generated_tokens + 1.0) if tokens < request.max_tokens else None

    def learn(self, request: Request, output_tokens: int) -> None:
        """An answer has ended with so many tokens; one that reached max_tokens would have been longer."""
        if (issued := self._issued.pop(request.id, None)) is not None:
            self._judge(issued, request.max_tokens, output_tokens)
        path, above, cut = _path(request), math.inf, output_tokens >= request.max_tokens
        for key in path:
            if above < self.options.prior_answers:
                break
            above = self._group(key).answers
            self._count(self._groups[key], output_tokens, cut)
        for key in filter(self._groups.__contains__, reversed(path)):
            self._groups.move_to_end(key)
        while len(self._groups) > self.options.most_groups:
            self._groups.popitem(last=False)

    def forget(self, request: Request) -> None:
        """The request ended without an answer to learn from: its bound is not judged."""
        self._issued.pop(request.id, None)

    def copy(self) -> OnlineLengthPredictor:
        """What was learned so far, which learns no more with this one: to be written down while this one goes on."""
        made = OnlineLengthPredictor(self.options)
        made._groups.update((key, replace(group, counts=group.counts.copy())) for key, group in self._groups.items())
        return made

    def state(self) -> dict[str, Any]:
        """All that was learned, as JSON can hold it; bounds given out for requests that run are not in it."""
        return {"version": VERSION, "exceed": self.options.exceed, "groups": list(self.groups())}

    def groups(self) -> Iterator[dict[str, Any]]:
        """The groups of `state`, one after the other: all at once they are large."""
        return (_written(key, group) for key, group in self._groups.items())

    @classmethod
    def from_state(cls, state: Mapping[str, Any], options: OnlineLengthOptions | None = None) -> OnlineLengthPredictor:
        """What `state` gave. Levels that were learned for another `exceed` start anew. ValueError: it is no state."""
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

    def _group(self, key: Key) -> _Group:
        if (group := self._groups.get(key)) is None:
            group = self._groups[key] = _Group(counts=np.zeros(BEYOND + 1, np.float32))
        return group

    def _count(self, group: _Group, output_tokens: int, cut: bool) -> None:
        """Add one answer. One that was cut is shared among the longer ones, as they are (Efron, 1967)."""
        counts, at = group.counts, bin_of(output_tokens)
        counts *= self._keep
        if not cut:
            counts[at] += 1
        elif (longer := float(counts[at + 1 :].sum())) > 0:
            counts[at + 1 :] *= 1 + 1 / longer
        else:
            counts[BEYOND] += 1
        group.weight = group.weight * self._keep + 1
        group.answers += 1

    def _judge(self, issued: _Issued, max_tokens: int, output_tokens: int) -> None:
        """Move the level by which that bound was given: up a little where it held, down by more where it did not."""
        if (group := self._groups.get(issued.governor)) is None:
            return
        level, exceed = self._level(issued.governor), self.options.exceed
        # Every bound is max_tokens at the lowest level; what good times taught, up to the highest, is soon unlearned.
        low, high = 1 / (self.options.kept_answers + 2), min(_REACH * exceed, (1 + exceed) / 2)
        # Steps in proportion: a run of long answers must not carry the level to the lowest at once.
        if output_tokens > issued.tokens:
            group.level = max(level * math.exp(-self.options.rate), low)
        elif issued.tokens < max_tokens or level < exceed:
            # That max_tokens held says nothing for bounds below it: it raises to what was asked, not on.
            group.level = min(level * math.exp(self.options.rate * exceed / (1 - exceed)), high)

    def _governor(self, path: tuple[Key, ...]) -> Key:
        """The caller, once it has answers enough to judge it by, else the model."""
        caller = self._groups.get(path[1])
        return path[1] if caller and caller.answers >= self.options.own_level_answers else path[0]

    def _level(self, governor: Key) -> float:
        """The group's own level; a caller's starts at its model's, a model's below what was asked."""
        for key in (governor, governor[:1]):
            group = self._groups.get(key)
            if group is not None and group.level is not None:
                return group.level
        return self.options.start * self.options.exceed

    def _known(self, path: tuple[Key, ...]) -> Counts | None:
        """Counts of the smallest group with what the groups above lend it; None: the model has too few."""
        model = self._groups.get(path[0])
        if model is None or model.answers < self.options.least_answers:
            return None
        counts, mass = model.counts, model.weight
        for key in path[1:]:
            if (group := self._groups.get(key)) is None:
                break
            lent = min(self.options.prior_answers, mass)
            counts = group.counts + counts * np.float32(lent / mass)
            mass = group.weight + lent
        return counts

    def _upper(self, counts: Counts, mass: float, level: float, max_tokens: int) -> float:
        """The quantile that leaves out `level`, corrected for how few answers it comes from; max_tokens if too few."""
        part = (1 - level) * (mass + 1) / mass if mass > 0 else 1.0
        return _quantile(counts, part, max_tokens) if part < 1 else float(max_tokens)


def _path(request: Request) -> tuple[Key, ...]:
    """The groups of a request, from the largest to the smallest."""
    model, caller = request.model[:_NAME_CHARS], request.caller[:_NAME_CHARS]
    cut, prompt = request.max_tokens.bit_length(), request.prompt_tokens
    coarse, fine = prompt.bit_length(), bin_of(prompt) // 2
    return (model,), (model, caller), (model, caller, cut, coarse), (model, caller, cut, coarse, fine)


def _quantile(counts: Counts, part: float, max_tokens: int) -> float:
    """The length that `part` of the counts does not exceed, within a bin by its share; at most max_tokens."""
    sums = counts.cumsum()
    wanted = part * float(sums[-1])
    at = int(sums.searchsorted(wanted))
    if at >= BEYOND:
        return float(max_tokens)
    inside = (wanted - float(sums[at] - counts[at])) / float(counts[at]) if counts[at] > 0 else 1.0
    low, high = shortest_of(at), shortest_of(at + 1)
    return float(min(max(math.ceil(low - 1 + inside * (high - low)), 1), max_tokens))


def _longer_than(counts: Counts, tokens: int) -> Counts:
    """The counts of longer answers; of the bin that the length is in, the part above it."""
    at = bin_of(tokens)
    longer = counts.copy()
    longer[:at] = 0
    low, high = shortest_of(at), shortest_of(at + 1)
    longer[at] *= max(high - 1 - tokens, 0) / (high - low)
    return longer


def _written(key: Key, group: _Group) -> dict[str, Any]:
    # Nine digits hold a float32 exactly.
    counts = [[int(at), float(f"{group.counts[at]:.9g}")] for at in np.flatnonzero(group.counts > 1e-6)]
    return {"key": list(key), "weight": group.weight, "answers": group.answers, "level": group.level, "counts": counts}


def _read(written: Mapping[str, Any], same_exceed: bool) -> tuple[Key, _Group]:
    key: Key = tuple(written["key"])
    counts = np.zeros(BEYOND + 1, np.float32)
    for at, count in written["counts"]:
        counts[range(BEYOND + 1)[at]] = count if 0 <= count < 1e9 else math.nan
    weight, answers, level = float(written["weight"]), int(written["answers"]), written["level"]
    sound = counts.sum() > 0 and 0 < weight < math.inf and answers > 0 and (level is None or 0 < level < 1)
    if not sound or not all(isinstance(part, str | int) for part in key):
        raise ValueError(f"key {key}")
    return key, _Group(counts=counts, weight=weight, answers=answers, level=level if same_exceed else None)
