"""Outcomes of earlier runs, so that an arena repeats only what has changed.

A run is named by a digest of its cell, its seed, its setting and the source files that it depends on; what a class of
the user depends on is not known, so its runs are not kept. One file holds the runs of one cell and seed; entries of
other trees are dropped when it is written.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path

import throttllem
from throttllem.arena.outcome import Outcome
from throttllem.core.clocks.policy import Policy
from throttllem.files import ensure_writable_dir, write_aside

_PACKAGE = Path(throttllem.__file__).parent
_SIMULATED = ("core", "engines", "physics", "profiling", "sim", "config.py", "arena/cells.py", "arena/cell_run.py")
_POLICIES = "core/clocks"
_OF_EVERY_POLICY = ("own_policy.py", "policy.py")


def tree() -> str:
    """A digest of the sources that outcomes depend on: of every run with the same one, figures are the same."""
    return _digest_of_sources(True)


@cache
def _digest_of_sources(slo_aware: bool) -> str:
    """A digest of the sources of a simulation; of first come, first served without the SLO-aware policies' own."""
    found = hashlib.sha256(json.dumps([version(name) for name in ("numpy", "numba", "lightgbm")]).encode())
    for part in _SIMULATED:
        path = _PACKAGE / part
        for file in sorted(path.rglob("*.*")) if path.is_dir() else [path]:
            of_policies = file.is_relative_to(_PACKAGE / _POLICIES) and file.name not in _OF_EVERY_POLICY
            if file.suffix in {".py", ".toml"} and (slo_aware or not of_policies):
                found.update(f"{file.relative_to(_PACKAGE)}\n".encode() + file.read_bytes())
    return found.hexdigest()[:16]


def _digest_of_module(name: str) -> str:
    file = getattr(sys.modules.get(name), "__file__", None)
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16] if file else ""


@dataclass(slots=True, kw_only=True)
class RunCache:
    """The outcomes of one cell and seed. `inputs`: what the cell is, besides the sources."""

    folder: Path
    name: str
    inputs: object
    _known: dict[str, Outcome] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            self._known = {key: Outcome(**values) for key, values in json.loads(self._file.read_text()).items()}
        except (OSError, ValueError, TypeError, AttributeError):  # damaged, or of another build
            self._known = {}

    def outcome(self, policy: Policy, run: Callable[[], Outcome], *, row: str = "") -> Outcome:
        """The outcome of a policy: the known one, or that of running it now. `row`: what it runs as, if not itself."""
        own = policy.own
        modules = [] if own is None else [getattr(own, "func", own).__module__]
        if any(module.partition(".")[0] != throttllem.__name__ for module in modules):
            return run()
        return self.scheduled(row or policy.name, run, modules, slo_aware=policy.slo_aware)

    def scheduled(
        self, name: str, run: Callable[[], Outcome], modules: Sequence[str], *, slo_aware: bool = False
    ) -> Outcome:
        """The outcome of what runs under that name, and depends on these modules besides the simulation."""
        sources = _digest_of_sources(slo_aware)
        text = json.dumps([self.inputs, name, sources, [_digest_of_module(each) for each in modules]], sort_keys=True)
        key = f"{sources}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        if key not in self._known:
            self._known[key] = run()
        return self._known[key]

    def save(self) -> None:
        """Keep what is known of the present sources."""
        ensure_writable_dir(self.folder)
        trees = {_digest_of_sources(True), _digest_of_sources(False)}
        kept = {key: asdict(found) for key, found in self._known.items() if key.partition("-")[0] in trees}
        with write_aside(self._file) as aside:
            aside.write_text(json.dumps(kept))

    @property
    def _file(self) -> Path:
        return self.folder / f"{self.name}.json"
