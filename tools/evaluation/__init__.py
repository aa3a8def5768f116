"""The gateway against real engines, with real clients: what it costs, what it keeps, what it survives."""
