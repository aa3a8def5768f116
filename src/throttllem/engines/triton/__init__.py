"""Triton Inference Server as a live engine."""
