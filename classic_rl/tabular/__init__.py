"""Tabular reinforcement learning: exact dynamic programming, and learning from single steps. NumPy only."""
