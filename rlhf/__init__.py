"""Reinforcement learning for language models on a small, pure core that also solves CartPole.

Nothing heavy is imported here: `import rlhf` is instant, and `import rlhf.core` loads torch and pydantic only.
"""

import os

# Large tensors in huge pages (Linux): fewer page faults and misses of the address cache. torch reads this once,
# before its first tensor; a value that is set already stands.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

__version__ = "0.1.0"
