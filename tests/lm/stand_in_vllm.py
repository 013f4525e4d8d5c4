"""The parts of vLLM that `rlhf.lm.vllm_generator` uses, on a CPU: same names, arguments, refusals; another sampler.

Names and rules were read from the sources of vLLM 0.22.0 and 0.33.0: `entrypoints/llm.py`, `sampling_params.py`,
`outputs.py`, `logprobs.py`, `v1/sample/sampler.py`, `v1/core/sched/utils.py`, `v1/engine/parallel_sampling.py`. What
it cannot show: kernels that round otherwise, memory, speed, CUDA graphs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

ENGINE_ARGUMENTS = set(
    "load_format skip_tokenizer_init trust_remote_code generation_config dtype gpu_memory_utilization max_model_len "
    "enforce_eager enable_sleep_mode logprobs_mode distributed_executor_backend seed max_num_seqs".split()
)


@dataclass
class SamplingParams:
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    logprobs: int | None = None
    detokenize: bool = True

    def __post_init__(self) -> None:
        if self.temperature < 1e-5 and self.n > 1:
            raise ValueError(f"n must be 1 when using greedy sampling, got {self.n}.")


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


class EngineModel(torch.nn.Module):
    """vLLM's model: fused names of its own, filled by names of a checkpoint."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.inner = model

    @torch.no_grad()
    def load_weights(self, weights: Any) -> set[str]:
        own = dict(self.inner.named_parameters())
        loaded = set()
        for name, tensor in weights:
            own[name].copy_(tensor)  # KeyError for a name that no checkpoint of this model has, as in vLLM
            loaded.add(f"inner.{name}")
        return loaded


class LLM:
    started: list[LLM] = []
    """Every engine of a test; the fixture clears it."""

    def __init__(self, model: str, **arguments: Any) -> None:
        unknown = set(arguments) - ENGINE_ARGUMENTS
        assert not unknown, f"vLLM's EngineArgs have no {unknown}"
        self.arguments, self.files = arguments, sorted(file.name for file in Path(model).iterdir())
        config = AutoConfig.from_pretrained(model)
        torch.manual_seed(99)  # load_format dummy: arbitrary weights
        assert config.architectures, "vLLM chooses its model class by config.architectures"
        with torch.random.fork_rng():
            built = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, arguments["dtype"]))
        self.model = EngineModel(built.eval())
        self.limit = arguments["max_model_len"] or config.max_position_embeddings
        self.stream = torch.Generator().manual_seed(arguments["seed"])
        self.asleep, self.cache_is_stale, self.loads, self.calls = False, False, 0, []
        LLM.started.append(self)

    def apply_model(self, func: Any) -> list[Any]:
        assert not self.asleep, "weights are written to memory that is not there"
        self.loads, self.cache_is_stale = self.loads + 1, True
        return [func(self.model)]

    def reset_prefix_cache(self) -> bool:
        self.cache_is_stale = False
        return True

    def sleep(self, level: int = 1) -> None:
        assert level == 1, "level 2 would lose the weights"
        assert self.arguments["enable_sleep_mode"]
        self.asleep = True

    def wake_up(self, tags: list[str] | None = None) -> None:
        self.asleep = False

    @torch.no_grad()
    def generate(self, prompts: list[dict], sampling_params: list[SamplingParams], *, use_tqdm: bool = True) -> list:
        assert not self.asleep
        assert not self.cache_is_stale, "the prefix cache holds keys and values of other weights"
        assert len(prompts) == len(sampling_params)
        self.calls.append(sampling_params)
        return [
            SimpleNamespace(prompt_token_ids=prompt["prompt_token_ids"], outputs=self._answers(prompt, parameters))
            for prompt, parameters in zip(prompts, sampling_params, strict=True)
        ]

    def _answers(self, prompt: dict, parameters: SamplingParams) -> list:
        answers = []
        for index in range(parameters.n):
            source = self.stream
            if parameters.seed is not None:  # each of n gets the seed plus its number
                source = torch.Generator().manual_seed(parameters.seed + index)
            answers.append(self._answer(list(prompt["prompt_token_ids"]), parameters, source))
        return answers

    def _answer(self, prompt: list[int], parameters: SamplingParams, source: torch.Generator) -> Any:
        ids, log_probs, reason = [], [], "length"
        while len(ids) < parameters.max_tokens and len(prompt) + len(ids) < self.limit:
            logits = self.model.inner(torch.tensor([prompt + ids])).logits[0, -1].float()
            greedy = parameters.temperature < 1e-5
            if not greedy:
                logits = filtered(logits / parameters.temperature, parameters)
            logged = logits.log_softmax(-1)
            token = int(logits.argmax()) if greedy else int(torch.multinomial(logged.exp(), 1, generator=source))
            ids.append(token)
            log_probs.append({token: Logprob(logged[token].item(), rank=1)})
            if token in (parameters.stop_token_ids or ()):
                reason = "stop"
                break
        return SimpleNamespace(token_ids=ids, logprobs=log_probs, finish_reason=reason, text="")


def filtered(logits: torch.Tensor, parameters: SamplingParams) -> torch.Tensor:
    ordered, order = logits.sort(descending=True)
    kept = torch.ones_like(ordered, dtype=torch.bool)
    if parameters.top_k > 0:
        kept[parameters.top_k :] = False
    probabilities = ordered.masked_fill(~kept, float("-inf")).softmax(-1)
    kept &= probabilities.cumsum(-1) - probabilities < parameters.top_p
    return torch.empty_like(logits).scatter_(0, order, ordered.masked_fill(~kept, float("-inf")))
