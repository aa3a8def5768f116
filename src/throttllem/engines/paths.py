"""Where the APIs of engines are asked for answers, and what they take where a client says nothing."""

from __future__ import annotations

import re

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
NATIVE = re.compile(r"/v2/models/([^/]+)(?:/versions/[^/]+)?/generate(_stream)?")
"""Triton's own way to ask: the model is in the path, and whether the answer is streamed."""
COMPLETION_TOKENS = 16
"""What OpenAI's API generates where a completion names no limit."""
