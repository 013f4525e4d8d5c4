"""What only a GPU can show: CUDA graphs, bfloat16, compiled layers, memory. Skipped where there is none."""

import math

import pytest
import torch
from accelerate.state import AcceleratorState

from rlhf.core.algorithm import AlgorithmConfig
from rlhf.core.presets import resolve_algorithm
from rlhf.data.records import Prompt
from rlhf.lm.collector import PromptCollector
from rlhf.lm.collector_config import CollectorConfig
from rlhf.lm.compilation import compile_layers
from rlhf.lm.generation import TransformersGenerator
from rlhf.lm.loading import ModelConfig, character_tokenizer, load_causal_lm
from rlhf.lm.log_probs import selected_log_probs
from rlhf.lm.policy import LanguageModelPolicy
from rlhf.lm.sampling import SamplingConfig
from rlhf.training.distributed import make_accelerator
from rlhf.training.learner import Learner
from rlhf.training.update_config import UpdateConfig
from tests.lm.fresh_models import PAD, fresh_model, left_padded, mixed_precision_gaps

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
ENDS = [2, 3, 4]
"""Several, so that rows end at different steps."""


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """A process has one mixed precision; each test chooses its own."""
    AcceleratorState._reset_state(reset_partial_state=True)


def on_gpu(prompts):
    return tuple(tensor.cuda() for tensor in prompts)


def loud(name, **changes):
    model = fresh_model(name, **changes).cuda()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(4.0)
    return model


def make(model, **settings):
    return TransformersGenerator(model, **{"end_token_ids": ENDS, "pad_token_id": PAD, **settings})


@pytest.mark.parametrize("name", ["llama", "llama_tied", "qwen2", "qwen3"])
def test_graphs_continue_as_transformers_does(name):
    model, (ids, mask) = loud(name), on_gpu(left_padded((3, 9, 5)))
    generator = make(model)
    got = generator.generate(ids, mask, sampling=SamplingConfig(max_completion_length=60, greedy=True))
    assert generator.decode_path == "graph"
    expected = model.generate(
        ids, attention_mask=mask.long(), max_new_tokens=60, do_sample=False, eos_token_id=ENDS, pad_token_id=PAD
    )[:, ids.shape[1] :]
    assert torch.equal(got.completion_ids, expected)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("length", [20, 110])
def test_graphs_draw_what_the_other_loop_draws(name, length):
    model, prompts = loud(name), on_gpu(left_padded((3, 9, 5, 7)))
    settings = {"group_size": 16, "sampling": SamplingConfig(max_completion_length=length, top_p=0.9)}
    got, expected = (
        make(model, cuda_graphs=graphs).generate(*prompts, **settings, generator=torch.Generator().manual_seed(3))
        for graphs in (True, False)
    )
    assert len(expected.completion_mask.sum(dim=1).unique()) > 3
    assert torch.equal(got.completion_ids, expected.completion_ids)
    torch.testing.assert_close(got.sampling_log_probs, expected.sampling_log_probs, atol=1e-4, rtol=1e-4)


def test_graphs_follow_training():
    model, prompts = loud("llama"), on_gpu(left_padded((3, 9)))
    generator, sampling = make(model), SamplingConfig(max_completion_length=30, greedy=True)
    before = generator.generate(*prompts, sampling=sampling)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    after = generator.generate(*prompts, sampling=sampling)
    assert not torch.equal(before.completion_ids, after.completion_ids)
    eager = make(model, cuda_graphs=False).generate(*prompts, sampling=sampling)
    assert torch.equal(after.completion_ids, eager.completion_ids)


@pytest.mark.parametrize("graphs", [False, True])
def test_mixed_precision_samples_what_the_trainer_scores(graphs):
    model, (ids, mask) = loud("qwen2"), on_gpu(left_padded((3, 9, 5)))
    generator = make(model, dtype=torch.bfloat16, cuda_graphs=graphs)
    result = generator.generate(ids, mask, group_size=32, sampling=SamplingConfig(max_completion_length=40))
    assert generator.decode_path == ("graph" if graphs else "fused")
    rounding, mismatch = mixed_precision_gaps(model, (ids, mask), result, group_size=32)
    assert rounding > 1e-3
    assert mismatch < 1.5 * rounding


def test_log_probs_equal_the_cpus_and_never_hold_all_logits():
    torch.manual_seed(0)
    head = torch.nn.Linear(64, 100_000, bias=False)
    hidden, targets = torch.randn(256, 64), torch.randint(100_000, (256,))
    results = []
    for device in ("cpu", "cuda"):
        head, own = head.to(device), hidden.detach().clone().to(device).requires_grad_()
        head.weight.grad = None
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        log_probs, entropy = selected_log_probs(own, head, targets.to(device), chunk_tokens=16)
        (log_probs.sum() + entropy.sum()).backward()
        results.append([tensor.detach().cpu() for tensor in (log_probs, entropy, own.grad, head.weight.grad)])
    for cpu, gpu in zip(*results, strict=True):
        torch.testing.assert_close(gpu, cpu, atol=2e-3, rtol=2e-3)
    logits = 256 * 100_000 * 4
    weights = 3 * 64 * 100_000 * 4  # gradient, its sum, and one chunk's
    assert torch.cuda.max_memory_allocated() - before < weights + logits / 4


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_grpo_learns(precision):
    torch.manual_seed(0)
    tokenizer = character_tokenizer("abcdefgh")
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = load_causal_lm(ModelConfig(config={"model_type": "llama", **shape}), tokenizer).cuda()
    algorithm = AlgorithmConfig.model_validate(resolve_algorithm({"preset": "grpo", "kl": {"type": "none"}}))
    accelerator = make_accelerator(mixed_precision=precision)
    policy = LanguageModelPolicy(model)
    generator = make(
        model,
        end_token_ids=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype=torch.bfloat16 if precision == "bf16" else None,
    )
    learner = Learner(policy, algorithm, UpdateConfig(learning_rate=3e-3), accelerator=accelerator)
    config = CollectorConfig(
        prompts_per_iteration=8, group_size=8, sampling=SamplingConfig(max_completion_length=8), samples=0
    )
    collector = PromptCollector(
        [Prompt(text) for text in ("a", "b", "ab", "ba")],
        policy=policy,
        generator=generator,
        tokenizer=tokenizer,
        reward=lambda completions, **_: [text.count("c") / 8 for text in completions],
        config=config,
        algorithm=algorithm,
        accelerator=accelerator,
    )
    from rlhf.core.estimate import estimate

    scores = []
    for _ in range(60):
        rollout = collector.collect()
        scores.append(rollout.metrics["rollout/score_mean"])
        metrics = learner.update(estimate(rollout, algorithm))
        assert all(math.isfinite(value) for value in metrics.values())
    assert generator.decode_path == "graph"
    if precision == "bf16":  # its sampler rounds otherwise, so that the one step gives the old log-probs
        assert rollout.on_policy
        assert metrics["ratio"] == 1.0
        assert metrics["sampling_mismatch_mean"] < 0.05
    assert sum(scores[:5]) / 5 < 0.25
    assert sum(scores[-5:]) / 5 > 0.6


def test_compiled_layers_give_the_same_numbers():
    model, (ids, mask) = loud("llama"), on_gpu(left_padded((3, 9, 5)))
    policy = LanguageModelPolicy(model)
    inputs = {"prompt_ids": ids, "prompt_mask": mask, "completion_mask": torch.ones_like(ids, dtype=torch.bool)}
    actions = torch.randint(3, 60, ids.shape, device="cuda")

    def scores():
        model.zero_grad()
        output = policy(inputs, actions)
        output.log_probs.sum().backward()
        return output.log_probs.detach().clone(), model.model.layers[0].mlp.up_proj.weight.grad.clone()

    plain = scores()
    compile_layers(model, "inductor")
    for compiled, expected in zip(scores(), plain, strict=True):
        torch.testing.assert_close(compiled, expected, atol=1e-3, rtol=1e-3)
