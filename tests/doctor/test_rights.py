"""Rights read from /proc: of root on the host, in containers and in user namespaces."""

import pytest

from throttllem.doctor import rights

ALL, DOCKER, NONE = "000001ffffffffff", "00000000a80425fb", "0000000000000000"
HOST, ROOTLESS = "         0          0 4294967295\n", "         0       1000          1\n"


@pytest.mark.parametrize(
    ("capabilities", "users", "uid", "missing"),
    [
        (ALL, HOST, 0, None),
        ("0000000000200000", HOST, 1000, None),
        (DOCKER, HOST, 0, "CAP_SYS_ADMIN"),
        (NONE, HOST, 1000, "root"),
        (ALL, ROOTLESS, 0, "user namespace"),
    ],
)
def test_the_missing_right(tmp_path, monkeypatch, capabilities, users, uid, missing):
    (tmp_path / "status").write_text(f"Name:\tx\nCapPrm:\t{ALL}\nCapEff:\t{capabilities}\nCapBnd:\t{ALL}\n")
    (tmp_path / "uid_map").write_text(users)
    monkeypatch.setattr(rights.os, "geteuid", lambda: uid)
    found = rights.missing_right(tmp_path)
    assert (found is None) is (missing is None)
    assert (missing or "") in (found or "")
    assert rights.sets_clocks(tmp_path) is (missing is None)


@pytest.mark.parametrize("uid", [0, 1000])
def test_without_proc_root_is_root(tmp_path, monkeypatch, uid):
    monkeypatch.setattr(rights.os, "geteuid", lambda: uid)
    assert rights.sets_clocks(tmp_path) is (uid == 0)


def test_the_name_of_this_user(monkeypatch):
    monkeypatch.setattr(rights.os, "geteuid", lambda: 0)
    assert rights.this_user() == "user 0 (root)"
    monkeypatch.setattr(rights.os, "geteuid", lambda: 3_999_999_999)
    assert rights.this_user() == "user 3999999999"
