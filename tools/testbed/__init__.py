"""One testbed for soak, loop, evaluation and real tests: engines, fake GPUs, keeper, gateway and load as processes."""
