import asyncio

import pytest

from tests.engines.vllm_peer import VllmPeer, connected, engine_of
from throttllem.engines.base import EngineError, ParsedRequest


def counted(peer, *asks, **options):
    async def run():
        async with engine_of(peer, **options) as engine:
            await engine.connect()
            peer.asked.clear()
            return [await engine.count(ask) for ask in asks]

    return [(count.tokens, count.by, count.exact) for count in asyncio.run(run())]


def ask(*prompts, **body):
    return ParsedRequest(path="/v1/completions", model="tiny", body=body, prompts=prompts)


def test_the_engine_counts_and_is_asked_once():
    peer = VllmPeer()
    assert counted(peer, ask("a b c"), ask("a b c"), ask("a b c", "d"), ask((1, 2, 3, 4, 5))) == [
        (3, "the engine", True),
        (3, "the engine", True),
        (2, "the engine", True),
        (5, "its token ids", True),
    ]
    assert peer.asked == [{"model": "tiny", "prompt": "a b c"}, {"model": "tiny", "prompt": "d"}]


def test_a_chat_is_counted_with_what_shapes_its_prompt():
    peer = VllmPeer()
    body = {"messages": [{"role": "user", "content": "a b"}], "tools": [], "temperature": 1, "add_special_tokens": True}
    chat = ParsedRequest(path="/v1/chat/completions", model="tiny", body=body, messages=True)
    assert counted(peer, chat) == [(2, "the engine", True)]
    (asked,) = peer.asked
    assert asked == {"model": "tiny"} | {name: body[name] for name in ("messages", "tools", "add_special_tokens")}


def test_what_the_engine_would_refuse_is_estimated_and_goes_on():
    assert counted(VllmPeer(), ask("refused")) == [(2, "an estimate of 4 bytes per token", False)]


def make_tokenizer(path):
    from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: PLC0415

    tokenizer = Tokenizer(models.WordLevel({"x": 0}, unk_token="x"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(path))
    return path


def test_a_tokenizer_file_that_agrees_saves_the_question(tmp_path):
    peer = VllmPeer()
    path = make_tokenizer(tmp_path / "tokenizer.json")
    assert counted(peer, ask("a b c"), ask("word " * 10_000), tokenizer=path) == [
        (3, str(path), True),
        (10_000, str(path), True),
    ]
    assert peer.asked == []


def test_a_tokenizer_file_that_counts_otherwise_is_not_believed(tmp_path):
    from tokenizers import Tokenizer, models  # noqa: PLC0415

    path = tmp_path / "tokenizer.json"
    Tokenizer(models.WordLevel({"x": 0}, unk_token="x")).save(str(path))
    peer = VllmPeer()
    assert counted(peer, ask("a b c"), tokenizer=path) == [(3, "the engine", True)]
    assert [note for note in connected(peer, tokenizer=path).notes if "does not count as the engine does" in note]


def test_kin_count_by_the_file(tmp_path):
    peer = VllmPeer()
    peer.tokenize = False
    path = make_tokenizer(tmp_path / "tokenizer.json")
    parts = [{"type": "text", "text": "c d"}, {"type": "image_url", "image_url": {}}]
    messages = [{"role": "user", "content": "a b"}, {"role": "user", "content": parts}, {"role": "x", "content": None}]
    chat = ParsedRequest(path="/v1/chat/completions", model="tiny", body={"messages": messages}, messages=True)
    assert counted(peer, ask("a b c"), chat, tokenizer=path) == [(3, str(path), True), (4, str(path), False)]


def test_a_file_that_is_no_tokenizer_is_said(tmp_path):
    with pytest.raises(EngineError, match=r"no such file"):
        connected(VllmPeer(), tokenizer=tmp_path / "absent.json")
