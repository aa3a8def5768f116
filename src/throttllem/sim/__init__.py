"""The virtual-time driver: traces, scenarios, results. Never imports the gateway."""
