import json
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given, settings

from tests.fuzz.properties import mutated
from throttllem.engines.triton.chat_template import TemplateError, chat_template, plain, text_messages
from throttllem.openai_api.errors import ApiError

MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


def test_the_plain_template():
    assert plain(MESSAGES) == "system: be brief\nuser: hi\nassistant:"


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert text_messages([{"role": "user", "content": parts}]) == [{"role": "user", "content": "ab"}]


@pytest.mark.parametrize(
    "messages",
    [
        None,
        [],
        "hi",
        ["hi"],
        [{"content": "hi"}],
        [{"role": "user"}],
        [{"role": "user", "content": 3}],
        [{"role": "user", "content": [{"type": "image_url"}]}],
        [{"role": "tool", "content": "hi"}],
        [{"role": "assistant", "content": "", "tool_calls": [{}]}],
    ],
)
def test_what_is_no_text_is_refused(messages):
    with pytest.raises(ApiError, match="messages"):
        text_messages(messages)


def test_the_plain_one_is_taken_where_there_is_no_other(tmp_path):
    assert chat_template(None) == (plain, None)
    assert chat_template(tmp_path / "tokenizer.json") == (plain, None)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    assert chat_template(tmp_path / "tokenizer.json") == (plain, None)


def test_a_broken_configuration_is_named(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(TemplateError, match=r"tokenizer_config\.json"):
        chat_template(tmp_path / "tokenizer.json")


def test_a_template_without_jinja_names_the_package_to_install(tmp_path, monkeypatch):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(TemplateError, match="pip install jinja2"):
        chat_template(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("form", ["text", "named", "file"])
def test_the_models_own_template(tmp_path, form):
    pytest.importorskip("jinja2", reason="jinja2 is not installed")
    template = {"text": TEMPLATE, "named": [{"name": "default", "template": TEMPLATE}], "file": "unused"}[form]
    config = {"bos_token": {"content": "<s>"}, "chat_template": template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    if form == "file":
        (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    render, origin = chat_template(tmp_path / "tokenizer.json")
    assert render(MESSAGES) == "<s><system>be brief<user>hi<a>"
    assert origin == tmp_path / ("chat_template.jinja" if form == "file" else "tokenizer_config.json")


@pytest.mark.parametrize("template", ["{{ raise_exception('no system') }}", "{{ 1/0 }}", "{{ ''.__class__.__mro__ }}"])
def test_a_template_that_fails_is_an_error(tmp_path, template):
    pytest.importorskip("jinja2", reason="jinja2 is not installed")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    with pytest.raises(ApiError, match="chat template"):
        chat_template(tmp_path / "tokenizer.json")[0](MESSAGES)


CONFIG = json.dumps({"chat_template": [{"name": "default", "template": TEMPLATE}], "bos_token": {"content": "<s>"}})
TOKENS = [b"[]", b"{}", b"null", b"7", b"[" * 2000, b"\xff", b"{{", b"{% for", b"}}", b"1e999"]


@settings(max_examples=60, deadline=None)
@given(config=mutated(CONFIG.encode(), b"[]", b'{"chat_template": [7]}', tokens=TOKENS))
@example(config=b"[]")
@example(config=b'{"chat_template": [7]}')
@example(config=b'{"chat_template": [{"name": "default"}]}')
@example(config=b"[" * 100_000)
def test_a_damaged_template_is_read_or_refused_with_its_name(config):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tokenizer_config.json"
        file.write_bytes(config)
        try:
            render, _ = chat_template(Path(folder) / "tokenizer.json")
        except TemplateError as error:
            assert str(file) in str(error)
            return
        try:
            assert isinstance(render(MESSAGES), str)
        except ApiError as error:
            assert error.status == 400


@pytest.mark.parametrize("source", [b"\xff", b"{{ 1/0 }}", b"{{ (" + b"(" * 5000])
def test_a_template_file_that_cannot_be_read_is_named(tmp_path, source):
    (tmp_path / "chat_template.jinja").write_bytes(source)
    try:
        render, _ = chat_template(tmp_path / "tokenizer.json")
    except TemplateError as error:
        assert "chat_template.jinja" in str(error)
    else:
        with pytest.raises(ApiError):
            render(MESSAGES)


@pytest.mark.parametrize("source", ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}"])
def test_a_template_cannot_reach_out_of_its_sandbox(tmp_path, source):
    (tmp_path / "chat_template.jinja").write_text(source)
    render, _ = chat_template(tmp_path / "tokenizer.json")
    with pytest.raises(ApiError, match="the chat template fails on them"):
        render(MESSAGES)
