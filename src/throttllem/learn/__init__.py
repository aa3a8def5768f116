"""Profile an engine, train the trees, bake the table, write the score card."""
