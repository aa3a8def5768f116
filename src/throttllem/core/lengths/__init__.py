"""Predicts how long each request's output will be."""
