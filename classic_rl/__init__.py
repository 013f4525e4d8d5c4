"""Classic control: gymnasium environments and small networks, driven by the same core and loop as language models."""

from rlhf import __version__

__all__ = ["__version__"]
