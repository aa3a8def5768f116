"""One module a command: its flags, and what it does with them."""
