"""All that a controller knows besides its options, so that another one can continue from it.

The flight recorder begins each file with it. Knows nothing of files, nor of how it is written.
"""

from __future__ import annotations

from dataclasses import dataclass

from throttllem.core.clocks.gathering import Gathering
from throttllem.core.clocks.size_planner import SizePlanner
from throttllem.core.clocks.sizing import Autoscaler
from throttllem.core.clocks.steady_load import LoadEstimator
from throttllem.core.engine_state import EngineState
from throttllem.core.forecast.margins import Margins
from throttllem.core.lengths.prediction import LengthScore
from throttllem.core.pool.planner import PoolPlanner
from throttllem.core.pool.pool import Pool
from throttllem.core.scoreboard import SequenceState
from throttllem.core.snapshot import Counts
from throttllem.core.types import Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class ControllerState:
    """The parts of one controller. They are its own: read them before the controller's next event.

    `serving` are the engines that take new requests, `next_engine` the first unused id, `waiting` the queue in order of
    arrival and `head` why its first waits; `held` are requests that can wait, by `gathering`. `unplanned` engines need
    a plan since `unplanned_since_s`; engines are sized again at `resize_s` (inf: never). What the length predictor
    learned is in the options, with the predictor.
    """

    engines: tuple[EngineState, ...]
    serving: tuple[int, ...]
    next_engine: int
    waiting: tuple[SequenceState, ...]
    head: Verdict | None
    held: tuple[SequenceState, ...]
    gathering: Gathering
    load: LoadEstimator
    autoscaler: Autoscaler | None
    size_planner: SizePlanner | None
    pool: Pool | None
    pool_planner: PoolPlanner | None
    counts: Counts
    lengths: LengthScore
    margins: Margins
    unplanned: tuple[int, ...]
    unplanned_since_s: float
    resize_s: float
