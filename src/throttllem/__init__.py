"""Serve LLMs at the least energy that keeps every latency promise."""
