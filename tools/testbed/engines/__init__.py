"""Real engines and clients for tests and evaluations: how they are installed and started. The product needs none."""
