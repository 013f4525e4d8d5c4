"""Reinforcement learning on gymnasium environments, driven by the same core that trains language models."""

__version__ = "0.1.0"
