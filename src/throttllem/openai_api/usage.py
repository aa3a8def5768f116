"""What an engine counts itself, as its replies give it: usage, token ids, log probabilities.

A count that is no whole number, negative, or more than there can be, is as none.
"""

from __future__ import annotations

from dataclasses import dataclass

MOST_TOKENS = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens of a reply. `cached_tokens`: of the prompt, those that the engine did not compute. None: not reported."""

    output_tokens: int | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None

    def updated(self, later: Usage) -> Usage:
        """With what a later report of the same reply holds."""
        return Usage(
            output_tokens=self.output_tokens if later.output_tokens is None else later.output_tokens,
            prompt_tokens=self.prompt_tokens if later.prompt_tokens is None else later.prompt_tokens,
            cached_tokens=self.cached_tokens if later.cached_tokens is None else later.cached_tokens,
        )


NO_USAGE = Usage()


def usage_in(reported: object, most_tokens: int = MOST_TOKENS) -> Usage:
    """The counts of a `usage` object, of whichever API; `most_tokens`: no output has more."""
    if not isinstance(reported, dict):
        return NO_USAGE
    if "input_tokens" in reported or "output_tokens" in reported:
        return _typed_usage(reported, most_tokens)
    prompt_tokens = _count(reported.get("prompt_tokens"), MOST_TOKENS)
    details = reported.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    return Usage(
        output_tokens=_count(reported.get("completion_tokens"), most_tokens),
        prompt_tokens=prompt_tokens,
        cached_tokens=_count(cached, MOST_TOKENS if prompt_tokens is None else prompt_tokens),
    )


def _typed_usage(reported: dict[str, object], most_tokens: int) -> Usage:
    """Of Responses and Messages. The latter's input tokens are those that no cache had a part in."""
    prompt_tokens = _count(reported.get("input_tokens"), MOST_TOKENS)
    details = reported.get("input_tokens_details")
    cached = _count(details.get("cached_tokens") if isinstance(details, dict) else None, prompt_tokens or 0)
    read = _count(reported.get("cache_read_input_tokens"), MOST_TOKENS)
    if prompt_tokens is not None and read is not None:
        cached = read
        prompt_tokens += read + (_count(reported.get("cache_creation_input_tokens"), MOST_TOKENS) or 0)
    output_tokens = _count(reported.get("output_tokens"), most_tokens)
    return Usage(output_tokens=output_tokens, prompt_tokens=prompt_tokens, cached_tokens=cached)


def choices_in(fields: dict[str, object]) -> list[dict[str, object]]:
    """The choices of a reply or a chunk."""
    choices = fields.get("choices")
    return [choice for choice in choices if isinstance(choice, dict)] if isinstance(choices, list) else []


def tokens_in(choice: dict[str, object], *, echo: bool = False) -> int | None:
    """Output tokens of a choice by its ids or log probabilities (the prompt's too if `echo`), None if it has none."""
    ids, logprobs = choice.get("token_ids"), choice.get("logprobs")
    if isinstance(ids, list):
        return len(ids)
    if isinstance(logprobs, dict) and not echo:
        for name in ("content", "tokens", "refusal"):
            if isinstance(listed := logprobs.get(name), list) and listed:
                return len(listed)
    return None


def _count(value: object, most: int) -> int | None:
    return value if type(value) is int and 0 <= value <= most else None
