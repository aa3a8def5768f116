"""One budget of bytes over everything that requests make the gateway hold: uploads, queued bodies, replies held whole.

A client may hold as much as is still free (the dynamic threshold of Choudhury and Hahne, 1998): one alone gets half of
the budget, and something is left for the next client in any case. Small holdings, and what a request that was let in
needs besides its body, are bounded by the whole budget only, an eighth of which large bodies cannot take.
"""

from __future__ import annotations

from throttllem.openai_api.errors import ApiError

SMALL_BYTES = 64 * 1024
_RETRY_S = 2


class HeldBytes:
    """`most_bytes` in all; `held_bytes` now."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self.held_bytes = 0
        self._of_clients: dict[str, int] = {}

    def change(self, client: str, before: int, now: int, granted: int = 0) -> None:
        """A holding of this client becomes `now` bytes, of which `granted` need no more than room in the whole budget.
        Raises ApiError 503 if there is no room; then it stays.
        """
        more, of_client = now - before, self._of_clients.get(client, 0)
        if more > 0:
            free = self.most_bytes - self.held_bytes - more
            if free < 0 or (now > granted + SMALL_BYTES and free < max(self.most_bytes // 8, of_client + more)):
                raise _no_room()
        self.held_bytes += more
        if of_client + more:
            self._of_clients[client] = of_client + more
        else:
            self._of_clients.pop(client, None)


def _no_room() -> ApiError:
    message = "the gateway holds as many bytes of requests as it may (limits.held_bytes): try again later"
    headers = ((b"connection", b"close"),)
    return ApiError(503, message, code="too_many_bytes", retry_after_s=_RETRY_S, headers=headers)
