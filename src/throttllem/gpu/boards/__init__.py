"""The boards behind `gpus`: which kind each of them is, and which processes use it."""
