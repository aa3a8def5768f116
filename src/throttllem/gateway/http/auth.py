"""Who may ask: API keys by `Authorization: Bearer`, compared in constant time. Keeps digests, not keys."""

from __future__ import annotations

import hashlib
import hmac

from throttllem.openai_api.errors import ApiError


class Access:
    """The keys that open the gateway; none: anybody may ask."""

    def __init__(self, keys: tuple[str, ...]) -> None:
        self._digests = tuple(hashlib.sha256(key.encode()).digest() for key in keys)

    @property
    def guarded(self) -> bool:
        """Whether a key is needed at all."""
        return bool(self._digests)

    def check(self, authorization: str | None) -> str | None:
        """A short name of the key that was shown, None where none is needed. Raises ApiError 401."""
        if not self._digests:
            return None
        scheme, _, key = (authorization or "").partition(" ")
        shown = hashlib.sha256(key.strip().encode("latin-1", "replace")).digest()
        # Every key is compared, so that the time says nothing of which came close.
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
