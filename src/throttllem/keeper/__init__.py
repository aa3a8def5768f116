"""The keeper: the only process that runs as root. It leases GPU clocks to clients, and restores them."""
