from pathlib import Path

import pytest
import torch
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM, AutoTokenizer, MambaConfig, MambaForCausalLM

from rlhf.errors import ConfigError, DataError, ModelError
from rlhf.lm import decoding
from rlhf.lm.generation import TransformersGenerator
from rlhf.lm.loading import LoraSettings, add_lora
from rlhf.lm.policy import LanguageModelPolicy
from rlhf.lm.sampling import SamplingConfig
from tests.lm.fresh_models import CONFIGS, END, PAD, VOCABULARY, fresh_model, left_padded

SHARED = Path(__file__).resolve().parents[2] / ".." / "shared"
REAL_MODELS = ("stories260K", "TinyStories-656K", "babyllama-105")


def make(model, **settings):
    return TransformersGenerator(model, **{"end_token_ids": END, "pad_token_id": PAD, **settings})


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def ending_model(name="llama", probability=0.1, **changes):
    """A fresh model whose completions end at different steps, about one in `1 / probability` tokens."""
    model = fresh_model(name, **changes)
    head = torch.nn.Linear(model.lm_head.in_features, VOCABULARY, bias=True, dtype=model.dtype)
    head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 0.2)
    torch.nn.init.zeros_(head.bias)
    head.bias.data[END] = torch.tensor(probability * VOCABULARY).log()
    model.lm_head = head
    return model.eval()


def transformers_greedy(model, prompt_ids, prompt_mask, length, *, end=END, pad=PAD):
    sequences = model.generate(
        prompt_ids,
        attention_mask=prompt_mask.long(),
        max_new_tokens=length,
        do_sample=False,
        eos_token_id=end,
        pad_token_id=pad,
    )
    return sequences[:, prompt_ids.shape[1] :]


@pytest.mark.parametrize(("group_size", "short"), [(1, 0), (3, 0), (3, 32)])
@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_equals_transformers_token_for_token(name, group_size, short, monkeypatch):
    monkeypatch.setattr(decoding, "SHORT_PROMPT", short)  # 0: prompts are kept apart; 32: repeated for their group
    model = fresh_model(name)
    prompt_ids, prompt_mask = left_padded((3, 9, 5, 1))
    expected = transformers_greedy(model, prompt_ids, prompt_mask, 20)
    sampling = SamplingConfig(max_completion_length=20, greedy=True)
    generation = make(model).generate(prompt_ids, prompt_mask, group_size=group_size, sampling=sampling)
    assert torch.equal(generation.completion_ids, expected.repeat_interleave(group_size, dim=0))


@pytest.mark.skipif(not (SHARED / "models").exists(), reason="the shared real models are not here")
@pytest.mark.parametrize("group_size", [1, 2])
@pytest.mark.parametrize("name", REAL_MODELS)
def test_greedy_equals_transformers_on_real_models(name, group_size):
    folder = SHARED / "models" / name
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    prompts = ["Once upon a time", "One day, a little boy named Tim went to the", "Lily", "The cat and the dog"]
    batch = tokenizer(prompts, padding=True, return_tensors="pt")
    mask = batch["attention_mask"].bool()
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    expected = transformers_greedy(model, batch["input_ids"], mask, 100, end=end, pad=pad)
    generation = make(model, end_token_ids=end, pad_token_id=pad).generate(
        batch["input_ids"], mask, group_size=group_size, sampling=SamplingConfig(max_completion_length=100, greedy=True)
    )
    assert torch.equal(generation.completion_ids, expected.repeat_interleave(group_size, dim=0))


def test_sampled_frequencies_match_the_models_probabilities():
    # All pairs of two tokens after one prompt, against the product of the model's conditional probabilities.
    model = ending_model(probability=0.2)
    prompt_ids, prompt_mask = left_padded((4, 2))
    samples = 30_000
    sampling = SamplingConfig(max_completion_length=2, temperature=0.6)
    generation = make(model).generate(
        prompt_ids, prompt_mask, group_size=samples, sampling=sampling, generator=seeded(7)
    )
    for row in range(2):
        prompt = prompt_ids[row][prompt_mask[row]]
        pairs = torch.cat([prompt.expand(VOCABULARY, -1), torch.arange(VOCABULARY)[:, None]], dim=1)
        with torch.no_grad():
            probabilities = torch.softmax(model(pairs).logits[:, len(prompt) - 1 :].double() / 0.6, dim=-1)
        expected = probabilities[0, 0][:, None] * probabilities[:, 1]
        expected[END] = 0.0  # a row that ended has no second token
        expected[END, PAD] = probabilities[0, 0, END]
        ids = generation.completion_ids[row * samples : (row + 1) * samples]
        counts = torch.bincount(ids[:, 0] * VOCABULARY + ids[:, 1], minlength=VOCABULARY**2).double()
        expected = expected.flatten() * samples
        frequent = expected >= 5  # the usual condition of the test; the rest form one class
        observed = torch.cat([counts[frequent], counts[~frequent].sum()[None]])
        wanted = torch.cat([expected[frequent], expected[~frequent].sum()[None]])
        assert chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue > 1e-3


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral", "gemma", "cohere"])
def test_sampling_log_probs_equal_the_policys(name, temperature):
    model = ending_model(name) if name != "cohere" else fresh_model(name)
    prompt_ids, prompt_mask = left_padded((3, 9, 5))
    generation = make(model).generate(
        prompt_ids,
        prompt_mask,
        group_size=4,
        sampling=SamplingConfig(max_completion_length=25, temperature=temperature),
        generator=seeded(),
    )
    inputs = {
        "prompt_ids": prompt_ids.repeat_interleave(4, dim=0),
        "prompt_mask": prompt_mask.repeat_interleave(4, dim=0),
        "completion_mask": generation.completion_mask,
    }
    with torch.no_grad():
        output = LanguageModelPolicy(model, temperature=temperature)(inputs, generation.completion_ids)
    assert (output.log_probs - generation.sampling_log_probs).abs().max() < 1e-4


@pytest.mark.parametrize(("name", "short"), [("llama", 0), ("llama", 32), ("mistral", 0)])
def test_dropping_finished_rows_changes_nothing(name, short, monkeypatch):
    monkeypatch.setattr(decoding, "SHORT_PROMPT", short)
    model = ending_model(name)
    prompt_ids, prompt_mask = left_padded((3, 9, 5, 7))
    results = [
        make(model, drop_finished=drop).generate(
            prompt_ids,
            prompt_mask,
            group_size=6,
            sampling=SamplingConfig(max_completion_length=40),
            generator=seeded(3),
        )
        for drop in (True, False)
    ]
    lengths = results[0].completion_mask.sum(dim=1)
    assert len(lengths.unique()) > 5  # rows really ended at different steps
    assert torch.equal(results[0].completion_ids, results[1].completion_ids)
    assert torch.equal(results[0].completion_mask, results[1].completion_mask)
    torch.testing.assert_close(results[0].sampling_log_probs, results[1].sampling_log_probs, atol=1e-5, rtol=1e-5)


def test_finished_rows_leave_the_batch():
    model = ending_model()
    rows = []
    generator = make(model)
    model.model.register_forward_pre_hook(
        lambda _m, _a, settings: rows.append(len(settings["input_ids"])), with_kwargs=True
    )
    generation = generator.generate(
        *left_padded((4, 4)), group_size=10, sampling=SamplingConfig(max_completion_length=30), generator=seeded()
    )
    lengths = generation.completion_mask.sum(dim=1)
    # The first call reads each prompt once; the call after step t carries the rows longer than t.
    assert rows[0] == 2
    assert rows[1:] == [int((lengths > step).sum()) for step in range(1, len(rows))]


def test_padding_of_prompts_changes_nothing():
    model = ending_model()
    results = []
    prompt_ids, prompt_mask = left_padded((3, 9))
    for extra in (0, 5):
        ids = torch.nn.functional.pad(prompt_ids, (extra, 0), value=7)
        mask = torch.nn.functional.pad(prompt_mask, (extra, 0), value=False)
        results.append(
            make(model).generate(
                ids, mask, group_size=3, sampling=SamplingConfig(max_completion_length=20), generator=seeded()
            )
        )
    assert torch.equal(results[0].completion_ids, results[1].completion_ids)


def test_masks_and_ends():
    model = ending_model(probability=0.3)
    generation = make(model).generate(
        *left_padded((4,)), group_size=50, sampling=SamplingConfig(max_completion_length=6), generator=seeded()
    )
    assert generation.ended.any()
    assert not generation.ended.all()
    for ids, mask, log_probs, ended in zip(
        generation.completion_ids,
        generation.completion_mask,
        generation.sampling_log_probs,
        generation.ended,
        strict=True,
    ):
        length = int(mask.sum())
        assert mask.tolist() == [True] * length + [False] * (len(mask) - length)
        assert (END in ids[:length].tolist()) == bool(ended)
        assert END not in ids[: length - 1].tolist()
        assert ended or length == 6
        assert (ids[length:] == PAD).all()
        assert (log_probs[length:] == 0).all()
        assert (log_probs[:length] < 0).all()


def test_any_of_several_end_tokens_ends_and_padding_may_be_one_of_them():
    model = ending_model(probability=0.2)
    ends = [END, 17, 23]
    generation = make(model, end_token_ids=ends, pad_token_id=END).generate(
        *left_padded((4,)), group_size=60, sampling=SamplingConfig(max_completion_length=50), generator=seeded()
    )
    last = generation.completion_mask.sum(dim=1) - 1
    final = generation.completion_ids.gather(1, last[:, None]).squeeze(1)[generation.ended]
    assert set(final.tolist()) == set(ends)
    assert (generation.completion_ids[~generation.completion_mask] == END).all()


def test_completions_are_as_wide_as_the_longest():
    generation = make(ending_model(probability=0.9)).generate(
        *left_padded((4,)), group_size=4, sampling=SamplingConfig(max_completion_length=110), generator=seeded()
    )
    assert generation.completion_ids.shape[1] == int(generation.completion_mask.sum(dim=1).max()) < 100


def test_one_token_completions():
    generation = make(fresh_model()).generate(*left_padded((4, 2)), sampling=SamplingConfig(max_completion_length=1))
    assert generation.completion_ids.shape == (2, 1)
    assert generation.completion_mask.all()


def test_seed_decides():
    model = ending_model()
    sampling = SamplingConfig(max_completion_length=20)

    def run(seed):
        return make(model).generate(*left_padded((4, 6)), group_size=3, sampling=sampling, generator=seeded(seed))

    assert torch.equal(run(1).completion_ids, run(1).completion_ids)
    assert run(1).completion_ids.tolist() != run(2).completion_ids.tolist()
    rows = run(1).completion_ids.tolist()
    assert len({tuple(row) for row in rows}) == len(rows)  # samples of one group differ


@pytest.mark.parametrize(
    "settings", [{"greedy": True}, {"temperature": 0.8}, {"top_p": 0.8}, {"top_k": 4, "top_p": 0.9}]
)
def test_transformers_backend_gives_the_same_distribution(settings):
    model = ending_model()
    model.generation_config.repetition_penalty = 3.0  # a default of the model, which must not leak in
    sampling = SamplingConfig(max_completion_length=4, **settings)
    for seed in range(3):
        first, second = (
            make(model, backend=backend).generate(
                *left_padded((4, 6)), group_size=4, sampling=sampling, generator=seeded(seed)
            )
            for backend in ("in_place", "generate")
        )
        assert torch.equal(first.completion_ids[:, 0], second.completion_ids[:, 0])  # same first random numbers
        if sampling.greedy:
            assert torch.equal(first.completion_ids, second.completion_ids)
        torch.testing.assert_close(
            first.sampling_log_probs[:, 0], second.sampling_log_probs[:, 0], atol=1e-5, rtol=1e-5
        )
    assert model.generation_config.repetition_penalty == 3.0


def mamba():
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, pad_token_id=PAD, eos_token_id=END)
    return MambaForCausalLM(config).eval()


def test_recurrent_model_is_refused_with_the_remedy_that_works():
    with pytest.raises(ModelError, match="backend to `generate`"):
        make(mamba())
    prompt_ids, prompt_mask = left_padded((4, 4))
    sampling = SamplingConfig(max_completion_length=8, greedy=True)
    generation = make(mamba(), backend="generate").generate(prompt_ids, prompt_mask, sampling=sampling)
    assert torch.equal(generation.completion_ids, transformers_greedy(mamba(), prompt_ids, prompt_mask, 8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ids, mask: (ids, mask.flip(1)), "padded on the left"),
        (lambda ids, mask: (ids, mask & False), "empty"),
        (lambda ids, mask: (ids, mask.long()), "bool"),
        (lambda ids, mask: (ids[:, 1:], mask), "shape"),
    ],
)
def test_bad_prompts_are_refused(change, message):
    with pytest.raises(DataError, match=message):
        make(fresh_model()).generate(*change(*left_padded((3, 6))), sampling=SamplingConfig(max_completion_length=8))


def test_context_too_short_is_refused_before_anything_runs():
    # The fresh models have 128 positions: 5 + 124 is one too many.
    with pytest.raises(DataError, match=r"context.*got 129.*at most 128"):
        make(fresh_model("gpt2")).generate(*left_padded((3, 5)), sampling=SamplingConfig(max_completion_length=124))
    sampling = SamplingConfig(max_completion_length=123)
    assert make(fresh_model("gpt2")).generate(*left_padded((3, 5)), sampling=sampling).completion_ids.shape[1] <= 123


def test_no_end_token_is_refused():
    with pytest.raises(ConfigError, match="end token"):
        make(fresh_model(), end_token_ids=[])


def test_model_is_left_as_it_was():
    model = ending_model()
    policy = LanguageModelPolicy(model).train()
    model.train()
    model.model.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    attention = model.config._attn_implementation
    generation = make(model).generate(
        *left_padded((3, 5)), group_size=2, sampling=SamplingConfig(max_completion_length=5)
    )
    assert {name: module.training for name, module in model.named_modules()} == before
    assert model.config._attn_implementation == attention
    # The tensors may enter a training step.
    (generation.sampling_log_probs * torch.ones(1, requires_grad=True)).sum().backward()
    assert policy.model is model


def test_generation_follows_training_and_uses_adapters():
    model = add_lora(fresh_model(), LoraSettings(rank=4))
    generator = make(model)
    sampling = SamplingConfig(max_completion_length=12, greedy=True)
    before = generator.generate(*left_padded((3, 5)), sampling=sampling).completion_ids
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.5)
    prompt_ids, prompt_mask = left_padded((3, 5))
    after = generator.generate(prompt_ids, prompt_mask, sampling=sampling).completion_ids
    assert after.tolist() != before.tolist()
    assert torch.equal(after, transformers_greedy(model, prompt_ids, prompt_mask, 12))


def test_gradient_checkpointing_does_not_disturb_generation():
    model = fresh_model()
    expected = make(model).generate(*left_padded((3, 5)), sampling=SamplingConfig(greedy=True, max_completion_length=9))
    model.gradient_checkpointing_enable()
    policy = LanguageModelPolicy(model).train()
    got = make(policy.model).generate(
        *left_padded((3, 5)), sampling=SamplingConfig(greedy=True, max_completion_length=9)
    )
    assert torch.equal(got.completion_ids, expected.completion_ids)


def test_bfloat16_model_generates():
    generation = make(fresh_model(dtype=torch.bfloat16)).generate(
        *left_padded((3, 5)), group_size=3, sampling=SamplingConfig(max_completion_length=9), generator=seeded()
    )
    assert generation.sampling_log_probs.dtype == torch.float32
    assert torch.isfinite(generation.sampling_log_probs).all()
