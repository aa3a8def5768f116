import json

from hypothesis import given
from hypothesis import strategies as st

from throttllem.openai_api.responses import DONE, AnswerWriter, Usage, escaped, model_list


def writer(chat):
    return AnswerWriter(chat=chat, name='x"1', model="mé", created_s=7)


def parsed(data):
    assert data.endswith(b"\n\n")
    return [json.loads(line[6:]) for line in data.split(b"\n\n")[:-1] if line != b"data: [DONE]"]


@given(st.lists(st.text(), min_size=1, max_size=3))
def test_chunks_carry_any_text(texts):
    pieces = list(map(escaped, texts))
    for text, chunk in zip(texts, parsed(writer(chat=False).chunks(pieces)), strict=True):
        assert chunk == {
            "id": 'cmpl-x"1',
            "object": "text_completion",
            "created": 7,
            "model": "mé",
            "choices": [{"index": 0, "text": text, "logprobs": None, "finish_reason": None}],
        }
    for text, chunk in zip(texts, parsed(writer(chat=True).chunks(pieces)), strict=True):
        assert (chunk["id"], chunk["object"]) == ('chatcmpl-x"1', "chat.completion.chunk")
        assert chunk["choices"] == [{"index": 0, "delta": {"content": text}, "logprobs": None, "finish_reason": None}]


def test_what_utf_8_cannot_hold_becomes_a_question_mark():
    assert escaped("a\ud800\n") == b"a?\\n"


def test_the_first_and_last_chunks():
    assert writer(chat=False).opening() == b""
    (role,) = parsed(writer(chat=True).opening())
    assert role["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    (closing,) = parsed(writer(chat=True).closing("stop"))
    assert closing["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}]
    (closing,) = parsed(writer(chat=False).closing("stop"))
    assert closing["choices"] == [{"index": 0, "text": "", "logprobs": None, "finish_reason": "stop"}]
    (last,) = parsed(writer(chat=True).last(escaped("é"), "length"))
    assert last["choices"] == [{"index": 0, "delta": {"content": "é"}, "logprobs": None, "finish_reason": "length"}]
    assert writer(chat=True).end(None) == DONE
    (usage,) = parsed(writer(chat=False).end(Usage(prompt_tokens=3, completion_tokens=4)))
    assert usage["choices"] == []
    assert usage["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}


@given(st.text(), st.booleans())
def test_answers_in_one_piece(text, chat):
    usage = Usage(prompt_tokens=1, completion_tokens=2)
    found = json.loads(writer(chat).whole(escaped(text), "stop", usage))
    choice = found["choices"][0]
    assert (choice["message"]["content"] if chat else choice["text"]) == text
    assert found["object"] == ("chat.completion" if chat else "text_completion")
    assert found["usage"]["total_tokens"] == 3


def test_models():
    found = json.loads(model_list(["a", "b"], 5, max_model_len=9))
    assert [model["id"] for model in found["data"]] == ["a", "b"]
    assert found["data"][0] == {
        "id": "a",
        "object": "model",
        "created": 5,
        "owned_by": "throttllem",
        "max_model_len": 9,
    }
