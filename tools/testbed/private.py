"""Where a keeper's folders may be in tests: below none that other users can write to, as temporary folders are."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def private_base() -> Path:
    """The folder of a host's running processes for root, of this user's for anybody else."""
    return Path("/run") if os.geteuid() == 0 else Path(os.environ.get("XDG_RUNTIME_DIR") or Path.home())


@contextmanager
def private_folder(prefix: str) -> Iterator[Path]:
    """A temporary folder there, which other users may pass through."""
    with tempfile.TemporaryDirectory(prefix=prefix, dir=private_base(), ignore_cleanup_errors=True) as made:
        Path(made).chmod(0o755)
        yield Path(made)
