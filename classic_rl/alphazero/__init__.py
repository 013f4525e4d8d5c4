"""AlphaZero: search guided by a network, and a network taught by the search (Silver et al. 2017)."""
