"""The paper's claims, each judged against what this project finds."""
