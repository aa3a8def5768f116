"""Streams that report no counts, from a real vLLM that speculates: as many tokens are booked as it gave."""

import asyncio

import pytest

from tests.engines.upstreams import eventually
from tests.gateway.peer import whole
from tests.real.vllm import started
from throttllem.engines.capacity import metrics_page, total
from throttllem.engines.http import Upstream
from tools.evaluation.speculation import SPECULATES

pytestmark = pytest.mark.real
TOKENS = 200


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    with started(model, tmp_path_factory.mktemp("vllm"), flags=SPECULATES) as pair:
        yield pair


@pytest.mark.parametrize("plug_in", [True, False], ids=["plugin", "scrapes"])
def test_as_many_tokens_are_booked_as_the_engine_gave(tmp_path, server, plug_in):
    there, address = server
    settings = [f"engines.0.stats={address}"] if plug_in else []

    async def own(gateway):
        _, page = await gateway.client.get("/metrics")
        return total(page.encode(), "throttllem_generated_tokens_total")

    async def run():
        engine = Upstream(there.url)
        async with whole(tmp_path, *settings, url=there.url) as gateway:
            await gateway.up()
            if plug_in:
                await eventually(lambda: gateway.backend.engine.steps is not None)
            given = {
                "tokens": TOKENS,
                "stream": True,
                "ignore_eos": True,
                "temperature": 0,
                "prompt": "def f(x):\n" * 8,
            }
            assert (await gateway.client.ask(**given)).served  # the rate is learned
            before = await metrics_page(engine), await own(gateway)
            answers = await asyncio.gather(*(gateway.client.ask(**given) for _ in range(4)))
            assert all(answer.served for answer in answers)
            after = await metrics_page(engine), await own(gateway)
        await engine.close()
        names = ("vllm:generation_tokens_total", "vllm:spec_decode_num_accepted_tokens_total")
        rises = [total(after[0], name) - total(before[0], name) for name in names]
        return rises, after[1] - before[1]

    (generated, accepted), booked = asyncio.run(asyncio.wait_for(run(), 120))
    assert generated == 4 * TOKENS
    assert accepted > generated / 4, "it hardly speculated: nothing was tested"
    assert booked == pytest.approx(generated, rel=0.01 if plug_in else 0.05)
