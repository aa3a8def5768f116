"""Counts tokens with a model's tokenizer.json, for engines that cannot be asked; without one, 4 bytes are a token."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from throttllem.engines.base import EngineError

BYTES_PER_TOKEN = 4
"""Of English text, about; only where there is no tokenizer."""


class TokenizerFile:
    """A tokenizer.json, or none. Loading takes up to a second: `load` may run in a thread."""

    def __init__(self, path: Path | None) -> None:
        self._path = path

    @property
    def exact(self) -> bool:
        """Whether counts are the model's own."""
        return self._path is not None

    @property
    def name(self) -> str:
        """Who counts, in words."""
        return "an estimate of 4 bytes per token" if self._path is None else str(self._path)

    def load(self) -> None:
        """Read the file now. Raises EngineError if it cannot be used."""
        if self._path is not None:
            _ = self._tokenizer

    def count(self, text: str, *, special: bool = True) -> int:
        """Tokens of a text, at least 1; `special`: with those that the tokenizer sets around it."""
        if self._path is None:
            return max(1, -(-len(text.encode("utf-8", "replace")) // BYTES_PER_TOKEN))
        return max(1, len(self._tokenizer.encode(text, add_special_tokens=special).ids))

    @cached_property
    def _tokenizer(self) -> Any:
        try:
            from tokenizers import Tokenizer  # noqa: PLC0415
        except ImportError as error:
            raise EngineError(
                f"{self._path}: needs the package tokenizers: pip install throttllem[tokenizers]"
            ) from error
        if self._path is None or not self._path.is_file():
            raise EngineError(f"{self._path}: there is no such file; engines.tokenizer names a tokenizer.json")
        try:
            return Tokenizer.from_file(str(self._path))
        except Exception as error:  # The package raises plain Exception.
            raise EngineError(f"{self._path}: no tokenizer.json: {error}") from error
