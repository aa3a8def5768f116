"""Policies against each other on a grid of cells: energy, attainment, latency, and what a clairvoyant would save."""
