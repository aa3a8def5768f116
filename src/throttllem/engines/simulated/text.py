"""The texts that the simulated engine generates, and its tokenizer.

The tokenizer is exact by definition: a token is up to four word characters with the space before them, one
sign with the space before it, or a run of white space. Knows nothing of requests.
"""

from __future__ import annotations

import random
import re

_PIECE = re.compile(r" ?\w{1,4}| ?[^\w\s]|\s+")
_LONGEST_WORD_PIECE = 5

_THINGS = "engine clock river request answer garden table queue window morning machine letter harbour token train cloud"
_KINDS = "slow quiet steady cold warm small patient bright heavy old simple narrow careful green plain wide"
_DOES = "waits turns holds keeps follows meets carries leaves finds counts serves passes reaches watches cools moves"
_WHERE = "near under behind before after beside above without past around"
_LINKS = "and but while because until so"


def count_tokens(text: str) -> int:
    """Tokens of a text."""
    return len(_PIECE.findall(text))


def estimate_tokens(text: str, *, most_tokens: int) -> tuple[int, bool]:
    """Tokens of a text, and whether that is exact. Only the beginning of a text with certainly more than `most_tokens`
    is counted, or one long text would delay all other requests.
    """
    enough = (most_tokens + 1) * _LONGEST_WORD_PIECE
    if len(text) <= enough:
        return count_tokens(text), True
    return max(most_tokens + 1, count_tokens(text[:enough])) + (len(text) - enough) // 4, False


class Tape:
    """Sentences in a ring: a place on it always gives the same token, and no text needs escapes in JSON."""

    def __init__(self, seed: object, *, sentences: int = 500) -> None:
        rng = random.Random(f"tape {seed}")
        texts = [_sentence(rng) for _ in range(sentences)]
        self.text = "".join(texts)
        self.pieces = tuple(piece.encode() for piece in _PIECE.findall(self.text))
        starts, at = [], 0
        for sentence in texts:
            starts.append(at)
            at += count_tokens(sentence)
        self._starts = tuple(starts)

    def begin(self, rng: random.Random) -> int:
        """A place to begin an answer: the first token of some sentence."""
        return rng.choice(self._starts)

    def take(self, begin: int, first: int, last: int) -> list[bytes]:
        """Tokens `first` up to `last` (without) of the answer that begins at `begin`."""
        length = len(self.pieces)
        at = (begin + first) % length
        found = list(self.pieces[at : at + last - first])
        while len(found) < last - first:
            found += self.pieces[: last - first - len(found)]
        if first == 0 and found:
            found[0] = found[0].lstrip()
        return found

    def holds(self, text: str) -> bool:
        """Whether an answer can have this text in it."""
        return text in self.text + self.text[: len(text)]


def _sentence(rng: random.Random) -> str:
    first = _clause(rng)
    second = f", {rng.choice(_LINKS.split())} {_clause(rng)}" if rng.random() < 0.4 else ""
    return f" {first[0].upper()}{first[1:]}{second}."


def _clause(rng: random.Random) -> str:
    things, kinds = _THINGS.split(), _KINDS.split()
    subject = f"{rng.choice(('the', 'a', 'this'))} {rng.choice(kinds)} {rng.choice(things)}"
    place = f"{rng.choice(_WHERE.split())} the {rng.choice(things)}"
    return f"{subject} {rng.choice(_DOES.split())} {place}"
