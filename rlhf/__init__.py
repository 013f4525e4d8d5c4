"""Reinforcement learning for language models on a small, pure core that also solves CartPole.

Nothing heavy is imported here: `import rlhf` is instant, and `import rlhf.core` loads torch and pydantic only.
"""

__version__ = "0.1.0"
