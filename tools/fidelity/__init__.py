"""The physics against measurements: `make fidelity`."""
