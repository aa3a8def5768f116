"""What a user says of an engine elsewhere reaches the engine, every word of it."""

from dataclasses import fields
from unittest import mock

import pytest
from core.toy import spec

from throttllem.engines.remote import Remote
from throttllem.engines.triton.facts import Given

SAID = {
    "url": "http://127.0.0.1:1",
    "served_as": "mine",
    "stats": "/tmp/steps",
    "tokenizer": None,
    "metrics_url": "http://127.0.0.1:2",
    "api_key": "key",
    "max_batch": 3,
    "max_context_tokens": 5,
    "kv_blocks": 7,
    "block_tokens": 11,
    "scrape_s": 0.25,
}
NUMBERS = {name: SAID[name] for name in ("max_batch", "max_context_tokens", "kv_blocks", "block_tokens")}


def test_these_are_all_words():
    assert SAID.keys() | {"kind"} == {item.name for item in fields(Remote)}


@pytest.mark.parametrize("home", [False, True])
def test_vllm_hears_all_that_concerns_it(home, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "t.json" if home else None
    said = SAID | {"tokenizer": type(tmp_path)("~/t.json") if home else None}
    with mock.patch("throttllem.engines.remote.OpenaiEngine") as made:
        Remote(kind="openai", **said).engine(spec(tp=2))
    heard = {name: said[name] for name in ("url", "stats", "api_key", "scrape_s")} | NUMBERS | {"tokenizer": file}
    known = spec(tp=2)
    facts = {"gpu": "toy", "model": "toy", "tp": 2, "clocks_mhz": known.clocks_mhz, "idle_w": known.idle_w}
    assert made.call_args == mock.call(**heard, **facts)


def test_triton_hears_all_that_concerns_it():
    with mock.patch("throttllem.engines.remote.TritonEngine") as made:
        Remote(kind="triton", **SAID).engine(spec())
    assert made.call_args == mock.call(
        SAID["url"],
        spec(),
        model="mine",
        given=Given(**NUMBERS),
        tokenizer=None,
        metrics_url=SAID["metrics_url"],
        api_key="key",
    )
