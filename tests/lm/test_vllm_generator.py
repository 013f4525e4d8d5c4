"""vLLM behind the generator's protocol, against a local stand-in for its interface; not yet measured on a GPU."""

import json
import os
import sys
from importlib.machinery import ModuleSpec

import pytest
import torch
from accelerate import Accelerator

from rlhf.commands.recipes import find_recipe, import_recipe
from rlhf.config import load_config, validate
from rlhf.errors import ConfigError, DataError, ModelError, TrainingError
from rlhf.lm.actors import make_generator
from rlhf.lm.engine import Answer
from rlhf.lm.engine_weights import checkpoint_weights
from rlhf.lm.generation import TransformersGenerator
from rlhf.lm.generator_config import VllmGeneratorConfig
from rlhf.lm.loading import LoraSettings, add_lora, character_tokenizer
from rlhf.lm.policy import LanguageModelPolicy
from rlhf.lm.sampling import SamplingConfig
from rlhf.lm.vllm_generator import VllmGenerator, make_vllm_generator
from tests.lm import stand_in_vllm
from tests.lm.fresh_models import CONFIGS, END, PAD, VOCABULARY, fresh_model, left_padded
from tests.recipes.test_language_recipes import MODEL, run, settings

DENSE = [
    name for name in CONFIGS if name not in ("gpt_neox", "mixtral", "deepseek_v3", "gpt_oss", "gpt2", "opt", "bloom")
]
VLLM = {"type": "vllm", "dtype": "float32"}


@pytest.fixture
def vllm(monkeypatch):
    monkeypatch.setattr(stand_in_vllm, "__spec__", ModuleSpec("vllm", None), raising=False)
    monkeypatch.setitem(sys.modules, "vllm", stand_in_vllm)
    monkeypatch.setattr(stand_in_vllm.LLM, "started", [])
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "VLLM_NO_USAGE_STATS"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # put back afterwards
        monkeypatch.delenv(name)
    return stand_in_vllm


def make(model, **changes):
    config = VllmGeneratorConfig(**{"dtype": "float32", **changes})
    return make_vllm_generator(
        config, model, end_token_ids=[END], pad_token_id=PAD, accelerator=Accelerator(cpu=True), seed=7
    )


def moved(model):
    """Other weights than at the start, as after an update."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))


def draw(generator, *, seed=0, group_size=2, lengths=(3, 9, 5, 1), **sampling):
    prompt_ids, prompt_mask = left_padded(lengths)
    generation = generator.generate(
        prompt_ids,
        prompt_mask,
        group_size=group_size,
        sampling=SamplingConfig(**{"max_completion_length": 12, **sampling}),
        generator=torch.Generator().manual_seed(seed),
    )
    return prompt_ids, prompt_mask, generation


def test_without_vllm_it_says_how_to_install_it():
    assert "vllm" not in sys.modules
    with pytest.raises(ConfigError, match=r"pip install 'rlhf-toolkit\[vllm\]'"):
        make(fresh_model("llama"))


def test_a_run_without_vllm_ends_with_that_sentence_before_anything_is_trained(tmp_path):
    with pytest.raises(ConfigError, match=r"vLLM is not installed.*generator\.type=transformers"):
        run("grpo", settings(tmp_path, algorithm="grpo", generator={"type": "vllm"}))


@pytest.mark.parametrize("name", ["llama", "llama_tied", "qwen2", "gemma2", "gpt2"])
def test_greedy_answers_are_those_of_the_models_own_layers(name, vllm):
    model = fresh_model(name)
    moved(model)
    own = TransformersGenerator(model, end_token_ids=END, pad_token_id=PAD)
    _, _, expected = draw(own, greedy=True, group_size=3)
    _, _, found = draw(make(model), greedy=True, group_size=3)
    assert torch.equal(found.completion_ids, expected.completion_ids)
    assert torch.equal(found.completion_mask, expected.completion_mask)
    assert torch.equal(found.ended, expected.ended)
    torch.testing.assert_close(found.sampling_log_probs, expected.sampling_log_probs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("filters", [{}, {"top_p": 0.8}, {"top_k": 5}])
def test_sampling_log_probs_are_those_of_what_was_sampled_from(filters, vllm):
    model = fresh_model("llama")
    prompt_ids, prompt_mask, found = draw(make(model), temperature=0.7, **filters)
    inputs = {"prompt_ids": prompt_ids.repeat_interleave(2, 0), "prompt_mask": prompt_mask.repeat_interleave(2, 0)}
    inputs["completion_mask"] = found.completion_mask
    policy = LanguageModelPolicy(model, temperature=0.7)
    old = policy(inputs, found.completion_ids).log_probs.detach()
    difference = (found.sampling_log_probs - old)[found.completion_mask]
    if filters:  # renormalised over the kept tokens: more likely than under the policy
        assert (difference > -1e-5).all()
        assert difference.max() > 0.05
    else:
        assert difference.abs().max() < 1e-4
    assert (found.sampling_log_probs[~found.completion_mask] == 0).all()
    assert (found.completion_ids[~found.completion_mask] == PAD).all()


def test_the_engine_keeps_old_weights_until_it_is_given_new_ones(vllm):
    model = fresh_model("llama")
    generator = make(model)
    before = draw(generator, greedy=True)[2].completion_ids
    moved(model)
    assert torch.equal(draw(generator, greedy=True)[2].completion_ids, before)
    generator.synchronize()
    after = draw(generator, greedy=True)[2].completion_ids
    own = TransformersGenerator(model, end_token_ids=END, pad_token_id=PAD)
    assert torch.equal(after, draw(own, greedy=True)[2].completion_ids)
    assert not torch.equal(after, before)


def test_same_seed_same_answers_and_equal_prompts_get_different_ones(vllm):
    generator = make(fresh_model("llama"))
    first, again, other = (draw(generator, seed=seed)[2].completion_ids for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not (first.shape == other.shape and torch.equal(first, other))
    prompt_ids, prompt_mask = left_padded((4,))
    twice = generator.generate(
        prompt_ids.repeat(2, 1), prompt_mask.repeat(2, 1), sampling=SamplingConfig(max_completion_length=12)
    )
    assert not torch.equal(twice.completion_ids[0], twice.completion_ids[1])


def test_without_request_seeds_the_engine_draws_from_its_own_stream(vllm):
    generator = make(fresh_model("llama"), request_seeds=False)
    first, again = (draw(generator, seed=0)[2].completion_ids for _ in range(2))
    assert not (first.shape == again.shape and torch.equal(first, again))
    assert vllm.LLM.started[0].arguments["seed"] == 7


def test_the_engine_is_started_with_the_config_alone_and_reports_no_usage(vllm):
    make(fresh_model("qwen2"), memory_fraction=0.4, max_length=64, max_sequences=8, eager=True)
    engine = vllm.LLM.started[0]
    assert engine.files == ["config.json"]
    expected = {"gpu_memory_utilization": 0.4, "max_model_len": 64, "max_num_seqs": 8, "enforce_eager": True}
    expected |= {"load_format": "dummy", "logprobs_mode": "processed_logprobs", "trust_remote_code": False}
    assert engine.arguments.items() >= expected.items()
    assert os.environ["VLLM_NO_USAGE_STATS"] == "1"
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == ("0", "1")


def test_a_sleeping_engine_is_woken_for_weights_and_for_answers(vllm):
    generator = make(fresh_model("llama"), sleep=True)
    draw(generator)
    assert vllm.LLM.started[0].asleep
    generator.synchronize()
    draw(generator)
    assert vllm.LLM.started[0].asleep


def test_prompts_beyond_the_engines_length_are_refused(vllm):
    with pytest.raises(DataError, match="at most 16 tokens"):
        draw(make(fresh_model("llama"), max_length=16), lengths=(9,))


def test_an_engine_that_reports_no_numbers_is_refused():
    class Broken:
        def complete(self, prompts, *, count, settings, seeds):
            return [Answer([END], [float("nan")]) for _ in prompts]

        def load(self, weights):
            pass

    generator = VllmGenerator(Broken(), fresh_model("llama"), end_token_ids=[END], pad_token_id=PAD)
    with pytest.raises(TrainingError, match="not finite"):
        draw(generator, group_size=1)


def test_an_engine_with_weights_of_its_own_left_is_refused(vllm, monkeypatch):
    def forgets(self, weights):
        return {f"inner.{name}" for name, _ in weights if "norm" not in name}

    monkeypatch.setattr(vllm.EngineModel, "load_weights", forgets)
    with pytest.raises(ModelError, match=r"did not give it.*norm"):
        make(fresh_model("llama"))


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DENSE)
def test_weights_have_the_names_of_the_saved_folder(name, tmp_path):
    from safetensors import safe_open

    model = fresh_model(name)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        saved = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    handed = dict(checkpoint_weights(model))
    assert set(handed) == set(saved)
    for key, tensor in saved.items():
        assert torch.equal(handed[key], tensor)


@pytest.mark.parametrize("name", ["gpt_neox", "mixtral"])
def test_models_whose_folders_have_other_layers_are_refused(name):
    with pytest.raises(ModelError, match="named or cut otherwise in its folder"):
        list(checkpoint_weights(fresh_model(name)))


@pytest.mark.parametrize("extra", [{}, {"modules_to_save": ["lm_head"]}])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_adapters_are_added_and_the_trained_weights_are_left_alone(name, extra):
    model = add_lora(fresh_model(name), LoraSettings(rank=2, **extra))
    model.add_adapter("critic", model.peft_config["default"])  # must not be handed on
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    handed = dict(checkpoint_weights(model))
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    merged = model.merge_and_unload()  # PEFT's own arithmetic
    expected = dict(merged.named_parameters())
    assert set(handed) == set(expected)
    for key, tensor in expected.items():
        torch.testing.assert_close(handed[key], tensor.detach(), rtol=1e-5, atol=1e-6)


# --- through the recipes ----------------------------------------------------------------------------------------------


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_grpo_runs_on_it_with_weights_handed_over_and_the_mismatch_logged(vllm, tmp_path):
    values = settings(tmp_path, algorithm="grpo", generator=VLLM, iterations=3, update={"learning_rate": 0.05})
    values["run"]["evaluate_every"] = 2
    values["collector"]["old_log_probs"] = "recompute"  # auto would see that this engine agrees, and trust it
    run("grpo", values)
    lines = [line for line in lines_of(tmp_path) if line["iteration"] > 0]
    assert len(lines) == 3
    for line in lines:  # a stale engine would differ: the learning rate is large
        assert line["rollout/sampling_mismatch_max"] < 1e-4
        assert line["ratio"] == pytest.approx(1.0, abs=1e-4)
    engine = vllm.LLM.started[0]
    # The start, three rollouts, and evaluations before the run, at step 2 and at the end.
    assert engine.loads == 1 + 3 + 3


def test_ppo_learns_a_critic_on_it_with_lora(vllm, tmp_path):
    values = settings(tmp_path, algorithm="ppo_rlhf", generator=VLLM)
    values["model"] = {**values["model"], "lora": {"rank": 2}}
    run("ppo_rlhf", values)
    assert all(line["rollout/sampling_mismatch_max"] < 1e-4 for line in lines_of(tmp_path))


def test_a_stale_engine_shows_in_the_mismatch_and_a_correction_weighs_it(vllm, tmp_path, monkeypatch):
    monkeypatch.setattr(VllmGenerator, "synchronize", lambda self: None)  # keeps its arbitrary weights
    algorithm = {"preset": "grpo", "rollout_correction": {"type": "truncated", "cap": 2.0}}
    run("grpo", settings(tmp_path, algorithm=algorithm, generator=VLLM, doctor={"enabled": False}))
    line = lines_of(tmp_path)[0]
    assert line["rollout/sampling_mismatch_mean"] > 1e-3


def test_a_resumed_run_goes_on_exactly(vllm, tmp_path):
    def go(folder, iterations, **extra):
        values = settings(folder, algorithm="grpo", generator=VLLM, iterations=iterations)
        values["run"] |= extra
        return run("grpo", values)

    whole = go(tmp_path / "whole", 3)
    go(tmp_path / "parts", 1)
    parts = go(tmp_path / "parts", 3, resume=True)
    timeless = {name for name in whole if not name.startswith("time/")}
    assert {name: parts[name] for name in timeless} == {name: whole[name] for name in timeless}


def test_fine_tuning_is_judged_by_its_answers(vllm, tmp_path):
    """Greedy answers before, on the way and at the end score as those of the model's own layers do."""

    def go(folder, generator):
        task = {"name": "sort_letters", "word_length": 3, "letters": 5, "train": 40, "held_out": 6}
        values = {"model": {"config": MODEL}, "demonstrations": {"task": task}, "generator": generator}
        values |= {
            "training": {"max_steps": 4, "batch_size": 8, "learning_rate": 0.05},
            "sampling": {"max_completion_length": 5},
        }
        values |= {"reward": {"function": "tests.recipes.test_language_recipes:share_of_a"}}
        values |= {"evaluation": {"samples_per_prompt": 0}}
        values["run"] = {"directory": str(folder), "progress_bar": False, "evaluate_every": 2}
        run("sft", values)
        return [line["evaluation/greedy_score_mean"] for line in lines_of(folder) if "evaluation/loss" in line]

    own = go(tmp_path / "own", {"type": "transformers"})
    assert go(tmp_path / "vllm", VLLM) == pytest.approx(own)
    assert len(set(own)) > 1
    engine = vllm.LLM.started[0]
    assert len(vllm.LLM.started) == 1
    assert engine.loads == 1 + len(own)


def test_rankings_are_made_of_its_answers(vllm, tmp_path):
    model, tokenizer = fresh_model("llama"), character_tokenizer("abcde>")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    task = {"name": "sort_letters", "word_length": 3, "letters": 5, "train": 12, "held_out": 4}
    values = {"model": {"path": str(tmp_path / "model")}, "source": {"task": task}, "generator": VLLM}
    values |= {"scorer": {"function": "tests.recipes.test_language_recipes:share_of_a"}, "num_candidates": 3}
    values |= {"sampling": {"max_completion_length": 5}, "run": {"directory": str(tmp_path / "run")}}
    metrics = run("rankings", values)
    engine = vllm.LLM.started[0]
    assert engine.loads == 2  # at its start, and before the first answer
    assert sum(len(asked) for asked in engine.calls) == 12 + 4
    assert metrics["rankings"] + metrics["rankings_tied"] == 12


@pytest.mark.parametrize("recipe", ["grpo", "ppo_rlhf", "text_environment", "evaluate", "sft", "rankings"])
def test_the_generator_is_chosen_in_a_recipes_yaml(recipe):
    found = find_recipe(recipe)
    name = sorted(found.configs)[0]
    config = load_config(import_recipe(found).CONFIG, found.configs[name], ["generator.type=vllm"])
    assert isinstance(config.generator, VllmGeneratorConfig)
    with pytest.raises(ConfigError, match="memory_fraction"):
        load_config(
            import_recipe(found).CONFIG, found.configs[name], ["generator.memory_fracton=0.5", "generator.type=vllm"]
        )


def test_transformers_own_loop_is_reachable_from_a_config(tmp_path):
    run("grpo", settings(tmp_path, algorithm="grpo", generator={"backend": "generate"}))
    assert lines_of(tmp_path)[0]["rollout/sampling_mismatch_max"] < 1e-4


def test_make_generator_takes_the_tokenizers_end_tokens(vllm):
    tokenizer = character_tokenizer("ab")
    model = fresh_model("llama")
    generator = make_generator(model, tokenizer, config=VllmGeneratorConfig(dtype="auto"))
    assert isinstance(generator, VllmGenerator)
    draw(generator)
    parameters = vllm.LLM.started[0].calls[0][0]
    assert (parameters.stop_token_ids, parameters.ignore_eos, parameters.logprobs) == (
        [tokenizer.eos_token_id],
        True,
        0,
    )
    assert vllm.LLM.started[0].arguments["dtype"] == "float32"
    assert max(parameters.stop_token_ids) < VOCABULARY


def test_a_server_has_its_own_memory():
    with pytest.raises(ConfigError, match="does not sleep"):
        validate(VllmGeneratorConfig, {"server": "http://localhost:8000", "sleep": True})
