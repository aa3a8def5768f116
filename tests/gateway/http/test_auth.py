"""API keys: each has a name that does not show it, every other is rejected."""

import pytest

from throttllem.gateway.http.auth import Access
from throttllem.openai_api.errors import ApiError


def test_without_keys_nothing_is_guarded():
    assert not Access(()).guarded


def test_each_key_is_accepted_and_has_a_name_that_does_not_show_it():
    access = Access(("one", "two"))
    names = {access.check({"authorization": "Bearer one"}), access.check({"authorization": "bearer  two"})}
    assert access.guarded and len(names) == 2
    assert not any("one" in name or "two" in name for name in names)


def test_anthropics_header_holds_a_key_too():
    access = Access(("one",))
    assert access.check({"x-api-key": "one"}) == access.check({"authorization": "Bearer one"})


@pytest.mark.parametrize("shown", ["", "Bearer", "Bearer ", "Bearer onf", "Basic one", "one", "Bearer \xff\u20ac"])
def test_other_keys_are_rejected(shown):
    for headers in ({}, {"authorization": shown}, {"x-api-key": "onf"}):
        with pytest.raises(ApiError) as caught:
            Access(("one",)).check(headers)
    assert (caught.value.status, caught.value.code) == (401, "invalid_api_key")
