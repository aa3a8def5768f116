"""Request traces: when requests arrive and how long they are. Knows nothing of engines, SLOs or virtual time."""
