"""Which clock, and which engine size: policies and the controller that applies them."""
