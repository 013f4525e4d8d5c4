"""QLoRA by bitsandbytes itself, on a CPU: what is frozen, learns and is saved. Needs the extra `quantization`."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rlhf.commands.recipes import find_recipe, import_recipe
from rlhf.config import validate
from rlhf.lm.generation import TransformersGenerator
from rlhf.lm.loading import LoraSettings, ModelConfig, load_causal_lm
from rlhf.lm.policy import LanguageModelPolicy
from rlhf.lm.sampling import SamplingConfig
from tests.lm.fresh_models import END, PAD, VOCABULARY, fresh_model

pytest.importorskip("bitsandbytes")

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="these are of a CPU; see test_on_gpu.py"),
    pytest.mark.filterwarnings("ignore"),
]
SHAPE = {"hidden_size": 64, "intermediate_size": 172}
# The 16 numbers of 4-bit NormalFloat: https://arxiv.org/abs/2305.14314, appendix E, rounded.
NF4 = [-1, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0]
NF4 += [0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1]


def quantized(folder: Path, kind: str):
    return load_causal_lm(ModelConfig(path=str(folder), lora=LoraSettings(rank=4), quantization=kind))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    fresh_model("llama", **SHAPE).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def frozen(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize(("kind", "dtype", "share"), [("nf4", torch.uint8, 0.5), ("int8", torch.int8, 1.0)])
def test_weights_are_kept_in_few_bits_and_stay_while_adapters_learn(folder, kind, dtype, share):
    model = quantized(folder, kind)
    original = AutoModelForCausalLM.from_pretrained(folder)
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    weight, plain = layer.base_layer.weight, original.model.layers[0].mlp.up_proj.weight
    assert weight.dtype is dtype
    assert weight.numel() * weight.element_size() == share * plain.numel()  # bytes
    policy, before = LanguageModelPolicy(model), frozen(model)
    learned = [p for p in policy.parameters() if p.requires_grad]
    assert {name.split(".lora_")[0].rsplit(".", 1)[1] for name, p in model.named_parameters() if p.requires_grad} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    torch.manual_seed(0)
    actions = torch.randint(VOCABULARY, (8, 6))
    inputs = {
        "prompt_ids": torch.randint(VOCABULARY, (8, 3)),
        "prompt_mask": torch.ones(8, 3, dtype=torch.bool),
        "completion_mask": torch.ones(8, 6, dtype=torch.bool),
    }
    optimizer = torch.optim.Adam(learned, lr=1e-2)
    losses = []
    for _ in range(40):
        loss = -policy(inputs, actions).log_probs.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    for name, parameter in frozen(model).items():
        assert torch.equal(parameter, before[name]), name


@pytest.mark.parametrize(("kind", "error"), [("nf4", 0.15), ("int8", 0.02)])
def test_what_is_computed_is_the_model_but_for_its_rounding(folder, kind, error):
    original, model = AutoModelForCausalLM.from_pretrained(folder).eval(), quantized(folder, kind)
    hidden = torch.randn(32, SHAPE["hidden_size"])
    for name in ("q_proj", "o_proj"):
        exact = getattr(original.model.layers[0].self_attn, name)(hidden)
        got = getattr(model.get_base_model().model.layers[0].self_attn, name)(hidden)
        distance = float((got - exact).norm() / exact.norm())
        assert 1e-4 < distance < error, name


def test_products_are_those_of_the_rounded_weights_in_float32_whoever_asks(folder):
    from bitsandbytes.functional import dequantize_4bit

    model = quantized(folder, "nf4")
    hidden = torch.randn(32, SHAPE["hidden_size"])
    for layer in (module.base_layer for name, module in model.named_modules() if name.endswith("mlp.up_proj")):
        torch.testing.assert_close(layer.weight.quant_state.code, torch.tensor(NF4), atol=1e-4, rtol=0)
        weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        assert weight.dtype is torch.float32
        for grad in (False, True):  # generation and the update's forward
            got = layer(hidden.requires_grad_(grad))
            torch.testing.assert_close(got, hidden @ weight.t(), atol=1e-4, rtol=1e-4)


def test_completions_are_those_of_greedy_decoding_by_transformers(folder):
    model = quantized(folder, "nf4")
    prompts = torch.randint(3, VOCABULARY, (4, 5), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(prompts, dtype=torch.bool)
    generator = TransformersGenerator(model, end_token_ids=END, pad_token_id=PAD)
    sampling = SamplingConfig(max_completion_length=6, greedy=True)
    ours = generator.generate(prompts, mask, group_size=1, sampling=sampling)
    theirs = model.generate(
        input_ids=prompts,
        attention_mask=mask.long(),
        max_new_tokens=6,
        do_sample=False,
        eos_token_id=END,
        pad_token_id=PAD,
    )[:, 5:]
    lengths = ours.completion_mask.sum(dim=1)
    for row, length in enumerate(lengths.tolist()):
        assert ours.completion_ids[row, :length].tolist() == theirs[row, :length].tolist()


def few_letters(completions, **columns) -> list[float]:
    return [1 / (len(text) + 1) for text in completions]


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_sft_then_grpo_on_quantized_weights_by_recipes(tmp_path, kind):
    task = {"task": {"name": "sort_letters", "word_length": 3, "letters": 5, "train": 40, "held_out": 6}}
    fresh = {"model_type": "llama", **SHAPE, "num_hidden_layers": 2, "num_attention_heads": 2}
    common = {"progress_bar": False}
    sft = import_recipe(find_recipe("sft"))
    first = {
        "model": {"config": fresh},
        "demonstrations": task,
        "training": {"max_steps": 4, "batch_size": 8},
        "run": {"directory": str(tmp_path / "sft"), **common},
    }
    sft.main(validate(sft.CONFIG, first))
    base = tmp_path / "sft" / "model"
    grpo = import_recipe(find_recipe("grpo"))
    second = {
        "model": {"path": str(base), "lora": {"rank": 4}, "quantization": kind},
        "prompts": task,
        "reward": {"function": f"{__file__}:few_letters"},
        "collector": {"prompts_per_iteration": 4, "group_size": 4, "sampling": {"max_completion_length": 5}},
        "update": {"learning_rate": 1e-2},
        "iterations": 2,
        "run": {"directory": str(tmp_path / "grpo"), **common},
    }
    grpo.main(validate(grpo.CONFIG, second))
    lines = [json.loads(line) for line in (tmp_path / "grpo" / "metrics.jsonl").read_text().splitlines()]
    norms = [line["grad_norm"] for line in lines if "grad_norm" in line]
    assert len(norms) == 2
    assert min(norms) > 0
    saved = tmp_path / "grpo" / "model"
    adapters = load_file(saved / "adapter_model.safetensors")
    assert any(tensor.abs().max() > 0 for name, tensor in adapters.items() if "lora_B" in name)
    merged = load_causal_lm(ModelConfig(path=str(saved)))  # over the base in full precision
    assert type(merged).__name__ == "LlamaForCausalLM"
