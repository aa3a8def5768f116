import asyncio
import gzip
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from throttllem.openai_api.content_coding import accepts_gzip, coding_of, compressed, decoded
from throttllem.openai_api.errors import ApiError


def plain(body, coding="gzip", most=1 << 20):
    return asyncio.run(decoded(body, coding, most))


def raw_deflate(data):
    stream = zlib.compressobj(wbits=-15)
    return stream.compress(data) + stream.flush()


@given(st.binary(max_size=300))
def test_what_was_compressed_comes_back(data):
    assert plain(gzip.compress(data)) == plain(gzip.compress(data) + gzip.compress(b"")) == data
    assert plain(zlib.compress(data), "deflate") == plain(raw_deflate(data), "deflate") == data


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
@given(data=st.binary(max_size=100))
def test_what_is_not_compressed_is_an_error(coding, data):
    try:
        plain(data, coding)
    except ApiError as error:
        assert (error.status, error.param) == (400, "content-encoding")
    else:
        assert coding == "deflate" or data[:2] == b"\x1f\x8b"


@pytest.mark.parametrize("cut", [1, 8, 9])
def test_what_is_cut_short_is_an_error(cut):
    for body, coding in ((gzip.compress(b"x" * 100), "gzip"), (zlib.compress(b"x" * 100), "deflate")):
        with pytest.raises(ApiError):
            plain(body[:-cut], coding)
    with pytest.raises(ApiError):
        plain(gzip.compress(b"x") + b"more")


def test_a_bomb_is_refused_at_the_limit():
    """1 GB of zeros, twice compressed members of it: no more than the limit is ever made."""
    million = gzip.compress(bytes(1_000_000))
    assert plain(million, most=999_999) is None and len(plain(million, most=1_000_000)) == 1_000_000
    assert plain(million * 1000, most=1 << 20) is None
    with pytest.raises(ApiError, match="16 members"):
        plain(gzip.compress(b"") * 100_000)


def test_codings():
    assert [coding_of(field) for field in (None, "", "identity", " GZIP ", "x-gzip", "deflate")] == [
        *(None, None, None),
        *("gzip", "gzip", "deflate"),
    ]
    for field in ("br", "zstd", "gzip, gzip", "compress", "*"):
        with pytest.raises(ApiError, match="gzip, deflate") as refused:
            coding_of(field)
        assert refused.value.status == 415 and (b"accept-encoding", b"gzip, deflate") in refused.value.headers


@pytest.mark.parametrize(
    ("field", "accepts"),
    [
        *(
            (field, True)
            for field in ("gzip", "deflate, GZip;q=0.5", "*", "br, x-gzip", "gzip;q=1.000", "gzip; q=0.001")
        ),
        *((field, False) for field in (None, "", "br", "gzip;q=0", "gzip; q=0.000, *", "*;q=0", "identity", "gzipped")),
    ],
)
def test_what_a_client_accepts(field, accepts):
    assert accepts_gzip(field) is accepts


def test_what_is_compressed():
    body, json = b'{"a": 1}' * 20_000, (b"content-type", b"application/json; charset=utf-8")
    assert gzip.decompress(asyncio.run(compressed(body, [json]))) == body
    assert asyncio.run(compressed(body, [json, (b"content-encoding", b"br")])) is None
    assert asyncio.run(compressed(body, [(b"content-type", b"audio/mpeg")])) is None
