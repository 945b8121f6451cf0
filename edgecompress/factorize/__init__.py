"""Low-rank forms of weights and the solvers that find them."""
