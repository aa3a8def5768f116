"""A libnvidia-ml.so.1 without a GPU: GPUs that live in one mapped file, for tests, soak runs and the closed loop."""
