"""Clock policies of other papers on one engine, each after its paper; none is tuned beyond one parameter."""
