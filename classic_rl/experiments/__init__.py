"""Experiments on classic environments: grids of trainings, their tables and figures; modules named as their recipes."""
