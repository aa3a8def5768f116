"""What the length predictor has learned, on disk: JSON, so that a restart goes on where the last run ended.

Serving never stops for it: what cannot be read is said and learning starts anew; what cannot be written is said.
Knows nothing of how lengths are learned.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from throttllem.core.lengths.online import OnlineLengthOptions, OnlineLengthPredictor
from throttllem.files import write_aside

MARK = "throttllem lengths"
_HEAD = f'{{"mark": "{MARK}"'.encode()


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """A predictor to serve with, and what was wrong with the file (None: nothing, or there is none yet)."""

    predictor: OnlineLengthPredictor
    trouble: str | None = None


def load_lengths(path: Path, options: OnlineLengthOptions | None = None) -> Restored:
    """What `save_lengths` wrote there, or a predictor that knows nothing. Raises nothing for what is in the file."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return Restored(predictor=OnlineLengthPredictor(options))
    except OSError as error:
        return _anew(options, f"{path}: cannot be read ({error.strerror or error})")
    if not content.startswith(_HEAD):
        return _anew(options, f"{path}: no lengths that throttllem learned; choose another path, or remove the file")
    try:
        return Restored(predictor=OnlineLengthPredictor.from_state(json.loads(content)["lengths"], options))
    # A deeply nested file ends in RecursionError; whatever is wrong with it, it is no reason not to serve.
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return _anew(options, f"{path}: damaged, or of another version ({error})")


def save_lengths(predictor: OnlineLengthPredictor, path: Path) -> str | None:
    """Write what was learned; the file appears whole or not at all. What went wrong comes back as a message.

    A file that is not ours is left as it is: the path may be a mistake.
    """
    try:
        if path.is_file() and not _ours(path):
            return f"{path}: lengths not saved, another file is there; choose another path, or remove it"
        empty = OnlineLengthPredictor(predictor.options).state()
        # Group by group: one long call, or all their numbers at once, would hold up every other thread.
        groups = ", ".join([json.dumps(group, allow_nan=False) for group in predictor.groups()])
        front = json.dumps({"mark": MARK, "lengths": empty}, allow_nan=False).removesuffix("]}}")
        with write_aside(path) as aside:
            aside.write_text(f"{front}{groups}]}}}}")
    except OSError as error:
        return f"lengths not saved: {error}"
    return None


def _ours(path: Path) -> bool:
    """Whether the file is one that `save_lengths` wrote, damaged or not, or is empty."""
    with path.open("rb") as file:
        return file.read(len(_HEAD)) in {_HEAD, b""}


def _anew(options: OnlineLengthOptions | None, trouble: str) -> Restored:
    return Restored(predictor=OnlineLengthPredictor(options), trouble=f"{trouble}. Lengths are learned anew.")
