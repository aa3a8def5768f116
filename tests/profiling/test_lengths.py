import json
import os
from pathlib import Path

import pytest

from throttllem.core.lengths.online import OnlineLengthOptions, OnlineLengthPredictor
from throttllem.core.types import Request, Slo
from throttllem.profiling.lengths import MARK, load_lengths, save_lengths


def request(number: int = 0) -> Request:
    return Request(id=number, arrival_s=0.0, prompt_tokens=100, max_tokens=4096, slo=Slo(), caller="é", model="m")


def trained() -> OnlineLengthPredictor:
    predictor = OnlineLengthPredictor()
    for number in range(200):
        predictor.predict(request(number))
        predictor.learn(request(number), 50 + number % 60)
    return predictor


def test_a_restart_goes_on_where_the_last_run_ended(tmp_path: Path) -> None:
    before = trained()
    assert save_lengths(before, tmp_path / "lengths.json") is None
    after = load_lengths(tmp_path / "lengths.json")
    assert after.trouble is None
    assert after.predictor.predict(request()) == before.predict(request()) is not None


def test_the_first_start_is_no_trouble(tmp_path: Path) -> None:
    options = OnlineLengthOptions(exceed=0.2)
    found = load_lengths(tmp_path / "none.json", options)
    assert found.trouble is None
    assert found.predictor.options is options
    assert found.predictor.predict(request()) is None


def damaged(content: bytes) -> list[bytes]:
    text = content.decode()
    state = json.loads(text)
    group = state["lengths"]["groups"][0]
    wrong = []
    for change in (
        {"key": [["a"]]},
        {"counts": [[1, -1.0]]},
        {"counts": [[1, "x"]]},
        {"counts": [[999, 1.0]]},
        {"counts": []},
        {"counts": [[1, 1e99]]},
        {"counts": [[1, float("nan")]]},
        {"weight": 0},
        {"answers": None},
        {"level": 2.0},
        {"level": "high"},
    ):
        state["lengths"]["groups"][0] = group | change
        wrong.append(json.dumps(state).encode())
    state["lengths"] = []
    return [
        *wrong,
        json.dumps(state).encode(),
        content[: len(content) // 2],
        content.replace(b'"version": 1', b'"version": 99'),
        text.replace('"weight": ', '"weight": -').encode(),
        f'{{"mark": "{MARK}", "lengths": '.encode() + b"[" * 100_000,
        f'{{"mark": "{MARK}"}}'.encode(),
        f'{{"mark": "{MARK}", "x": "'.encode() + b'\xff"}',
    ]


def test_a_damaged_file_is_reported_and_learning_begins_again(tmp_path: Path) -> None:
    path = tmp_path / "lengths.json"
    save_lengths(trained(), path)
    for content in damaged(path.read_bytes()):
        path.write_bytes(content)
        found = load_lengths(path)
        assert found.trouble is not None, content[:200]
        assert str(path) in found.trouble
        assert "Learning begins again" in found.trouble
        assert found.predictor.predict(request()) is None
        assert save_lengths(trained(), path) is None
        assert load_lengths(path).trouble is None


@pytest.mark.parametrize("content", [b"[gateway]\nport = 8000\n", b'{"version": 1}', b"\x00\xff" * 50])
def test_another_file_is_neither_read_nor_replaced(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "throttllem.toml"
    path.write_bytes(content)
    assert "not a file of learned lengths" in (load_lengths(path).trouble or "")
    assert "holds another file" in (save_lengths(trained(), path) or "")
    assert path.read_bytes() == content


def test_an_empty_file_may_be_written(tmp_path: Path) -> None:
    path = tmp_path / "lengths.json"
    path.touch()
    assert load_lengths(path).trouble
    assert save_lengths(trained(), path) is None
    assert load_lengths(path).trouble is None


def test_a_file_that_cannot_be_read_or_written_is_reported(tmp_path: Path) -> None:
    assert "cannot be read" in (load_lengths(tmp_path).trouble or "")
    assert "is a directory" in (save_lengths(trained(), tmp_path) or "")
    assert "make the folder" in (save_lengths(trained(), tmp_path / "none" / "lengths.json") or "")


@pytest.mark.parametrize("umask", [0o022, 0])
def test_lengths_are_readable_to_their_user_only(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        assert save_lengths(trained(), tmp_path / "lengths.json") is None
    finally:
        os.umask(before)
    assert (tmp_path / "lengths.json").stat().st_mode & 0o777 == 0o600


def test_a_link_under_the_name_is_neither_read_nor_written_through(tmp_path: Path) -> None:
    ours, link, other = tmp_path / "lengths.json", tmp_path / "link.json", tmp_path / "other.json"
    save_lengths(trained(), ours)
    link.symlink_to(ours)
    other.symlink_to(tmp_path / "elsewhere")
    assert "cannot be read" in (load_lengths(link).trouble or "")
    assert save_lengths(trained(), other) is None
    assert not other.is_symlink() and not (tmp_path / "elsewhere").exists()


def test_a_pipe_under_the_name_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "lengths.json")
    assert "no regular file" in (load_lengths(tmp_path / "lengths.json").trouble or "")
