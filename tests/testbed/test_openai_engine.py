"""The small engine: what it streams, and the faults that it is asked for."""

import asyncio

import pytest

from tools.testbed.client import Client
from tools.testbed.engines.openai_engine import MODEL, openai_engine
from tools.testbed.processes import post


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    with openai_engine(tmp_path_factory.mktemp("engine") / "log") as (url, _):
        yield url


def asked(url, count=1, **fields):
    async def run():
        async with Client(url, MODEL) as client:
            return await asyncio.gather(*(client.ask(hang_s=10, **fields) for _ in range(count)))

    return asyncio.run(run())


@pytest.fixture(autouse=True)
def pace(engine):
    post(
        f"{engine}/pace", {"step_s": 0.001, "first_s": 0.001, "together": False, "fail_every": 0, "most": 99, "pad": 0}
    )


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_stream_has_as_many_tokens_as_were_asked_for(engine, together, path):
    post(f"{engine}/pace", {"together": together})
    answers = asked(engine, 3, tokens=5, path=path)
    assert all(answer.served for answer in answers)
    first = 1 if "chat" in path else 0  # the event with the role
    assert [answer.tokens for answer in answers] == [5 + first] * 3


def test_a_whole_answer_counts_its_tokens(engine):
    (answer,) = asked(engine, tokens=5, stream=False)
    assert answer.served and b'"completion_tokens": 5' in answer.body


def test_one_of_many_is_refused_and_one_breaks_off(engine):
    post(f"{engine}/pace", {"fail_every": 4})
    answers = asked(engine, 4, tokens=3)
    assert sum(answer.served for answer in answers) == 2
    assert sum(answer.status == 503 for answer in answers) == 1
    assert sum(answer.broken is not None for answer in answers) == 1


def test_beyond_its_most_it_refuses(engine):
    post(f"{engine}/pace", {"most": 2, "first_s": 0.3})
    statuses = [answer.status for answer in asked(engine, 3, tokens=2)]
    assert sorted(statuses) == [200, 200, 503]
