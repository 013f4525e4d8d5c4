"""The fused decode step against the models' own forward."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.lm import decoding, fused_decoding
from rlhf.lm.backbone import LogitsHead
from rlhf.lm.cache import InPlaceCache, padding_bias
from rlhf.lm.fused_decoding import read_fused_step, read_head
from rlhf.lm.fused_probe import fusing_is_exact
from rlhf.lm.generation import TransformersGenerator
from rlhf.lm.loading import LoraSettings, add_lora
from rlhf.lm.policy import LanguageModelPolicy
from rlhf.lm.sampling import SamplingConfig
from tests.lm.fresh_models import END, PAD, fresh_model, left_padded

SHARED = Path(__file__).resolve().parents[2] / ".." / "shared"
ROPE = {"rope_theta": 10000.0, "factor": 4.0}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
FUSED = {
    "llama": ("llama", {}),
    "all_heads": ("llama_tied", {}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "one_key_head": ("llama", {"num_key_value_heads": 1}),
    "wide_heads": ("llama", {"head_dim": 14}),
    "gelu": ("llama", {"hidden_act": "gelu"}),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", **ROPE}}),
    "dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", **ROPE}}),
    "llama3": ("llama", {"rope_parameters": {"rope_type": "llama3", **ROPE, **LLAMA3}}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "mistral": ("mistral", {"sliding_window": None}),
}


def make(model, **settings):
    return TransformersGenerator(model, **{"end_token_ids": END, "pad_token_id": PAD, **settings})


def randomized(name, changes):
    """Vectors too: fresh biases are 0 and fresh norms 1, so that mistakes in them would not show."""
    model = fresh_model(name, **changes)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


@pytest.mark.parametrize("table", [0, 11])
@pytest.mark.parametrize("case", FUSED)
@torch.no_grad()
def test_hidden_states_and_logits_equal_those_of_one_forward_over_the_whole(case, table):
    model = randomized(*FUSED[case])
    assert fusing_is_exact(model.model)
    ids, mask = left_padded((9, 6, 11), width=11)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    settings = {"attention_mask": mask.long(), "position_ids": positions}
    hidden = model.model(input_ids=ids, **settings, use_cache=False)[0][:, 5:]
    logits = model(input_ids=ids, **settings, use_cache=False).logits[:, 5:]
    cache = InPlaceCache(2, capacity=11)
    model.model(input_ids=ids[:, :5], attention_mask=mask[:, :5], position_ids=positions[:, :5], past_key_values=cache)
    bias, step = padding_bias(mask, torch.float32), read_fused_step(model.model, positions=table)
    step.take_over(cache)
    cache.start_decoding(1, share=False, prompt_mask=mask[:, :5])
    for column in range(5, 11):
        got = step(ids[:, column], positions[:, column, None], cache=cache, mask=bias[..., : column + 1])
        torch.testing.assert_close(got, hidden[:, column - 5], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(model.lm_head(got), logits[:, column - 5], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("group_size", "short"), [(1, 0), (4, 0), (4, 32)])
@pytest.mark.parametrize("case", FUSED)
def test_samples_equal_those_of_the_models_own_forward(case, group_size, short, monkeypatch):
    monkeypatch.setattr(decoding, "SHORT_PROMPT", short)  # 0: prompts are kept apart; 32: repeated for their group
    model = randomized(*FUSED[case])
    model.lm_head.weight.data *= 0.3  # flatter, so that rows end at different steps and leave the batch
    generator = make(model)
    assert generator.decode_path == "fused"
    results = []
    for path in ("fused", "model"):
        if path == "model":
            model.model.register_forward_hook(lambda *_: None)  # a hook wants to see every step
        results.append(
            generator.generate(
                *left_padded((3, 9, 5)),
                group_size=group_size,
                sampling=SamplingConfig(max_completion_length=30),
                generator=torch.Generator().manual_seed(5),
            )
        )
        assert generator.decode_path == path
    assert torch.equal(results[0].completion_ids, results[1].completion_ids)
    torch.testing.assert_close(results[0].sampling_log_probs, results[1].sampling_log_probs, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not (SHARED / "models").exists(), reason="the shared real models are not here")
@pytest.mark.parametrize("name", ["stories260K", "TinyStories-656K", "babyllama-105"])
def test_real_models_continue_as_transformers_does(name):
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models" / name, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(SHARED / "models" / name).eval()
    batch = tokenizer(["Once upon a time", "Lily", "The cat and the dog"], padding=True, return_tensors="pt")
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    settings = {"max_new_tokens": 60, "do_sample": False, "eos_token_id": end, "pad_token_id": pad}
    expected = model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], **settings)
    generator = make(model, end_token_ids=end, pad_token_id=pad)
    generation = generator.generate(
        batch["input_ids"],
        batch["attention_mask"].bool(),
        group_size=2,
        sampling=SamplingConfig(max_completion_length=60, greedy=True),
    )
    assert generator.decode_path == "fused"
    expected = expected[:, batch["input_ids"].shape[1] :].repeat_interleave(2, dim=0)
    assert torch.equal(generation.completion_ids, expected)


def test_weights_of_the_last_optimizer_step_decode():
    model = fresh_model()
    generator, (prompt_ids, prompt_mask) = make(model), left_padded((3, 7))
    sampling = SamplingConfig(max_completion_length=15, greedy=True)
    before = generator.generate(prompt_ids, prompt_mask, sampling=sampling).completion_ids
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(input_ids=prompt_ids, labels=prompt_ids).loss.backward()
    optimizer.step()
    after = generator.generate(prompt_ids, prompt_mask, sampling=sampling).completion_ids
    settings = {"max_new_tokens": 15, "do_sample": False, "eos_token_id": END, "pad_token_id": PAD}
    expected = model.generate(prompt_ids, attention_mask=prompt_mask.long(), **settings)[:, 7:]
    assert generator.decode_path == "fused"
    assert after.tolist() != before.tolist()
    assert torch.equal(after, expected)


@pytest.mark.parametrize("name", ["gpt2", "gemma", "gemma2", "granite", "cohere", "phi3", "mixtral", "mistral"])
def test_other_models_take_their_own_forward(name):
    assert make(fresh_model(name)).decode_path == "model"


def with_adapters(name, dtype=torch.float32, **settings):
    """A model whose fresh adapters, which would do nothing, do something."""
    model = add_lora(fresh_model(name).to(dtype), LoraSettings(rank=4, **settings))
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model.eval()


@pytest.mark.parametrize("limit", [2**22, 0])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_adapters_decode_too(name, limit, monkeypatch):
    monkeypatch.setattr(fused_decoding, "MERGE_LIMITS", {"cpu": limit})  # adapters in the matrix, or beside it
    model, (ids, mask) = with_adapters(name), left_padded((3, 9, 5))
    generator, sampling = make(model), SamplingConfig(max_completion_length=15, greedy=True)
    settings = {"max_new_tokens": 15, "do_sample": False, "eos_token_id": END, "pad_token_id": PAD}
    results = []
    for adapter_off in (False, True):
        with model.disable_adapter() if adapter_off else nullcontext():
            got = generator.generate(ids, mask, sampling=sampling).completion_ids
            expected = model.generate(input_ids=ids, attention_mask=mask.long(), **settings)[:, ids.shape[1] :]
        assert generator.decode_path == "fused"
        assert torch.equal(got, expected)
        results.append(got.tolist())
    assert results[0] != results[1]


def test_adapters_in_float32_on_a_bfloat16_model_decode_too():
    model, (ids, mask) = with_adapters("llama", torch.bfloat16), left_padded((3, 9, 5))
    assert {p.dtype for p in model.parameters()} == {torch.float32, torch.bfloat16}
    generator = make(model)
    result = generator.generate(ids, mask, group_size=8, sampling=SamplingConfig(max_completion_length=15))
    assert generator.decode_path == "fused"
    inputs = {"prompt_ids": ids.repeat_interleave(8, 0), "prompt_mask": mask.repeat_interleave(8, 0)}
    inputs["completion_mask"] = result.completion_mask
    with torch.no_grad():
        trainers = LanguageModelPolicy(model)(inputs, result.completion_ids).log_probs
        exact = LanguageModelPolicy(model.float())(inputs, result.completion_ids).log_probs
    rounding = (trainers - exact).abs()[result.completion_mask].mean()
    assert (trainers - result.sampling_log_probs).abs()[result.completion_mask].mean() < 1.5 * rounding


def test_adapters_that_do_more_take_the_models_own_forward():
    from peft import LoraConfig, get_peft_model

    model = fresh_model()
    generator = make(model)
    assert generator.decode_path == "fused"
    # added after the plan was made
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], use_dora=True))
    generator.generate(*left_padded((3,)), sampling=SamplingConfig(max_completion_length=3))
    assert generator.decode_path == "model"
    assert make(adapted).decode_path == "model"


@pytest.mark.parametrize("fault", ["scaling", "norm"])
def test_probe_sees_faults_that_a_small_fresh_model_hides(fault):
    # Weights of standard deviation 0.02: scores are near 0, attention is nearly uniform whatever makes them.
    model = fresh_model()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.02)
    assert fusing_is_exact(model.model)
    if fault == "scaling":
        for layer in model.model.layers:  # its class ignores `scaling`
            layer.self_attn.__class__ = type("Other", (type(layer.self_attn),), {"forward": _without_scaling})
    else:
        model.model.norm.__class__ = type("Other", (type(model.model.norm),), {"forward": _layer_norm})
    assert not fusing_is_exact(model.model)


def _without_scaling(self, *args, **kwargs):
    scaling, self.scaling = self.scaling, 1.0
    try:
        return super(type(self), self).forward(*args, **kwargs)
    finally:
        self.scaling = scaling


def _layer_norm(self, hidden):
    return torch.nn.functional.layer_norm(hidden, hidden.shape[-1:], self.weight, None, self.variance_epsilon)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_head_with_a_hook_runs_itself(dtype):
    """What the hook does to the logits must reach the sampler, also where products are rounded."""
    model = fresh_model("llama")
    head = LogitsHead(model.lm_head)
    hidden = torch.randn(3, model.lm_head.in_features)
    plain = read_head(head, dtype)(hidden)
    model.lm_head.register_forward_hook(lambda _module, _arguments, logits: logits - 60.0)
    assert torch.allclose(read_head(head, dtype)(hidden), plain - 60.0, atol=1e-1)


def test_probe_leaves_the_weights_alone():
    model = fresh_model()
    before = {name: (parameter, parameter.clone()) for name, parameter in model.named_parameters()}
    assert fusing_is_exact(model.model)
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is parameter and torch.equal(parameter, copy) for name, (parameter, copy) in before.items())
    assert all(parameter.requires_grad for parameter in after.values())
