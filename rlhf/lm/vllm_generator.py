"""Completions from vLLM, behind the same protocol as those of the model's own layers.

An engine has a copy of the weights and kernels of its own. So the weights are handed over before each rollout and
evaluation (`synchronize`), and the engine's log-probs stay apart from the trainer's: their difference is logged as
`rollout/sampling_mismatch_*` or, where one step is made of a rollout, as that step's `sampling_mismatch_mean`, examined
by the doctor, and made up for by `algorithm.rollout_correction`.

Tested against a local stand-in for the parts of vLLM 0.22 to 0.33 that are used here; not yet measured on a GPU.
"""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from rlhf.data.collation import right_pad
from rlhf.errors import ConfigError, ModelError, TrainingError
from rlhf.lm.backbone import unwrap_adapters
from rlhf.lm.engine import Answer, Engine
from rlhf.lm.engine_weights import checkpoint_weights
from rlhf.lm.generation import Generation, require_left_padding, require_room
from rlhf.lm.generator_config import VllmGeneratorConfig
from rlhf.lm.sampling import SamplingConfig


class VllmGenerator:
    """A `Generator` whose completions come from an engine with weights of its own.

    Args:
        engine: Writes.
        model: The policy's model, whose weights the engine is given.
        end_token_ids: Tokens that end a completion.
        pad_token_id: Fills completions after their end.
        max_length: Most tokens of prompt and completion together; None: the model's context.
        request_seeds: Draw a seed for each prompt from the caller's source of randomness.
    """

    def __init__(
        self,
        engine: Engine,
        model: Any,
        *,
        end_token_ids: Sequence[int],
        pad_token_id: int,
        max_length: int | None = None,
        request_seeds: bool = True,
    ) -> None:
        if not end_token_ids:
            raise ConfigError("generation needs at least one end token", where="end_token_ids")
        self._engine, self._model = engine, model
        self._ends, self._pad = [int(token) for token in end_token_ids], int(pad_token_id)
        self._max_length, self._request_seeds = max_length, request_seeds

    def synchronize(self) -> None:
        """Give the engine the policy's weights as they are now; all processes call it alike.

        Raises:
            ModelError: The engine did not take all of its weights, or the model's cannot be handed on.
        """
        self._engine.load(lambda: checkpoint_weights(self._model))

    @torch.no_grad()
    def generate(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        *,
        group_size: int = 1,
        sampling: SamplingConfig,
        generator: torch.Generator | None = None,
    ) -> Generation:
        """Complete each prompt `group_size` times; arguments, rows and errors as `TransformersGenerator.generate`.

        Greedy completions come with the log-probs of softmax(logits), whatever the temperature: vLLM has no other.

        Raises:
            DataError: A prompt is empty or not padded on the left, or prompt and completion may exceed the context.
            TrainingError: A log-prob of the engine is not finite.
        """
        require_left_padding(prompt_ids, prompt_mask)
        require_room(self._model, prompt_mask, sampling, limit=self._max_length)
        prompts = [ids[mask].tolist() for ids, mask in zip(prompt_ids.cpu(), prompt_mask.cpu(), strict=True)]
        seeds = None
        if self._request_seeds and not sampling.greedy:
            device = "cpu" if generator is None else generator.device
            seeds = torch.randint(2**31 - 1, (len(prompts),), generator=generator, device=device).tolist()
        count = 1 if sampling.greedy else group_size  # vLLM refuses several greedy answers to one prompt
        answers = self._engine.complete(prompts, count=count, settings=self._settings(sampling), seeds=seeds)
        if len(answers) != len(prompts) * count:
            raise TrainingError(
                "the engine lost answers", where="vLLM", got=len(answers), expected=str(len(prompts) * count)
            )
        if count < group_size:
            answers = [answer for answer in answers for _ in range(group_size)]
        return self._as_rows(answers, prompt_ids.device)

    def _settings(self, sampling: SamplingConfig) -> dict[str, Any]:
        """In vLLM's words. `ignore_eos`: it would stop at the end tokens of the model's folder, which may be others."""
        return {
            "temperature": 0.0 if sampling.greedy else sampling.temperature,
            "top_p": 1.0 if sampling.greedy else sampling.top_p,
            "top_k": 0 if sampling.greedy else sampling.top_k,
            "max_tokens": sampling.max_completion_length,
            "logprobs": 0,  # that of the chosen token, and no others
            "stop_token_ids": self._ends,
            "ignore_eos": True,
        }

    def _as_rows(self, answers: Sequence[Answer], device: torch.device) -> Generation:
        ids, mask = right_pad([answer.token_ids for answer in answers], self._pad)
        log_probs = torch.zeros(ids.shape)
        log_probs[mask] = torch.tensor([value for answer in answers for value in answer.log_probs])
        if not bool(torch.isfinite(log_probs).all()):
            raise TrainingError(
                "the engine reports a log-prob that is not finite",
                where="vLLM",
                got=str(log_probs[~torch.isfinite(log_probs)][0].item()),
                remedy="Check the model with generator: {type: transformers}; bfloat16 may be too coarse for it.",
            )
        return Generation(
            completion_ids=ids.to(device),
            completion_mask=mask.to(device),
            sampling_log_probs=log_probs.to(device),
            ended=torch.tensor([answer.token_ids[-1] in self._ends for answer in answers], device=device),
        )


def make_vllm_generator(
    config: VllmGeneratorConfig,
    model: Any,
    *,
    end_token_ids: Sequence[int],
    pad_token_id: int,
    accelerator: Accelerator,
    seed: int = 0,
) -> VllmGenerator:
    """Start the engine, or reach the server, and hand the weights over; all processes call it alike.

    Args:
        config: Settings.
        model: The policy's model, on its device.
        end_token_ids: Tokens that end a completion.
        pad_token_id: Fills completions after their end.
        accelerator: Whose processes take part.
        seed: Of the engine's own stream; not read with `request_seeds`.

    Raises:
        ConfigError: vLLM is not installed, or a server was started with other settings than it needs.
        ModelError: The engine does not start, or did not take the weights.
    """
    require_vllm()
    if config.server is not None:
        from rlhf.lm.vllm_server import ServerEngine

        engine: Engine = ServerEngine(config, accelerator)
    else:
        engine = InProcessEngine(config, model, accelerator=accelerator, seed=seed)
    generator = VllmGenerator(
        engine,
        model,
        end_token_ids=end_token_ids,
        pad_token_id=pad_token_id,
        max_length=config.max_length,
        request_seeds=config.request_seeds,
    )
    generator.synchronize()
    return generator


def require_vllm() -> None:
    """Say how to install vLLM where it is missing.

    Raises:
        ConfigError: It is missing.
    """
    if find_spec("vllm") is None:
        raise ConfigError(
            "vLLM is not installed",
            where="generator.type",
            got="vllm",
            remedy="Install it: pip install 'rlhf-toolkit[vllm]' (Linux, GPU), or set generator.type=transformers.",
        )


class InProcessEngine:
    """`vllm.LLM` inside a training process, on its GPU; every process has one for its own prompts.

    It starts from the model's config alone, with arbitrary weights: what it knows, `load` has given it.

    Args:
        config: Settings.
        model: Gives the config.
        accelerator: Whose process and device it is.
        seed: Of its own stream, with the process's number added.
    """

    def __init__(self, config: VllmGeneratorConfig, model: Any, *, accelerator: Accelerator, seed: int) -> None:
        _prepare_environment(accelerator)
        import vllm  # pyright: ignore[reportMissingImports]  # optional

        self._vllm, self._sleeps, self._awake = vllm, config.sleep, True
        with tempfile.TemporaryDirectory() as folder:
            _write_config(model, folder)
            try:
                self._llm: Any = vllm.LLM(
                    model=folder,
                    load_format="dummy",
                    skip_tokenizer_init=True,  # tokens in, tokens out
                    trust_remote_code=False,
                    generation_config="vllm",  # not the folder's repetition penalty and the like
                    dtype=config.dtype if config.dtype != "auto" else _dtype_name(model),
                    gpu_memory_utilization=config.memory_fraction,
                    max_model_len=config.max_length,
                    enforce_eager=config.eager,
                    enable_sleep_mode=config.sleep,
                    logprobs_mode="processed_logprobs",  # after temperature and filters: what was sampled from
                    distributed_executor_backend="external_launcher",  # one engine per process of ours, in that process
                    seed=seed + accelerator.process_index,
                    **({} if config.max_sequences is None else {"max_num_seqs": config.max_sequences}),
                )
            except (ValueError, RuntimeError, ImportError, OSError) as error:
                raise ModelError(
                    f"vLLM does not start: {(str(error).strip().splitlines() or [type(error).__name__])[0]}",
                    where="generator",
                    remedy="Lower generator.memory_fraction or max_length, or set generator.type=transformers.",
                ) from error

    def complete(
        self, prompts: Sequence[list[int]], *, count: int, settings: dict[str, Any], seeds: list[int] | None
    ) -> list[Answer]:
        """As in `Engine`."""
        self._wake()
        each = [None] * len(prompts) if seeds is None else seeds
        parameters = [
            self._vllm.SamplingParams(n=count, seed=seed, detokenize=False, **settings)  # no text is made of the tokens
            for seed in each
        ]
        outputs = self._llm.generate([{"prompt_token_ids": ids} for ids in prompts], parameters, use_tqdm=False)
        answers = [_read(completion) for output in outputs for completion in output.outputs]
        if self._sleeps:
            self._llm.sleep(level=1)
            self._awake = False
        return answers

    def load(self, weights: Callable[[], Iterator[tuple[str, Tensor]]]) -> None:
        """As in `Engine`; what was cached of prompts under the old weights is dropped."""
        self._wake()
        self._llm.apply_model(lambda model: _load_all(model, weights()))
        self._llm.reset_prefix_cache()

    def _wake(self) -> None:
        if not self._awake:
            self._llm.wake_up()
            self._awake = True


def _load_all(model: Any, weights: Iterator[tuple[str, Tensor]]) -> None:
    """Let vLLM's model fuse and place the weights, and make sure that none of its own was left out."""
    loaded = model.load_weights(weights)
    left_out = set() if loaded is None else {name for name, _ in model.named_parameters()} - set(loaded)
    if left_out:
        raise ModelError(
            "vLLM's model has weights that the trained model did not give it",
            where="generator",
            got=", ".join(sorted(left_out)[:3]),
            remedy="Set generator.type=transformers for this architecture.",
        )


def _read(completion: Any) -> Answer:
    """Read vLLM's `CompletionOutput`: `logprobs` holds a mapping per token, from token id to `Logprob`."""
    ids = [int(token) for token in completion.token_ids]
    if not ids or completion.logprobs is None or len(completion.logprobs) != len(ids):
        raise TrainingError(
            "the engine gave up on an answer", where="vLLM", got=f"{len(ids)} tokens, {completion.finish_reason}"
        )
    return Answer(ids, [float(at[token].logprob) for token, at in zip(ids, completion.logprobs, strict=True)])


def _write_config(model: Any, folder: str) -> None:
    """config.json is all that the engine reads; a model that was never saved does not know its class's name yet."""
    base = unwrap_adapters(model)
    config = type(base.config).from_dict(base.config.to_dict())
    config.architectures = [type(base).__name__]
    config.save_pretrained(folder)


def _dtype_name(model: Any) -> str:
    return str(next(unwrap_adapters(model).parameters()).dtype).removeprefix("torch.")


def _prepare_environment(accelerator: Accelerator) -> None:
    """What vLLM reads of the launcher, also where there was none; and no reports of usage."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if accelerator.num_processes > 1:
        return  # the launcher set them
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in alone.items():
        os.environ.setdefault(name, value)
