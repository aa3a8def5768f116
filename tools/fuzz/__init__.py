"""Runs the properties of tests/fuzz for as long as it is told."""
