import time

import pytest

from throttllem.openai_api.errors import ApiError
from throttllem.openai_api.large_bodies import PIECE_BYTES
from throttllem.openai_api.multipart import model_in_form

KIND = "multipart/form-data; boundary=b"
MODEL = b'--b\r\ncontent-disposition: form-data; name="model"\r\n\r\ntiny\r\n'
FILE = b'--b\r\ncontent-disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'


class Searched(bytes):
    """Keeps how many bytes each search was over: one call holds the interpreter's lock."""

    longest = 0

    def find(self, text, start=0, end=None):
        Searched.longest = max(Searched.longest, (len(self) if end is None else end) - start)
        return super().find(text, start, end)

    def count(self, text):
        Searched.longest = max(Searched.longest, len(self))
        return super().count(text)


def test_a_large_form_is_searched_in_pieces():
    body = Searched(FILE + b"\r\n" * 200_000 + b"\r\n" + MODEL + b"--b--\r\n")
    assert model_in_form(body, KIND) == "tiny"
    assert 0 < Searched.longest < PIECE_BYTES + 100


@pytest.mark.parametrize("shift", range(0, 40, 3))
def test_the_model_is_found_wherever_the_pieces_end(shift):
    body = FILE + b"x" * (PIECE_BYTES - len(FILE) - shift) + b"\r\n" + MODEL + b"--b--\r\n"
    assert model_in_form(body, KIND) == "tiny"


@pytest.mark.parametrize(
    ("body", "kind", "fault"),
    [
        (MODEL, KIND + ";" * 2000, "content-type"),
        (FILE + b"\r\n--b" + b" \t" * 40, KIND, "blanks behind a boundary"),
        (MODEL * 101, KIND, "more than 100 parts"),
    ],
)
def test_a_form_that_would_take_too_long_is_refused(body, kind, fault):
    with pytest.raises(ApiError, match=fault) as caught:
        model_in_form(b"\r\n" + body, kind)
    assert caught.value.status == 400


def test_headers_of_many_options_are_passed_over():
    header = b"content-disposition: form-data" + b";" * 4000 + b"\r\n"
    began_s = time.thread_time()
    assert model_in_form((b"--b\r\n" + header * 4 + b"\r\n\r\n") * 50 + MODEL + b"--b--", KIND) == "tiny"
    assert time.thread_time() - began_s < 0.2  # read as options they take 0.6 s


def test_a_boundary_longer_than_any_client_sends_is_the_engines_matter():
    assert model_in_form(b"--" + b"b" * 300, "multipart/form-data; boundary=" + "b" * 300) is None
