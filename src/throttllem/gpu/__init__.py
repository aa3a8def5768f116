"""GPUs: their clocks are set and their energy is read, on real hardware through NVML or simulated."""
