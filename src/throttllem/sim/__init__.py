"""Simulation in virtual time: traces, studies and their results. Never imports the gateway."""
