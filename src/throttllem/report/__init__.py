"""Tables, claims of the paper, and the HTML report."""
