"""Properties that the fuzzer runs for minutes (`make fuzz`) and every test run for a moment.

What a fuzzer found is a file in corpus/: the arguments of one property, in Python's notation. Each is an example from
then on. So arguments are bytes, texts, whole numbers, and lists of them.
"""

import ast
import hashlib
import time
from itertools import pairwise
from pathlib import Path

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

CORPUS = Path(__file__).parent / "corpus"
FEWER = 4
"""The share of a profile's examples that a property takes: there are many properties."""
MOST_S = 1.0
"""CPU time of one example, of inputs of a few kilobytes: beyond it something grows faster than its input."""


def fuzzed(cost=1, /, **strategies):
    """A property over these strategies and the examples in the corpus; few of them, but for the fuzzer's own runs.

    `cost`: how many times as long as others an example takes.
    """

    def decorate(check):
        def bounded(**given_):
            began_s = time.thread_time()
            check(**given_)
            took_s = time.thread_time() - began_s
            assert took_s < MOST_S, f"{took_s:.1f} s of CPU"

        bounded.__name__ = bounded.__qualname__ = check.__name__
        bounded.__doc__, bounded.__module__ = check.__doc__, check.__module__
        few = max(1, settings.default.max_examples // FEWER // cost)
        health = list(HealthCheck)
        test = settings(max_examples=few, deadline=None, suppress_health_check=health)(given(**strategies)(bounded))
        for path in sorted(CORPUS.glob(f"{check.__name__}-*.txt")):
            test = example(**ast.literal_eval(path.read_text()))(test)
        return test

    return decorate


def keep(name, arguments, corpus=CORPUS):
    """Write the arguments of a failure as an example of this property. The file; None if they cannot be written so."""
    text = repr(arguments)
    try:
        if ast.literal_eval(text) != arguments:
            return None
    except (ValueError, SyntaxError):
        return None
    path = corpus / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}.txt"
    path.write_text(text + "\n")
    return path


@st.composite
def mutated(draw, *seeds, tokens=()):
    """Bytes of one of the seeds: cut, with parts repeated, other bytes between, bits changed; sometimes as they are."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        to = min(len(data), at + draw(st.integers(0, 12)))
        match draw(st.integers(0, 5)):
            case 0:
                del data[at:to]
            case 1:
                data[at:at] = data[at:to]
            case 2:
                data[at:to] = draw(st.binary(max_size=6))
            case 3 if tokens:
                data[at:to] = draw(st.sampled_from(tokens))
            case 4 if at < len(data):
                data[at] ^= 1 << draw(st.integers(0, 7))
            case 5:
                del data[draw(st.integers(0, len(data))) :]
    return bytes(data)


def pieces(data, cuts):
    """The data cut at these places."""
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    return [data[begin:end] for begin, end in pairwise(edges)]


cuts = st.lists(st.integers(0, 3000), max_size=12)
