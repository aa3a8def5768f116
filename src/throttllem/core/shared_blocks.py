"""KV blocks that prompts with a common beginning share: each is counted once (vLLM's automatic prefix caching).

Knows nothing of prompts: a request says with which other it has how many blocks in common.
"""

# The theory. Any two requests have the beginning in common that the weakest of the links between them allows, so links
# that form a tree are enough: the blocks in use are those of all requests, less the blocks of each link. A request that
# leaves takes away what none has in common with it, all but its heaviest link; its other links go to that neighbour.
# The same holds for a whole projection: of two groups that a link joins, the heaviest links first, that group's request
# which ends last but earlier than the other's stops to save the link's blocks when it ends.

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Link = tuple[int, int, int]
"""Two requests, and the blocks that they share."""


class SharedBlocks:
    """The links between the requests of one engine, and what the sequences of one request share (`own`)."""

    def __init__(self) -> None:
        self.own: dict[int, int] = {}
        self._linked: dict[int, dict[int, int]] = {}

    def link(self, request_id: int, other_id: int, blocks: int) -> None:
        """Two requests of which the first had no link yet have their first `blocks` blocks in common."""
        self._linked.setdefault(request_id, {})[other_id] = blocks
        self._linked.setdefault(other_id, {})[request_id] = blocks

    def relink(self, links: Iterable[Link]) -> None:
        """Replace all links."""
        self._linked = {}
        for one, other, blocks in links:
            self.link(one, other, blocks)

    def links(self) -> tuple[Link, ...]:
        """Every link once."""
        return tuple(
            (one, other, blocks)
            for one, linked in self._linked.items()
            for other, blocks in linked.items()
            if one < other
        )

    def remove(self, request_id: int) -> None:
        """A request left: its heaviest neighbour inherits its links."""
        self.own.pop(request_id, None)
        linked = self._linked.pop(request_id, None)
        if linked is None:
            return
        heir = max(linked, key=lambda other: (linked[other], -other))
        for other, blocks in linked.items():
            del self._linked[other][request_id]
            if other != heir:
                self.link(other, heir, blocks)
        for other in linked:
            if not self._linked[other]:
                del self._linked[other]

    def saved(self, running: Container[int]) -> tuple[int, int]:
        """Blocks that sharing saves now: among the running requests, and all others."""
        among = others = 0
        for request_id, blocks in self.own.items():
            among, others = (among + blocks, others) if request_id in running else (among, others + blocks)
        for one, other, blocks in self.links():
            both = one in running and other in running
            among, others = (among + blocks, others) if both else (among, others + blocks)
        return among, others


def saved_blocks(
    links: Iterable[Link], own: Mapping[int, int], places: Mapping[int, int], begin: Ints, end: Ints
) -> Ints:
    """Blocks that sharing saves at each offset of a projection, shape (latest end,). `places` are the requests' indices
    in `begin` and `end`, the offsets at which each holds its first block and its last.
    """
    changes = np.zeros(int(end.max(initial=0)) + 1, dtype=np.int64)
    for request_id, blocks in own.items():
        at = places[request_id]
        changes[begin[at]] += blocks
        changes[end[at]] -= blocks
    group = {at: at for at in places.values()}
    """From an index towards that of its group's request which ends last."""

    def last(at: int) -> int:
        while group[at] != at:
            group[at] = at = group[group[at]]
        return at

    for one, other, blocks in sorted(links, key=lambda link: -link[2]):
        first, second = places[one], places[other]
        ends, stays = sorted((last(first), last(second)), key=lambda at: int(end[at]))
        if ends == stays:
            continue
        group[ends] = stays
        since = max(begin[first], begin[second], begin[ends])
        if since < end[ends]:
            changes[since] += blocks
            changes[end[ends]] -= blocks
    return np.cumsum(changes)[:-1]
