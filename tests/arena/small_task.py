"""A task that a search settles in a second: one engine, a minute of requests in two bursts, and some long answers."""

import numpy as np

from throttllem.arena.schedule import task_of
from throttllem.config import BatchingOptions, Noise
from throttllem.core.types import Request, Slo
from throttllem.engines.simulated.fleet import build_fleet
from throttllem.physics.catalogue import Catalogue

SEED, WINDOW_S = 5, 75.0
SLO = Slo(e2e_s=12.0, tbt_s=0.2, ttft_s=None)


FLEET = build_fleet(Catalogue.load(), "a100-40gb-sxm", "llama-3-8b", (1,), BatchingOptions())
ENGINE = FLEET.specs[1], FLEET.physics[1]
"""Its spec and its physics."""


def small_task(*, slo=SLO, requests=60, seed=SEED, noise=None):
    rng = np.random.default_rng(seed)
    arrival_s = np.sort(np.concatenate([rng.uniform(0, 60, requests // 2), rng.uniform(20, 25, requests // 2)]))
    return task_of(
        *ENGINE,
        [
            Request(id=i, arrival_s=at_s, prompt_tokens=prompt, output_tokens=output, max_tokens=512, slo=slo)
            for i, (at_s, prompt, output) in enumerate(
                zip(
                    arrival_s.tolist(),
                    rng.integers(50, 2000, requests).tolist(),
                    rng.integers(10, 400, requests).tolist(),
                    strict=True,
                )
            )
        ],
        slo=slo,
        window_s=WINDOW_S,
        seed=seed,
        noise=noise or Noise(),
    )
