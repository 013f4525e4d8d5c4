"""Decode and update on one GPU, with the shape of Qwen2.5-0.5B and random weights.

    python benchmarks/gpu.py                 # writes benchmarks/results/gpu.md

Weights are float32, products bfloat16 by autocast. Decoding: prompts of 128 tokens, 8 completions of each, every
completion runs to the limit; the second of two runs counts. `graph` is the recorded step, `fused` the same step
launched operation by operation, `model` the model's own layers on the in-place cache, `generate` transformers' own
loop (its first run counts). Updating: log-probs and entropy of 64 rows of 384 tokens, forward and backward; the last
of four runs counts.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf.lm.compilation import compile_layers
from rlhf.lm.generation import TransformersGenerator
from rlhf.lm.policy import LanguageModelPolicy
from rlhf.lm.sampling import SamplingConfig

SHAPE = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151_936,
    "tie_word_embeddings": True,
    "max_position_embeddings": 4096,
}
GROUP, PROMPT, LIMIT, SHORT_LIMIT = 8, 128, 256, 64
RESULTS = Path(__file__).parent / "results" / "gpu.md"


def make_model() -> Any:
    """The model on the GPU."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **SHAPE), dtype=torch.float32).eval()


def measure(work: Callable[[], Any]) -> tuple[float, float, Any]:
    """Seconds, GiB beyond what was allocated before, and what the work returns."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.synchronize()
    started = time.perf_counter()
    result = work()
    torch.cuda.synchronize()
    return time.perf_counter() - started, (torch.cuda.max_memory_allocated() - before) / 2**30, result


def random_prompts(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask [count, PROMPT]."""
    ids = torch.randint(5, 150_000, (count, PROMPT), device="cuda")
    return ids, torch.ones_like(ids, dtype=torch.bool)


def make_generator(model: Any, path: str, dtype: torch.dtype | None) -> TransformersGenerator:
    """A generator that decodes by `path` and never meets an end token."""
    generator = TransformersGenerator(
        model, end_token_ids=SHAPE["vocab_size"], pad_token_id=0, dtype=dtype, cuda_graphs=path == "graph"
    )
    if path == "model":
        assert generator._plan is not None
        generator._plan = dataclasses.replace(generator._plan, can_fuse=False)
    return generator


def decode(model: Any) -> list[str]:
    """Rows of the decode table."""
    rows = []
    for dtype, count, paths in (
        (torch.bfloat16, 8, ("graph", "fused", "model")),
        (torch.bfloat16, 64, ("graph", "fused")),
        (None, 8, ("graph", "fused", "model")),
    ):
        prompts = random_prompts(count)
        for path in paths:
            generator = make_generator(model, path, dtype)
            sampling = SamplingConfig(max_completion_length=SHORT_LIMIT if path == "model" else LIMIT)
            for _ in range(2):
                work = functools.partial(generator.generate, *prompts, group_size=GROUP, sampling=sampling)
                seconds, gib, _ = measure(work)
            rows.append(decode_row(dtype, count * GROUP, path, sampling.max_completion_length, seconds, gib))
    return [*rows, generate_row(model)]


def decode_row(dtype: torch.dtype | None, rows: int, path: str, tokens: int, seconds: float, gib: float | None) -> str:
    """One line of the decode table."""
    products = "bfloat16" if dtype is not None else "float32"
    memory = "" if gib is None else f"{gib:.2f}"
    return (
        f"| {products} | {rows} | {path} | {tokens} | {seconds / tokens * 1e3:.2f} "
        f"| {rows * tokens / seconds:,.0f} | {memory} |"
    )


def generate_row(model: Any) -> str:
    """The loop of transformers itself."""
    ids, mask = (tensor.repeat_interleave(GROUP, 0) for tensor in random_prompts(8))
    settings = {"max_new_tokens": SHORT_LIMIT, "min_new_tokens": SHORT_LIMIT, "do_sample": True, "top_k": 0}
    with torch.autocast("cuda", torch.bfloat16), torch.no_grad():
        seconds, gib, _ = measure(lambda: model.generate(ids, attention_mask=mask.long(), pad_token_id=0, **settings))
    return decode_row(torch.bfloat16, len(ids), "generate", SHORT_LIMIT, seconds, gib)


def mismatch(model: Any) -> str:
    """How far sampler and trainer are apart in bfloat16, beside the trainer's own rounding."""
    ids, mask = random_prompts(8)
    result = make_generator(model, "graph", torch.bfloat16).generate(
        ids, mask, group_size=GROUP, sampling=SamplingConfig(max_completion_length=LIMIT)
    )
    inputs = {"prompt_ids": ids, "prompt_mask": mask}
    inputs = {name: tensor.repeat_interleave(GROUP, 0) for name, tensor in inputs.items()}
    inputs["completion_mask"] = result.completion_mask
    policy = LanguageModelPolicy(model)
    with torch.no_grad():
        exact = policy(inputs, result.completion_ids).log_probs
        with torch.autocast("cuda", torch.bfloat16):
            rounded = policy(inputs, result.completion_ids).log_probs
    apart, rounding = (rounded - result.sampling_log_probs).abs(), (rounded - exact).abs()
    return (
        f"Log-probs of the sampler and of the trainer, both bfloat16, differ by {apart.mean():.4f} on average "
        f"(at most {apart.max():.3f}); the trainer's from its own in float32 by {rounding.mean():.4f} "
        f"(at most {rounding.max():.3f})."
    )


def update(model: Any) -> list[str]:
    """Rows of the update table."""
    rows = [update_row(model, "bfloat16")]
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    rows.append(update_row(model, "bfloat16, gradient checkpointing"))
    model.gradient_checkpointing_disable()
    rows.append(update_row(model, "float32", autocast=False))
    compile_layers(model, "inductor")
    return [*rows, update_row(model, "bfloat16, compiled layers")]


def update_row(model: Any, label: str, *, autocast: bool = True) -> str:
    """One line of the update table."""
    ids, mask = random_prompts(64)
    actions = torch.randint(5, 150_000, (64, LIMIT), device="cuda")
    inputs = {"prompt_ids": ids, "prompt_mask": mask, "completion_mask": torch.ones_like(actions, dtype=torch.bool)}
    policy = LanguageModelPolicy(model).train()

    def forward() -> Any:
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            return policy(inputs, actions)

    def both() -> float:
        seconds, _, output = measure(forward)
        (output.log_probs.mean() + output.entropy.mean()).backward()
        model.zero_grad(set_to_none=True)
        return seconds

    runs = [measure(both) for _ in range(4)]
    seconds, gib, forward_seconds = runs[-1]
    return (
        f"| {label} | {forward_seconds * 1e3:.0f} | {(seconds - forward_seconds) * 1e3:.0f} | {runs[0][0]:.1f} "
        f"| {gib:.1f} |"
    )


def write(decoding: list[str], apart: str, updating: list[str], machine: str) -> None:
    """Write the page."""
    lines = [
        "# One GPU: decode and update",
        "",
        f"Qwen2.5-0.5B's shape, random float32 weights; {machine}. `python benchmarks/gpu.py` says how it is measured.",
        "",
        "| products | rows | path | tokens a row | ms a step | tokens/s | GiB beyond the weights |",
        "|---|---|---|---|---|---|---|",
        *decoding,
        "",
        apart,
        "",
        "| update of 64 x 384 tokens | forward ms | backward ms | first run s | GiB beyond the weights |",
        "|---|---|---|---|---|",
        *updating,
    ]
    RESULTS.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def main() -> None:
    """Measure everything."""
    model = make_model()
    import transformers

    machine = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, transformers {transformers.__version__}"
    write(decode(model), mismatch(model), update(model), machine)


if __name__ == "__main__":
    main()
