"""Common clients, unmodified, against the gateway."""

import asyncio

import anthropic
import httpx
import openai
import pytest

from tests.gateway.fakes import running
from throttllem.config import LimitOptions, ServerOptions
from throttllem.openai_api.errors import ApiError

MESSAGES = [{"role": "user", "content": "x"}]


def result_of(use, **options):
    async def main():
        async with (
            running(server=ServerOptions(api_keys=("k",)), **options) as there,
            openai.AsyncOpenAI(base_url=there.url + "/v1", api_key="k", max_retries=0) as client,
        ):
            return await use(client, there)

    return asyncio.run(main())


def test_openai_chat_streamed_with_metrics():
    async def use(client, there):
        stream = await client.chat.completions.create(
            model="tiny", messages=MESSAGES, stream=True, max_tokens=4, extra_body={"throttllem": {"metrics": True}},
            stream_options={"include_usage": True},
        )  # fmt: skip
        return [chunk async for chunk in stream], there.session

    chunks, session = result_of(use)
    assert "".join(chunk.choices[0].delta.content for chunk in chunks[:-1]) == "w0 w1 w2 w3 "
    assert chunks[-1].usage.completion_tokens == 4 and chunks[-1].metrics["clock_mhz"] == 1410
    assert (session.counted, session.finished) == (4, 4)


def test_openai_chat_that_reasons_and_calls_a_tool():
    async def use(client, there):
        stream = await client.chat.completions.create(
            model="tiny", messages=MESSAGES, stream=True, stream_options={"include_usage": True},
            tools=[{"type": "function", "function": {"name": "look"}}], extra_body={"play": "agent"},
        )  # fmt: skip
        return [chunk async for chunk in stream], there.session

    chunks, session = result_of(use)
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    calls = [delta.tool_calls[0].function for delta in deltas if delta.tool_calls]
    assert "".join(getattr(delta, "reasoning_content", "") for delta in deltas) == "hmso"
    assert (calls[0].name, "".join(call.arguments for call in calls)) == ("look", '{"at": "data: [DONE]"}')
    assert (session.counted, session.finished, chunks[-1].usage.completion_tokens) == (11, 11, 11)


def test_openai_other_requests():
    async def use(client, there):
        chat = await client.chat.completions.create(model="tiny", messages=MESSAGES, max_completion_tokens=3)
        text = await client.completions.create(model="tiny", prompt="x", max_tokens=3)
        stream = await client.completions.create(model="tiny", prompt="x", max_tokens=3, stream=True)
        words = [chunk.choices[0].text async for chunk in stream]
        models = [model.id async for model in client.models.list()]
        return chat.choices[0].message.content, text.choices[0].text, words, models

    assert result_of(use) == ("w w w ", "w w w ", ["w0 ", "w1 ", "w2 "], ["tiny", "org/other"])


def test_openai_reads_every_error():
    async def use(client, there):
        async def error_of(**fields):
            with pytest.raises(openai.APIError) as caught:
                stream = await client.chat.completions.create(**({"model": "tiny", "messages": MESSAGES} | fields))
                async for _ in stream:
                    pass
            return type(caught.value), caught.value.code

        seen = [
            await error_of(max_tokens=-1),
            await error_of(model="none"),
            await error_of(stream=True, extra_body={"play": "break-off"}),
        ]
        there.models.reject = ApiError(429, "full", kind="rate_limit_error", code="queue_full", retry_after_s=1)
        seen.append(await error_of())
        client.api_key = "wrong"
        seen.append(await error_of())
        return seen

    assert result_of(use) == [
        (openai.BadRequestError, None),
        (openai.NotFoundError, "model_not_found"),
        (openai.APIError, "engine_error"),
        (openai.RateLimitError, "queue_full"),
        (openai.AuthenticationError, "invalid_api_key"),
    ]


def test_httpx_sends_a_body_that_is_too_large_and_reads_why():
    async def use(client, there):
        async with httpx.AsyncClient() as http:
            headers = {"authorization": "Bearer k"}
            large = await http.post(there.url + "/v1/completions", content=b"x" * 3_000_000, headers=headers)
            again = await http.get(there.url + "/v1/models", headers=headers)
        return large.status_code, large.json()["error"]["code"], again.status_code

    assert result_of(use, limits=LimitOptions(body_bytes=2048)) == (413, "body_too_large", 200)


# ---- conversations in other shapes --------------------------------------------------------------------------------


def test_openai_responses():
    async def use(client, there):
        whole = await client.responses.create(model="tiny", input="x", max_output_tokens=4)
        booked = [there.models.sessions[0].finished]
        stream = await client.responses.create(
            model="tiny", input=MESSAGES, max_output_tokens=5, stream=True, extra_body={"throttllem": {"metrics": True}}
        )
        events = [event async for event in stream]
        return whole.output_text, events, [*booked, there.models.sessions[1].counted, there.models.sessions[1].finished]

    text, events, booked = result_of(use)
    assert text == "w w w w " and booked == [4, 5, 5]
    assert [event.type for event in events[:2]] == ["response.created", "response.output_text.delta"]
    assert events[-1].type == "response.completed" and events[-1].metrics["clock_mhz"] == 1410


def test_openai_responses_errors():
    async def use(client, there):
        async def error_of(**fields):
            with pytest.raises(openai.APIError) as caught:
                async for _ in await client.responses.create(model="tiny", input="x", stream=True, **fields):
                    pass
            return type(caught.value), caught.value.code

        return [
            await error_of(background=True),
            await error_of(extra_body={"play": "break-off"}),
            await error_of(extra_headers={"x-slo-ttft-ms": "soon"}),
        ]

    assert result_of(use) == [
        (openai.BadRequestError, None),
        (openai.APIError, "engine_error"),
        (openai.BadRequestError, None),
    ]


def through_anthropic(use, key="k"):
    async def main():
        async with (
            running(server=ServerOptions(api_keys=("k",))) as there,
            anthropic.AsyncAnthropic(base_url=there.url, api_key=key, max_retries=0) as client,
        ):
            return await use(client, there)

    return asyncio.run(main())


def test_anthropic_messages():
    async def use(client, there):
        whole = await client.messages.create(model="tiny", max_tokens=3, messages=MESSAGES)
        booked = [there.models.sessions[0].finished]
        async with client.messages.stream(model="tiny", max_tokens=4, messages=MESSAGES, system="be brief") as stream:
            streamed = await stream.get_final_message()
        booked += [there.models.sessions[1].counted, there.models.sessions[1].finished]
        sent = [headers for method, path, headers, _ in there.engine.seen if path == "/v1/messages"]
        return whole, streamed, booked, sent

    whole, streamed, booked, sent = through_anthropic(use)
    assert whole.content[0].text == "w w w " and streamed.content[0].text == "w0 w1 w2 w3 "
    assert streamed.usage.output_tokens == 4 and booked == [3, 4, 4]
    assert len(sent) == 2 and not any("x-api-key" in headers for headers in sent)


def test_anthropic_reads_every_error():
    async def use(client, there):
        async def error_of(**fields):
            with pytest.raises(anthropic.APIError) as caught:
                request = {"model": "tiny", "max_tokens": 3, "messages": MESSAGES, "stream": True} | fields
                async for _ in await client.messages.create(**request):
                    pass
            return type(caught.value), caught.value.body["error"]["type"]

        seen = [
            await error_of(max_tokens=-1),
            await error_of(model="none"),
            await error_of(extra_body={"play": "break-off"}),
        ]
        there.models.reject = ApiError(429, "full", kind="rate_limit_error", code="queue_full", retry_after_s=1)
        seen.append(await error_of())
        client.api_key = "wrong"
        return [*seen, await error_of()]

    assert through_anthropic(use) == [
        (anthropic.BadRequestError, "invalid_request_error"),
        (anthropic.NotFoundError, "not_found_error"),
        (anthropic.APIStatusError, "api_error"),
        (anthropic.RateLimitError, "rate_limit_error"),
        (anthropic.AuthenticationError, "authentication_error"),
    ]
