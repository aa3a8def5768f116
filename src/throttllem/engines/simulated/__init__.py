"""The simulated engine: in-flight batching, in virtual time or in real time."""
