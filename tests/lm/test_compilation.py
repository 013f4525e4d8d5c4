"""torch.compile changes no number; `eager` traces without compiling kernels, so that most of this is quick."""

import json

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import LlamaConfig

from rlhf.errors import ModelError
from rlhf.lm.compilation import compile_layers, compiled_backend
from rlhf.lm.generation import TransformersGenerator
from rlhf.lm.loading import LoraSettings, ModelConfig, add_lora, load_causal_lm
from rlhf.lm.policy import LanguageModelPolicy
from rlhf.lm.reference import FrozenReference
from rlhf.lm.sampling import SamplingConfig
from tests.lm.fresh_models import END, PAD, fresh_model, left_padded
from tests.lm.test_policy import batch
from tests.recipes.test_language_recipes import MODEL, run, settings

SHAPES = [{}, {"prompt_lengths": (2, 8), "completion_lengths": (3, 5)}, {"completion_lengths": (11, 4, 2, 6)}]


def outcomes(policy):
    """Log-probs and gradients at batches of several shapes."""
    found = []
    for shape in SHAPES:
        policy.zero_grad()
        output = policy(*batch(**shape))
        output.log_probs.sum().backward()
        gradients = [parameter.grad for parameter in policy.parameters() if parameter.grad is not None]
        found += [output.log_probs.detach(), *(gradient.clone() for gradient in gradients)]
    return found


def prepared(name, *, lora, checkpointing):
    model = fresh_model(name)
    if lora:
        model = add_lora(model, LoraSettings(rank=2))
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_B" in key:
                    parameter.normal_(std=0.1)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


@pytest.mark.parametrize(
    ("lora", "checkpointing"), [(False, False), pytest.param(True, False, marks=pytest.mark.slow), (False, True)]
)
def test_log_probs_and_gradients_are_those_of_the_layers_as_written(lora, checkpointing):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = prepared("llama", lora=lora, checkpointing=checkpointing)
    policy = LanguageModelPolicy(model, critic="head")
    expected = outcomes(policy)
    compile_layers(model, "eager")
    counters.clear()
    found = outcomes(policy)
    assert counters["frames"]["ok"] >= 1, "nothing was traced"
    assert not counters["graph_break"]
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # without compilation, the fused pass sums otherwise


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_fused_kernels_agree_up_to_rounding(name):
    torch._dynamo.reset()
    model = fresh_model(name)
    policy = LanguageModelPolicy(model)
    expected = outcomes(policy)
    compile_layers(model, "inductor")
    for a, b in zip(outcomes(policy), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])  # one decodes through fused steps, one through its own layers
def test_generation_runs_the_layers_as_they_were_written(name):
    torch._dynamo.reset()
    model = fresh_model(name)
    generator = TransformersGenerator(model, end_token_ids=END, pad_token_id=PAD)
    arguments = {"group_size": 2, "sampling": SamplingConfig(max_completion_length=8, greedy=True)}
    expected = generator.generate(*left_padded((3, 5)), **arguments)
    compile_layers(model, "eager")
    counters.clear()
    found = generator.generate(*left_padded((3, 5)), **arguments)
    assert torch.equal(found.completion_ids, expected.completion_ids)
    assert counters["frames"]["total"] == 0


def test_the_reference_is_compiled_as_the_policy_is():
    model = fresh_model("llama")
    compile_layers(model, "eager")
    policy = LanguageModelPolicy(model)
    reference = FrozenReference(policy)
    assert compiled_backend(reference._policy) == "eager"
    inputs, actions = batch()
    with torch.no_grad():
        assert torch.equal(reference.log_probs(inputs, actions), policy(inputs, actions).log_probs)


def test_a_model_without_such_layers_is_refused():
    with pytest.raises(ModelError, match=r"model\.compile"):
        compile_layers(torch.nn.Linear(2, 2), "eager")


def test_saved_folders_know_nothing_of_it(tmp_path):
    model = fresh_model("llama")
    compile_layers(model, "eager")
    LanguageModelPolicy(model).save(tmp_path)
    assert compiled_backend(load_causal_lm(ModelConfig(path=str(tmp_path)))) is None
    assert "compile" not in (tmp_path / "config.json").read_text()
    assert LlamaConfig.from_pretrained(tmp_path).hidden_size == 32


@pytest.mark.slow
def test_a_run_with_it_has_the_numbers_of_one_without(tmp_path):
    torch._dynamo.reset()

    def lines(name, **model):
        values = settings(tmp_path / name, algorithm="ppo_rlhf", model={"config": MODEL, **model}, critic="copy")
        run("ppo_rlhf", values)
        read = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return [{key: value for key, value in line.items() if "time" not in key and key != "seconds"} for line in read]

    for a, b in zip(lines("compiled", compile="eager"), lines("plain"), strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            assert value == pytest.approx(b[key], rel=1e-4, abs=1e-6), key
