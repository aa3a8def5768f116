"""Profiles a live engine."""
