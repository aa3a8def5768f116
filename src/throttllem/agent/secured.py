"""TLS between gateway and agents: both ends show the pool's certificate, and accept no other.

One file holds the pool's key and its self-signed certificate. Who has the file belongs to the pool.
"""

from __future__ import annotations

import os
import ssl
from pathlib import Path

HOW = (
    "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 3650 -subj /CN=throttllem "
    "-keyout pool.key -out pool.crt && cat pool.key pool.crt > pool.pem && chmod 600 pool.pem"
)
"""Makes such a file."""


def server_context(file: Path) -> ssl.SSLContext:
    """For the agent. Raises ValueError for a file that cannot be used."""
    return _context(file, ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))


def client_context(file: Path) -> ssl.SSLContext:
    """For the gateway. Raises ValueError for a file that cannot be used."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False  # the certificate is the pool's, not a host's
    return _context(file, context)


def _context(file: Path, context: ssl.SSLContext) -> ssl.SSLContext:
    path = file.expanduser()
    try:
        if path.stat().st_mode & 0o077:
            raise ValueError(f"the pool's secret, {path}: others can read or write it; chmod 600 {path}")
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_cert_chain(path)
        context.load_verify_locations(path)
    except OSError as error:  # ssl.SSLError is one
        why = os.strerror(error.errno) if error.errno and not isinstance(error, ssl.SSLError) else "holds no such pair"
        raise ValueError(f"the pool's secret, {path}: {why}; a key and its certificate are made by: {HOW}") from error
    return context
