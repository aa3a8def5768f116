"""The chat that a request of Responses or Messages stands for."""

import pytest

from throttllem.openai_api.conversations import chat_of_message, chat_of_response, texts_in

CALL = {"id": "c", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
RESULT = {"role": "tool", "tool_call_id": "c", "content": "2"}


def test_a_response_is_its_instructions_and_its_input():
    assert chat_of_response({"input": "hi"}) == {"messages": [{"role": "user", "content": "hi"}]}
    given = [
        {"role": "user", "content": [{"type": "input_text", "text": "add "}, {"type": "input_text", "text": "it"}]},
        {"type": "function_call", "call_id": "c", "name": "add", "arguments": '{"a": 1}'},
        {"type": "function_call_output", "call_id": "c", "output": "2"},
    ]
    tool = {"type": "function", "name": "add", "parameters": {"type": "object"}}
    assert chat_of_response({"instructions": "be brief", "input": given, "tools": [tool]}) == {
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "add it"},
            {"role": "assistant", "tool_calls": [CALL]},
            RESULT,
        ],
        "tools": [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}],
    }


def test_a_message_is_its_system_prompt_and_its_blocks():
    messages = [
        {"role": "user", "content": "add it"},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": "add", "input": {"a": 1}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": "2"}]},
    ]
    found = chat_of_message({"system": [{"type": "text", "text": "be brief"}], "messages": messages})
    assert found == {
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "add it"},
            {"role": "assistant", "tool_calls": [CALL]},
            RESULT,
        ]
    }


@pytest.mark.parametrize(
    "fields",
    [
        {"input": "hi", "previous_response_id": "resp_1"},
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "data:"}]}]},
        {"input": [{"type": "item_reference", "id": "m"}]},
        {"input": [3]},
        {"input": None},
        {"input": "hi", "tools": [{"type": "web_search"}]},
    ],
)
def test_what_a_response_does_not_show_has_no_chat(fields):
    assert chat_of_response(fields) is None


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"messages": []},
        {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
        {"messages": [{"role": "user"}]},
        {"messages": "hi"},
        {"messages": [{"role": "user", "content": "hi"}], "system": 3},
        {"messages": [{"role": "user", "content": "hi"}], "tools": [{"name": "add"}]},
    ],
)
def test_what_no_chat_has_has_no_chat(fields):
    assert chat_of_message(fields) is None


def test_an_estimate_reads_every_text():
    assert texts_in("a") == ["a"] and texts_in(None) == [] and texts_in([3, {"image": "x"}]) == []
    assert texts_in([{"content": [{"text": "a"}, {"content": "b"}]}, {"content": "c"}]) == ["a", "b", "c"]
