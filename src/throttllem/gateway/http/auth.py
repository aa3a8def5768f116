"""API keys by `Authorization: Bearer`, or by `x-api-key` as Anthropic's clients send them, compared in constant time.

Keeps digests, not keys.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping

from throttllem.openai_api.errors import ApiError

KEY_HEADERS = frozenset({"authorization", "x-api-key"})
"""Headers that may hold a key of the gateway."""


class Access:
    """The keys of one option, which open what it guards; none: every client is served."""

    def __init__(self, keys: tuple[str, ...], option: str = "server.api_keys") -> None:
        self._option = option
        self._digests = tuple(hashlib.sha256(key.encode()).digest() for key in keys)
        self.guarded = bool(keys)
        """Whether a key is needed at all."""

    def check(self, headers: Mapping[str, str]) -> str:
        """A short name of the key that was shown. Raises ApiError 401. To be called where `guarded`."""
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if not key:
            scheme, key = "bearer", headers.get("x-api-key", "")
        shown = hashlib.sha256(key.strip().encode("latin-1", "replace")).digest()
        # Every key is compared, so that the time shows nothing of which came close.
        known = sum(hmac.compare_digest(shown, digest) for digest in self._digests)
        if scheme.lower() != "bearer" or not known:
            what = "no API key was given" if not key else f"the API key is not one of {self._option}"
            raise ApiError(
                401,
                f"{what}; send one as 'Authorization: Bearer KEY' or 'x-api-key: KEY'",
                code="invalid_api_key",
                headers=((b"www-authenticate", b"Bearer"),),
            )
        return shown.hex()[:12]

    def check_admin(self, headers: Mapping[str, str]) -> None:
        """The same for what changes an engine, which is refused without keys. Raises ApiError 401 or 403."""
        if not self.guarded:
            message = "this changes the engine for all its clients: set server.admin_keys, and send one of them"
            raise ApiError(403, message, kind="permission_error", code="admin_key_needed")
        self.check(headers)
