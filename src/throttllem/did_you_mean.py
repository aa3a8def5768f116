"""What a mistyped name may have meant: the hint at the end of an error about an unknown name.

Imports the standard library alone, so that every package but the core may use it.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection


def did_you_mean(name: str, known: Collection[str], *, most: int = 1) -> str:
    """`did you mean A or B?` for up to `most` known names that begin with `name` or resemble it, else
    `known: A, B, C`. Upper and lower case are the same.
    """
    lower = {each.lower(): each for each in known}
    begin = [each for each in lower if name and each.startswith(name.lower())]
    close = difflib.get_close_matches(name.lower(), lower, n=most, cutoff=0.5)
    near = [lower[each] for each in dict.fromkeys((*begin, *close))][:most]
    return f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"
