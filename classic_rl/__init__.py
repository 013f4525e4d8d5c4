"""Reinforcement learning on gymnasium environments, driven by the same core that trains language models."""

from typing import Any

__version__ = "0.1.0"


def load(folder: Any) -> Any:
    """Read a policy that a run saved; it has `predict(observation, deterministic=True)`.

    See `classic_rl.saving.load`, which is imported only here: the package itself loads neither torch nor gymnasium.
    """
    from classic_rl.saving import load as load_folder

    return load_folder(folder)
