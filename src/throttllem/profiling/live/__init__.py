"""Profiles a live engine over HTTP."""
