"""Joules of the GPUs, shared among requests, and the savings estimate."""
