"""API keys by `Authorization: Bearer`, compared in constant time. Keeps digests, not keys."""

from __future__ import annotations

import hashlib
import hmac

from throttllem.openai_api.errors import ApiError


class Access:
    """The keys that open the gateway; none: every client is served."""

    def __init__(self, keys: tuple[str, ...]) -> None:
        self._digests = tuple(hashlib.sha256(key.encode()).digest() for key in keys)
        self.guarded = bool(keys)
        """Whether a key is needed at all."""

    def check(self, authorization: str | None) -> str:
        """A short name of the key that was shown. Raises ApiError 401. To be called where `guarded`."""
        scheme, _, key = (authorization or "").partition(" ")
        shown = hashlib.sha256(key.strip().encode("latin-1", "replace")).digest()
        # Every key is compared, so that the time shows nothing of which came close.
        known = sum(hmac.compare_digest(shown, digest) for digest in self._digests)
        if scheme.lower() != "bearer" or not known:
            what = "no API key was given" if not key else "the API key is not known here"
            raise ApiError(
                401,
                f"{what}; send one as 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers=((b"www-authenticate", b"Bearer"),),
            )
        return shown.hex()[:12]
