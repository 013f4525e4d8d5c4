"""Reward models learnt from K-way rankings, saved as ordinary sequence-classification folders."""

from rlhf import __version__

__all__ = ["__version__"]
