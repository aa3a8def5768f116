import asyncio
import json
import sys

import pytest

from tests.engines.vllm_peer import VllmPeer, connected, engine_of
from throttllem.engines import tokens
from throttllem.engines.base import EngineError
from throttllem.engines.tokens import TokenizerFile, _written
from throttllem.openai_api.large_bodies import LARGE_BYTES
from throttllem.openai_api.requests import CHAT, COMPLETIONS, Api, ParsedRequest, parse_request


def counted(peer, *requests, **options):
    async def run():
        async with engine_of(peer, **options) as engine:
            await engine.connect()
            peer.asked.clear()
            return [await engine.count(request) for request in requests]

    return [(count.tokens, count.by, count.exact) for count in asyncio.run(run())]


def completion(*prompts, **fields):
    return ParsedRequest(api=Api.COMPLETIONS, path=COMPLETIONS, model="tiny", fields=fields, body=b"", prompts=prompts)


def chat_of(fields):
    return ParsedRequest(api=Api.CHAT, path=CHAT, model="tiny", fields=fields, body=b"", chat=fields)


def test_a_lone_surrogate_goes_to_the_engine_as_an_escape():
    assert json.loads(_written({"prompt": "\ud800"})) == {"prompt": "\ud800"}
    assert b"\\ud800" in _written({"prompt": "\ud800"})


def test_the_engine_counts_each_prompt_once():
    peer = VllmPeer()
    assert counted(
        peer, completion("a b c"), completion("a b c"), completion("a b c", "d"), completion((1, 2, 3, 4, 5))
    ) == [
        (3, "the engine", True),
        (3, "the engine", True),
        (2, "the engine", True),
        (5, "its token ids", True),
    ]
    assert peer.asked == [{"model": "tiny", "prompt": "a b c"}, {"model": "tiny", "prompt": "d"}]


def test_a_chat_is_counted_with_what_shapes_its_prompt():
    peer = VllmPeer()
    body = {"messages": [{"role": "user", "content": "a b"}], "tools": [], "temperature": 1, "add_special_tokens": True}
    chat = chat_of(body)
    assert counted(peer, chat) == [(2, "the engine", True)]
    (asked,) = peer.asked
    assert asked == {"model": "tiny"} | {name: body[name] for name in ("messages", "tools", "add_special_tokens")}


def test_what_the_engine_would_refuse_is_estimated():
    assert counted(VllmPeer(), completion("refused")) == [(2, "an estimate of 4 bytes per token", False)]


def make_tokenizer(path):
    from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: PLC0415

    tokenizer = Tokenizer(models.WordLevel({"x": 0}, unk_token="x"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(path))
    return path


def test_a_tokenizer_file_that_agrees_saves_the_request(tmp_path):
    peer = VllmPeer()
    path = make_tokenizer(tmp_path / "tokenizer.json")
    assert counted(peer, completion("a b c"), completion("word " * 10_000), tokenizer=path) == [
        (3, str(path), True),
        (10_000, str(path), True),
    ]
    assert peer.asked == []


def test_a_tokenizer_file_that_counts_otherwise_is_not_used(tmp_path):
    from tokenizers import Tokenizer, models  # noqa: PLC0415

    path = tmp_path / "tokenizer.json"
    Tokenizer(models.WordLevel({"x": 0}, unk_token="x")).save(str(path))
    peer = VllmPeer()
    assert counted(peer, completion("a b c"), tokenizer=path) == [(3, "the engine", True)]
    assert [note for note in connected(peer, tokenizer=path).notes if "does not count as the engine does" in note]


def test_engines_without_tokenize_count_by_the_file(tmp_path):
    peer = VllmPeer()
    peer.tokenize = False
    path = make_tokenizer(tmp_path / "tokenizer.json")
    parts = [{"type": "text", "text": "c d"}, {"type": "image_url", "image_url": {}}]
    messages = [{"role": "user", "content": "a b"}, {"role": "user", "content": parts}, {"role": "x", "content": None}]
    chat = chat_of({"messages": messages})
    assert counted(peer, completion("a b c"), chat, tokenizer=path) == [(3, str(path), True), (4, str(path), False)]


def test_a_missing_tokenizer_is_an_error(tmp_path):
    with pytest.raises(EngineError, match=r"no such file"):
        connected(VllmPeer(), tokenizer=tmp_path / "absent.json")


def large(text, **fields):
    return parse_request(COMPLETIONS, json.dumps({"model": "tiny", "prompt": text, **fields}).encode())


def test_a_large_prompt_is_counted_from_its_bytes():
    peer = VllmPeer()
    peer.models = [{"id": "tiny", "max_model_len": 1_000_000}]
    text = 'a "b" \n' * 20_000
    chat = {"model": "tiny", "messages": [{"role": "user", "content": text}]}
    asked = [large(text), parse_request(CHAT, json.dumps(chat).encode())]
    assert counted(peer, *asked) == [(len(text.split()), "the engine", True)] * 2
    assert [body.get("prompt", body.get("messages")) for body in peer.asked] == [text, chat["messages"]]


def test_a_prompt_far_over_the_context_is_not_counted():
    peer = VllmPeer()
    assert counted(peer, large("a" * 400_000)) == [(100_008, "an estimate of 4 bytes per token", False)]
    assert peer.asked == []


def test_pictures_are_no_text():
    peer = VllmPeer()
    parts = [{"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 400_000}}]
    chat = {"model": "tiny", "messages": [{"role": "user", "content": parts}]}
    assert counted(peer, parse_request(CHAT, json.dumps(chat).encode()))[0][1:] == ("the engine", True)


class Searched:
    """A pattern that keeps how many bytes each search was over: one call holds the interpreter's lock."""

    def __init__(self, pattern):
        self.pattern, self.longest = pattern, 0

    def search(self, body, start=0, end=sys.maxsize):
        self.longest = max(self.longest, min(end, len(body)) - start)
        return self.pattern.search(body, start, end)

    def findall(self, body):
        self.longest = max(self.longest, len(body))
        return self.pattern.findall(body)


def test_pictures_in_a_large_chat_are_sought_in_pieces(monkeypatch):
    async def run(cache, tokenize):
        peer = VllmPeer()
        peer.tokenize, peer.cache = tokenize, peer.cache + cache
        peer.models = [{"id": "tiny", "max_model_len": 1_000_000}]
        async with engine_of(peer) as engine:
            await engine.connect()
            return await engine.count(parse_request(CHAT, json.dumps(chat).encode()))

    patterns = [Searched(tokens._PARTS), Searched(tokens._MEDIA)]
    monkeypatch.setattr(tokens, "_PARTS", patterns[0])
    monkeypatch.setattr(tokens, "_MEDIA", patterns[1])
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    chat = {"model": "tiny", "messages": [{"role": "user", "content": [part]}], "other": ["data", "type"] * 20_000}
    chat["later"] = part
    assert asyncio.run(run("", False)).parts == 2
    assert not asyncio.run(run(',enable_prefix_caching="True"', True)).blocks
    assert all(0 < pattern.longest <= LARGE_BYTES + 100 for pattern in patterns)


@pytest.mark.parametrize("shift", range(0, 30, 4))
def test_a_picture_is_found_wherever_the_pieces_end(shift):
    assert tokens._parts_in(b"x" * (LARGE_BYTES - shift) + b'"type" : "image_url"' * 2) == 2


def test_the_blocks_of_prompts_are_known_where_the_engine_caches_them():
    async def run(cache):
        peer = VllmPeer()
        peer.cache += cache
        requests = [completion("a " * 300), completion("a " * 300), completion("a " * 300, cache_salt="x")]
        requests += [completion(tuple(range(300))), chat_of({"messages": [{"role": "user", "content": "a " * 300}]})]
        async with engine_of(peer) as engine:
            return (await engine.connect()).spec.prefix_caching, [(await engine.count(one)).blocks for one in requests]

    there, (one, same, salted, ids, chat) = asyncio.run(run(',enable_prefix_caching="True"'))
    assert there and len(one) == 300 // 128
    assert one == same == ids == chat and not {*one} & {*salted}
    assert asyncio.run(run(',enable_prefix_caching="False"')) == (False, [()] * 5)


def test_the_blocks_of_a_large_prompt_depend_on_its_salt():
    async def run():
        peer = VllmPeer()
        peer.cache += ',enable_prefix_caching="True"'
        peer.models = [{"id": "tiny", "max_model_len": 1_000_000}]
        async with engine_of(peer) as engine:
            await engine.connect()
            asked = [large("a " * 40_000), large("a " * 40_000), large("a " * 40_000, cache_salt="x")]
            return [(await engine.count(one)).blocks for one in asked]

    one, same, salted = asyncio.run(run())
    assert len(one) == 40_000 // 128
    assert one == same and not {*one} & {*salted}


def test_pictures_that_no_endpoint_counts_are_parts():
    async def run():
        peer = VllmPeer()
        peer.tokenize = False
        async with engine_of(peer) as engine:
            await engine.connect()
            return await engine.count(parse_request(CHAT, json.dumps(chat).encode()))

    parts = [{"type": "text", "text": '"type": "image_url"'}, {"type": "image_url", "image_url": {"url": "x"}}] * 2
    chat = {"model": "tiny", "messages": [{"role": "user", "content": parts}]}
    count = asyncio.run(run())
    assert (count.parts, count.exact) == (2, False)


def test_a_large_prompt_that_is_not_counted_in_time_is_estimated(monkeypatch):
    async def run():
        async with engine_of(VllmPeer()) as engine:
            await engine.connect()

            async def post(*_, **__):
                raise EngineError("not in time", status=504)

            monkeypatch.setattr(engine._upstream, "post", post)
            with pytest.raises(EngineError):
                await engine.count(completion("a b"))
            return await engine.count(large("word " * 15_000))

    assert not asyncio.run(run()).exact


# ---- a tokenizer.json --------------------------------------------------------------------------------------------


@pytest.fixture
def words(tmp_path):
    """A tokenizer.json whose tokens are words, with one token set before each text."""
    tokenizers = pytest.importorskip("tokenizers", reason="the package tokenizers is not installed")
    model = tokenizers.models.WordLevel({"[UNK]": 0, "[BOS]": 1, "a": 2}, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[BOS] $A", special_tokens=[("[BOS]", 1)]
    )
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def test_a_tokenizer_counts(words):
    tokenizer = TokenizerFile(words)
    asyncio.run(tokenizer.load())
    assert tokenizer.exact
    assert (tokenizer.tokens("a b c"), tokenizer.tokens("a b c", special=False)) == (4, 3)
    assert tokenizer.tokens("", special=False) == 1


def test_without_one_four_bytes_are_a_token():
    tokenizer = TokenizerFile(None)
    asyncio.run(tokenizer.load())
    assert not tokenizer.exact
    assert [tokenizer.tokens(text) for text in ("", "abcd", "abcde", "éé\ud800")] == [1, 1, 2, 2]


def test_a_file_that_cannot_be_used_is_named(tmp_path, monkeypatch):
    with pytest.raises(EngineError, match="no such file"):
        asyncio.run(TokenizerFile(tmp_path / "tokenizer.json").load())
    broken = tmp_path / "broken.json"
    broken.write_text("{}")
    with pytest.raises(EngineError, match=r"broken\.json: not a tokenizer\.json"):
        asyncio.run(TokenizerFile(broken).load())
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(EngineError, match=r"pip install throttllem\[tokenizers\]"):
        asyncio.run(TokenizerFile(broken).load())
