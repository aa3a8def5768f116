"""OpenAI's Responses and Anthropic's Messages on a real vLLM, by the official clients through the gateway."""

import asyncio
import re
from contextlib import asynccontextmanager

import aiohttp
import anthropic
import openai
import pytest

from tests.real.vllm import ENVIRONMENT
from tools.testbed.engines.vllm import MODEL, vllm
from tools.testbed.gateway import gateway

pytestmark = pytest.mark.real
CHAT = [{"role": "user", "content": "def main():"}]
SYSTEM = "Answer in Python."
OWN = {"throttllem": {"metrics": True}}
TOOL = {"name": "look", "description": "Looks", "parameters": {"type": "object", "properties": {}}}
SLO = {"x-slo-e2e-ms": "60000", "x-slo-ttft-ms": "60000"}


@pytest.fixture(scope="module")
def engine(model, tmp_path_factory):
    environment = {"VLLM_ENABLE_RESPONSES_API_STORE": "1"}
    folder = tmp_path_factory.mktemp("vllm")
    with vllm(ENVIRONMENT, folder, model=model, environment=environment, report=print) as server:
        yield server


@pytest.fixture(scope="module")
def through(engine, tmp_path_factory):
    with gateway(("--engine", engine.url), tmp_path_factory.mktemp("gateway")) as up:
        yield up.url


@asynccontextmanager
async def clients(url):
    async with (
        openai.AsyncOpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as responses,
        anthropic.AsyncAnthropic(base_url=url, api_key="none", max_retries=0) as messages,
    ):
        yield responses.responses, messages.messages


def used(url, use):
    """What `use` returns, and by how much the gateway's counters rose meanwhile."""

    async def main():
        async with aiohttp.ClientSession() as session, clients(url) as both:

            async def counters():
                async with session.get(url + "/metrics") as response:
                    found = re.findall(r"^throttllem_(\w+)(?:\{[^}]*\})? (\S+)$", await response.text(), re.M)
                return {name: float(value) for name, value in found}

            before = await counters()
            result = await use(*both)
            after = await counters()
        return result, {name: value - before.get(name, 0.0) for name, value in after.items()}

    return asyncio.run(main())


def test_responses_are_counted_as_vllm_counts_them(through):
    request = {"model": MODEL, "input": CHAT, "instructions": SYSTEM, "max_output_tokens": 20, "extra_headers": SLO}

    async def use(responses, _):
        whole = await responses.create(**request, extra_body=OWN)
        tools = [{"type": "function", "strict": False, **TOOL}]
        stream = await responses.create(**request, tools=tools, tool_choice="none", stream=True, extra_body=OWN)
        return whole, [event async for event in stream]

    (whole, events), rise = used(through, use)
    last = events[-1]
    assert last.type in ("response.completed", "response.incomplete")
    assert {"response.created", "response.output_text.delta"} <= {event.type for event in events}
    assert whole.metrics["output_tokens"] == whole.usage.output_tokens
    assert last.metrics["output_tokens"] == last.response.usage.output_tokens
    assert rise["prompt_tokens_total"] == whole.usage.input_tokens + last.response.usage.input_tokens
    assert rise["uncontrolled_requests_total"] == 0


def test_a_stored_response_is_continued_and_read(through):
    async def use(responses, _):
        first = await responses.create(model=MODEL, input="def main():", max_output_tokens=8, store=True)
        stream = await responses.create(
            model=MODEL, input="return", max_output_tokens=8, previous_response_id=first.id, stream=True
        )
        *_, last = [event async for event in stream]
        read = await responses.retrieve(first.id)
        with pytest.raises(openai.NotFoundError):
            await responses.retrieve("resp_none")
        return first, last, read

    (first, last, read), rise = used(through, use)
    assert read.id == first.id and read.output_text == first.output_text
    assert rise["prompt_tokens_total"] == first.usage.input_tokens + last.response.usage.input_tokens
    assert rise["uncontrolled_requests_total"] == 2


def test_messages_are_counted_as_vllm_counts_them(through):
    request = {"model": MODEL, "messages": CHAT, "system": SYSTEM, "max_tokens": 20, "extra_headers": SLO}

    async def use(_, messages):
        whole = await messages.create(**request, extra_body=OWN)
        tools = [{"name": "look", "description": "Looks", "input_schema": TOOL["parameters"]}]
        async with messages.stream(**request, tools=tools, tool_choice={"type": "none"}) as stream:
            streamed = await stream.get_final_message()
        return whole, streamed, await messages.count_tokens(model=MODEL, messages=CHAT, system=SYSTEM)

    (whole, streamed, counted), rise = used(through, use)
    assert whole.metrics["output_tokens"] == whole.usage.output_tokens
    assert whole.usage.input_tokens == counted.input_tokens
    assert streamed.content[0].text and streamed.stop_reason in ("max_tokens", "end_turn")
    assert rise["prompt_tokens_total"] == whole.usage.input_tokens + streamed.usage.input_tokens
    assert rise["generated_tokens_total"] == whole.usage.output_tokens + streamed.usage.output_tokens
    assert rise["uncontrolled_requests_total"] == 1


def test_errors_of_engine_and_gateway_have_the_shape_of_their_api(through):
    async def use(responses, messages):
        for fields in ({"model": "none"}, {"max_output_tokens": 0}, {"temperature": 99}, {"input": "x " * 9000}):
            with pytest.raises(openai.APIStatusError) as caught:
                await responses.create(**{"model": MODEL, "input": "x"} | fields)
            assert caught.value.status_code == (404 if "model" in fields else 400), fields
            assert caught.value.body["message"]
        for fields in ({"model": "none"}, {"max_tokens": 0}, {"extra_headers": {"x-slo-ttft-ms": "soon"}}):
            with pytest.raises(anthropic.APIStatusError) as caught:
                await messages.create(**{"model": MODEL, "max_tokens": 2, "messages": CHAT} | fields)
            body = caught.value.body
            assert body["type"] == "error" and body["error"]["type"].endswith("_error") and body["error"]["message"]

    used(through, use)
