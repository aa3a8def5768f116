"""Commands that run many simulations: characterize, reproduce, arena."""
