import sys

import pytest

from throttllem.engines.base import EngineError
from throttllem.engines.tokenizer_file import TokenizerFile


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
    tokenizer.load()
    assert tokenizer.exact
    assert (tokenizer.count("a b c"), tokenizer.count("a b c", special=False)) == (4, 3)
    assert tokenizer.count("", special=False) == 1


def test_without_one_four_bytes_are_a_token():
    tokenizer = TokenizerFile(None)
    tokenizer.load()
    assert not tokenizer.exact
    assert [tokenizer.count(text) for text in ("", "abcd", "abcde", "éé\ud800")] == [1, 1, 2, 2]


def test_a_file_that_cannot_be_used_is_named(tmp_path, monkeypatch):
    with pytest.raises(EngineError, match="no such file"):
        TokenizerFile(tmp_path / "tokenizer.json").load()
    broken = tmp_path / "broken.json"
    broken.write_text("{}")
    with pytest.raises(EngineError, match=r"broken\.json: no tokenizer\.json"):
        TokenizerFile(broken).load()
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(EngineError, match=r"pip install throttllem\[tokenizers\]"):
        TokenizerFile(broken).load()
