"""After the rehearsal no decision compiles, or loads, a loop any more: requests do not wait for a compiler."""

import subprocess
import sys
from pathlib import Path

from core.toy import SPEC, handle, request, table

from throttllem.core.clocks.policy import ClockPolicy, ThrottleOptions
from throttllem.core.compiled import Compiled
from throttllem.core.controller import Controller
from throttllem.core.options import ControllerOptions
from throttllem.core.types import Arrived, EngineReady, Slo, Stepped
from throttllem.gateway.rehearsal import rehearse

ROOT = Path(__file__).parents[2]


def options(policy):
    throttle = ThrottleOptions(policy=policy)
    return ControllerOptions(throttle=throttle, specs={1: SPEC}, tables={1: table(SPEC)}, load_window_s=2.0)


def machine_code():
    """How many kinds of arguments each of the core's loops was compiled, or loaded, for."""
    named = [(name, module) for name, module in sys.modules.items() if name.startswith("throttllem.core")]
    loops = {f"{name}.{key}": it for name, module in named for key, it in vars(module).items()}
    return {name: len(it.machine().signatures) for name, it in loops.items() if isinstance(it, Compiled)}


def serve(policy):
    """Some seconds with every kind of request: loose, tight, late, several sequences, many at once, none running."""
    controller, now_s = Controller(options(policy)), 5.0
    handle(controller, EngineReady(engine=0, spec=SPEC), now_s)
    slos = [Slo(), Slo(e2e_s=0.1), Slo(e2e_s=1.5, ttft_s=0.3), Slo(tbt_s=0.02), Slo(e2e_s=3.0, tbt_s=0.5)]
    for index in range(40):
        new = request(index, 10, 12, arrival_s=now_s, slo=slos[index % 5], sequences=2 if index % 7 == 6 else 1)
        handle(controller, Arrived(request=new), now_s)
        now_s += 0.1 if index % 3 else 0.0
        handle(controller, Stepped(engine=0, iteration=index, started=(index,)), now_s)
        if index > 4:
            handle(controller, Stepped(engine=0, iteration=index, finished=(index - 4,)), now_s)
    return controller.snapshot().counts


def test_no_loop_is_compiled_after_the_rehearsal():
    ran = subprocess.run([sys.executable, "-m", "gateway.test_rehearsal"], cwd=ROOT / "tests", check=False)
    assert ran.returncode == 0


if __name__ == "__main__":
    rehearse(options(ClockPolicy.LEAST_ENERGY))
    before = machine_code()
    for each in (ClockPolicy.LEAST_ENERGY, ClockPolicy.THROTTLLEM):
        assert serve(each).arrived == 40
    late = {name: count for name, count in machine_code().items() if count != before[name]}
    assert before and not late, late
