"""Common clients, unmodified, against the gateway."""

import asyncio

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
