"""Settings of what writes the completions: the model's own layers, or vLLM."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rlhf.config import Config


class TransformersGeneratorConfig(Config):
    """The model that is trained writes the completions itself: no second copy of its weights, always current."""

    type: Literal["transformers"] = "transformers"
    backend: Literal["in_place", "generate"] = "in_place"
    """in_place is several times faster; generate is transformers' own loop, for models with recurrent layers (Mamba),
    which in_place refuses."""
    cuda_graphs: bool = True
    """On a GPU, record the decode step of Llama-like models as a CUDA graph, which takes Python out of the loop."""


class VllmGeneratorConfig(Config):
    """vLLM writes the completions, with a copy of the weights that is renewed before each rollout and evaluation.

    Its kernels round otherwise than the trainer's: `rollout/sampling_mismatch_mean` (`sampling_mismatch_mean` where
    one step is made of a rollout) tells by how much, and `algorithm.rollout_correction` makes up for it. Not yet
    measured on a GPU.
    """

    type: Literal["vllm"] = "vllm"
    server: str | None = None
    """Address of a `vllm serve` on GPUs of its own, such as http://localhost:8000. Null runs an engine inside every
    training process, on the same GPU."""
    server_timeout: float = Field(240.0, ge=0)
    """Seconds to wait until the server answers."""
    server_weights_port: int = Field(51216, ge=1, le=65535)
    """Port of the main process at which the server's workers fetch new weights."""
    dtype: Literal["bfloat16", "float32", "auto"] = "bfloat16"
    """Type of the engine's weights; auto takes that of the trained ones. A server has its own."""
    memory_fraction: float = Field(0.3, gt=0, lt=1)
    """Share of the GPU's memory for the engine's weights and KV cache; the trainer needs the rest."""
    max_length: int | None = Field(None, ge=2)
    """Most tokens of prompt and completion together; null takes the model's context."""
    max_sequences: int | None = Field(None, ge=1)
    """Most completions in work at once; null takes vLLM's default."""
    sleep: bool = False
    """Give the GPU memory back after each generation: the KV cache is dropped and the weights wait in CPU memory."""
    eager: bool = False
    """Run without CUDA graphs: slower, and starts sooner."""
    request_seeds: bool = True
    """Draw each prompt's completions from a seed of their own, so that a resumed run draws what the uninterrupted one
    would have drawn, up to vLLM's rounding. False draws from the engine's one stream, which is faster."""

    @model_validator(mode="after")
    def _refuse_what_a_server_decides(self) -> Self:
        if self.server is not None and self.sleep:
            raise ValueError("a server has GPUs of its own and does not sleep; remove sleep or server")
        return self


GeneratorConfig = Annotated[TransformersGeneratorConfig | VllmGeneratorConfig, Field(discriminator="type")]
"""Chosen by `type`."""
