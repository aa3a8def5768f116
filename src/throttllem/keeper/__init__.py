"""The keeper of clocks: the one part that runs as root, and small for that reason."""
