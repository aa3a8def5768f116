"""OpenAI's HTTP API as bytes: requests read; answers, events and errors written. Knows no connection and no engine."""
