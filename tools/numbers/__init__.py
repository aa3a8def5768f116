"""The published figures of simulations: savings, the bias of the savings estimate, and the paper's claims."""
