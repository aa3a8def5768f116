"""The state of the online length predictor on disk (JSON), so that it survives a restart.

Serving never fails because of it: a file that cannot be read or written is reported, and learning begins again. Knows
nothing of how lengths are learned.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from throttllem.core.lengths.online import OnlineLengthOptions, OnlineLengthPredictor
from throttllem.files import read_own, write_aside

MARK = "throttllem lengths"
_HEAD = f'{{"mark": "{MARK}"'.encode()


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """A predictor, and the problem with the file (None: no problem, or no file yet)."""

    predictor: OnlineLengthPredictor
    trouble: str | None = None


def load_lengths(path: Path, options: OnlineLengthOptions | None = None) -> Restored:
    """The saved predictor, or a new one. Raises nothing, whatever the file contains."""
    try:
        content = read_own(path)
    except FileNotFoundError:
        return Restored(predictor=OnlineLengthPredictor(options))
    except OSError as error:
        return _new(options, f"{path}: cannot be read ({error.strerror or error})")
    if not content.startswith(_HEAD):
        return _new(options, f"{path}: not a file of learned lengths; choose another path, or remove the file")
    try:
        return Restored(predictor=OnlineLengthPredictor.from_state(json.loads(content)["lengths"], options))
    # A deeply nested file ends in RecursionError.
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return _new(options, f"{path}: damaged, or of another version ({error})")


def save_lengths(predictor: OnlineLengthPredictor, path: Path) -> str | None:
    """Write the predictor's state; the file appears whole or not at all. Returns the problem, or None.

    Another program's file is not overwritten: the path may be a mistake.
    """
    try:
        if path.is_file() and not path.is_symlink() and not _ours(path):
            return f"{path}: lengths not saved: the path holds another file; choose another path, or remove it"
        empty = OnlineLengthPredictor(predictor.options).state()
        # Group by group: one long call would delay every other thread.
        groups = ", ".join([json.dumps(group, allow_nan=False) for group in predictor.groups()])
        front = json.dumps({"mark": MARK, "lengths": empty}, allow_nan=False).removesuffix("]}}")
        with write_aside(path, private=True) as aside:
            aside.write_text(f"{front}{groups}]}}}}")
    except OSError as error:
        return f"lengths not saved: {error}"
    return None


def _ours(path: Path) -> bool:
    """Whether `save_lengths` wrote the file (damaged or not), or it is empty."""
    with path.open("rb") as file:
        return file.read(len(_HEAD)) in {_HEAD, b""}


def _new(options: OnlineLengthOptions | None, trouble: str) -> Restored:
    return Restored(predictor=OnlineLengthPredictor(options), trouble=f"{trouble}. Learning begins again.")
