"""Grids of runs, and what they say of the paper's findings."""
