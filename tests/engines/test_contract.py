"""The contract of live engines, over the simulated one."""

import asyncio

import pytest

from engines.contract import CHECKS, Subject, name_of
from engines.live import engine


@pytest.mark.parametrize("check", CHECKS, ids=name_of)
def test_the_simulated_engine(check):
    async def run():
        subject = engine()
        await asyncio.wait_for(check(Subject(engine=subject, kill=subject.close)), 20)

    asyncio.run(run())
