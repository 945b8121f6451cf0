"""The tables of the sources, one module each; ``benchmarks/seeds.py`` prints them."""
