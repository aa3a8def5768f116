"""Engines that run batches. Knows nothing of SLOs or clock policies."""
