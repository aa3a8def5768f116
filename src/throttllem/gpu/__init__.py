"""GPUs as the gateway sees them: a clock to set, a counter to read."""
