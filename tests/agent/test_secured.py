"""Files that are no secret of a pool, each refused by what is wrong with it."""

import pytest

from throttllem.agent.secured import HOW, client_context, server_context


@pytest.mark.parametrize("context", [client_context, server_context])
def test_files_that_cannot_be_used(secret, tmp_path, context):
    pair = secret.read_bytes()
    key_end = pair.index(b"-----BEGIN CERTIFICATE")
    for name, content, mode, why in (
        ("open.pem", pair, 0o644, "others can read or write it; chmod 600"),
        ("empty.pem", b"", 0o600, "holds no such pair"),
        ("key.pem", pair[:key_end], 0o600, "holds no such pair"),
        ("certificate.pem", pair[key_end:], 0o600, "holds no such pair"),
        ("damaged.pem", pair[:60] + b"!" + pair[61:], 0o600, "holds no such pair"),
    ):
        file = tmp_path / name
        file.write_bytes(content)
        file.chmod(mode)
        with pytest.raises(ValueError, match=rf"the pool's secret, {file}: {why}"):
            context(file)
    with pytest.raises(ValueError, match="No such file or directory") as caught:
        context(tmp_path / "absent.pem")
    assert HOW in str(caught.value)
    assert context(secret).minimum_version.name == "TLSv1_3"
