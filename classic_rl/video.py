"""Films of episodes as MP4 files: one environment of its own with `render_mode="rgb_array"`, never a training one.

Written through PyAV (extra `video`), whose wheels carry their encoder.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium.vector import SyncVectorEnv, VectorEnv, VectorWrapper

from classic_rl.environments import EnvironmentConfig, make_environments, make_rendering
from rlhf.errors import ConfigError

FRAMES_PER_SECOND = 30
"""Where an environment's metadata name none."""
_SMALLEST_SIDE = 256
"""Small frames, such as a network's 84 x 84, are enlarged by a whole factor until their shorter side has this many
pixels."""


def require_package() -> None:
    """Raise ValueError where films cannot be written."""
    try:
        import av  # noqa: F401
    except ImportError as error:
        raise ValueError("films need the package av: pip install 'rlhf-toolkit[video]'") from error


class VideoFile:
    """An MP4 file (H.264) that grows frame by frame.

    Args:
        file: Where; its folder is made.
        frames_per_second: Of the film.
    """

    def __init__(self, file: Path, *, frames_per_second: float = FRAMES_PER_SECOND) -> None:
        require_package()
        import av

        file.parent.mkdir(parents=True, exist_ok=True)
        self.frames = 0
        self._container = av.open(str(file), mode="w")
        rate = Fraction(frames_per_second).limit_denominator(1000)
        self._stream = self._container.add_stream("libx264", rate=rate, options={"crf": "20"})
        self._stream.pix_fmt = "yuv420p"  # what browsers play; it wants even sides

    def add(self, frame: np.ndarray) -> None:
        """Append one frame [height, width, 3] uint8; all have one size."""
        import av

        factor = max(1, -(-_SMALLEST_SIDE // min(frame.shape[:2])))
        frame = frame.repeat(factor, axis=0).repeat(factor, axis=1)
        height, width = (side - side % 2 for side in frame.shape[:2])
        if self.frames == 0:
            self._stream.height, self._stream.width = height, width
        image = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame[:height, :width]), format="rgb24")
        self._container.mux(self._stream.encode(image))
        self.frames += 1

    def close(self) -> None:
        """Write what is left."""
        if self.frames:
            self._container.mux(self._stream.encode(None))
        self._container.close()


class Filmed(VectorWrapper):
    """One environment whose frames go to a file, until its episode has ended.

    Args:
        environments: One environment, with a render mode, or ALE's vector form.
        video: Where the frames go.
    """

    def __init__(self, environments: VectorEnv, video: VideoFile) -> None:
        super().__init__(environments)
        self.video = video

    def reset(self, **arguments: Any) -> tuple[Any, dict[str, Any]]:
        """Begin the episode."""
        observations, infos = self.env.reset(**arguments)
        self.video.add(self._frame(observations))
        return observations, infos

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Go on."""
        outcome = self.env.step(actions)
        self.video.add(self._frame(outcome[0]))
        return outcome

    def _frame(self, observations: Any) -> np.ndarray:
        """[height, width, 3] uint8: what the environment draws, or the newest plane of a stack of images."""
        if self.env.render_mode == "rgb_array":
            return np.asarray(self.env.render()[0])
        return np.repeat(observations[0][-1][..., None], 3, axis=-1)


@contextmanager
def filmed(environment: EnvironmentConfig, file: Path) -> Iterator[VectorEnv]:
    """Make one environment and film what is done in it.

    Args:
        environment: The training environment's config. Other vector forms are replaced by gymnasium's single
            environment, but for ALE's, which does its own preprocessing and draws nothing: its frames are filmed as the
            agent sees them.
        file: Of the film, *.mp4.

    Raises:
        ConfigError: The environment draws no pictures.
        ValueError: The package is missing.
    """
    if environment.vectorization == "vector_entry_point" and environment.id.split(":")[-1].startswith("ALE/"):
        environments = make_environments(environment, num_envs=1, images=True)
    else:
        environments = make_rendering(environment)
    if environments is None:
        raise ConfigError(
            "this environment draws no pictures to film",
            where="evaluation.video",
            got=environment.id,
            expected="an environment with the render mode rgb_array",
            remedy="Set evaluation.video=0.",
        )
    rate = FRAMES_PER_SECOND
    if isinstance(environments, SyncVectorEnv):
        rate = environments.envs[0].metadata.get("render_fps", rate)
    video = VideoFile(file, frames_per_second=rate)
    try:
        yield Filmed(environments, video)
    finally:
        video.close()
        environments.close()


def next_files(folder: Path, count: int) -> list[Path]:
    """Return the names of the next evaluation's films: `evaluation_0003_episode_0.mp4` after two evaluations."""
    numbers = [int(found[1]) for file in folder.glob("*.mp4") if (found := re.match(r"evaluation_(\d+)_", file.name))]
    return [folder / f"evaluation_{max(numbers, default=0) + 1:04d}_episode_{index}.mp4" for index in range(count)]
