"""Engines, live and simulated: what the gateway and the simulator drive."""
