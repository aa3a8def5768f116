"""What one data set says of the physics: errors, targets, pictures. Knows nothing of how they are printed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from matplotlib.figure import Figure

from throttllem.calibrate.errors import Errors


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorRow:
    """Errors of one figure; `held_out` says what the fit did not see ("nothing": the shipped catalogue)."""

    what: str
    held_out: str
    errors: Errors


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One line to be met: what, the limit, what was found (both as text) and whether that is enough."""

    what: str
    limit: str
    found: str
    met: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """A picture: file stem, caption of one sentence, and what draws it on an empty figure of 8 x 4.5 inches."""

    name: str
    caption: str
    draw: Callable[[Figure], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One data set. `text` is Markdown: what was compared and what explains the residuals.

    `constants` are those that the fit on everything gives, by GPU and path ("time.host_s"): the catalogue ships them.
    """

    title: str
    text: str
    rows: tuple[ErrorRow, ...]
    targets: tuple[Target, ...] = ()
    plots: tuple[Plot, ...] = ()
    constants: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
