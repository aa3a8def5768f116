"""From measurements of an engine to its performance table: profile, train, bake, score."""
