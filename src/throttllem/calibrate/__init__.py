"""Fit the physics to measurements: the laws stay, their constants move."""
