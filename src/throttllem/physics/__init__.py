"""How a GPU and a model behave: the ground truth of the simulation. Knows nothing of requests or policies."""
