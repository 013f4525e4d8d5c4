"""The recorded decode loop, run step by step on a CPU; as a CUDA graph it is tested in test_on_gpu.py."""

import functools
import itertools

import pytest
import torch

from rlhf.lm import generation as generation_module
from rlhf.lm import graphed_decoding
from rlhf.lm.generation import TransformersGenerator
from rlhf.lm.graphed_decoding import GraphedDecoder, can_be_recorded
from rlhf.lm.loading import LoraSettings, add_lora
from rlhf.lm.sampling import SamplingConfig
from tests.lm.fresh_models import PAD, fresh_model, left_padded, mixed_precision_gaps

ENDS = [2, 3, 4]
"""Several, so that rows end at different steps."""


def make(model, **settings):
    return TransformersGenerator(model, **{"end_token_ids": ENDS, "pad_token_id": PAD, **settings})


@pytest.fixture
def stepwise(monkeypatch):
    """Let a generator on a CPU take the loop of a GPU, without a recording."""
    monkeypatch.setattr(generation_module, "GraphedDecoder", functools.partial(GraphedDecoder, record=False))
    monkeypatch.setattr(TransformersGenerator, "_path", lambda *_arguments, fused: "graph" if fused else "model")


@pytest.mark.parametrize("name", ["llama", "llama_tied", "qwen2", "qwen3"])
@pytest.mark.parametrize("block", [256, 8])
@pytest.mark.parametrize("sampling", [{}, {"greedy": True}, {"top_p": 0.8, "temperature": 0.7}])
def test_the_same_tokens_as_the_other_loop(name, block, sampling, stepwise, monkeypatch):
    monkeypatch.setattr(graphed_decoding, "COLUMN_BLOCK", block)
    model, prompts = fresh_model(name), left_padded((3, 9, 5, 7))
    settings = {"group_size": 6, "sampling": SamplingConfig(max_completion_length=75, **sampling)}
    generator = make(model)
    got = generator.generate(*prompts, **settings, generator=torch.Generator().manual_seed(4))
    assert generator.decode_path == "graph"
    monkeypatch.undo()  # the loop of a CPU again
    expected = make(model).generate(*prompts, **settings, generator=torch.Generator().manual_seed(4))
    assert sampling.get("greedy") or len(expected.completion_mask.sum(dim=1).unique()) > 3
    assert torch.equal(got.completion_ids, expected.completion_ids)
    assert torch.equal(got.ended, expected.ended)
    torch.testing.assert_close(got.sampling_log_probs, expected.sampling_log_probs, atol=2e-5, rtol=1e-4)


def test_reach_grows_with_the_completions(stepwise, monkeypatch):
    monkeypatch.setattr(graphed_decoding, "COLUMN_BLOCK", 20)
    reaches = []
    monkeypatch.setattr(
        GraphedDecoder,
        "_start_shapes",
        lambda self, inner=GraphedDecoder._start_shapes: (reaches.append(self.reach), inner(self))[1],
    )
    model = fresh_model("llama", max_position_embeddings=512)
    settings = {"sampling": SamplingConfig(max_completion_length=150)}
    generator = make(model, end_token_ids=60_000)
    generator.generate(*left_padded((4, 4)), **settings)
    assert reaches == [4, 64, 128, 192]  # the prompts; then at least 20 columns ahead, in whole blocks of 64


def test_rows_leave_by_halves(stepwise, monkeypatch):
    sizes = []
    step = GraphedDecoder._take_step
    monkeypatch.setattr(GraphedDecoder, "_take_step", lambda self: (sizes.append(len(self.row_ids)), step(self))[1])
    model = fresh_model("llama")
    result = make(model).generate(
        *left_padded((4, 4)), group_size=10, sampling=SamplingConfig(max_completion_length=60)
    )
    lengths = result.completion_mask.sum(dim=1)
    assert sizes[0] == 20
    for before, after in itertools.pairwise(sizes):
        assert after == before or after <= before // 2
    for number, size in enumerate(sizes):
        assert size >= int((lengths > number).sum())


@pytest.mark.parametrize("graphs", [False, True])
def test_mixed_precision_samples_what_the_trainer_scores(graphs, request):
    if graphs:
        request.getfixturevalue("stepwise")
    model, (ids, mask) = fresh_model("qwen2"), left_padded((3, 9, 5))
    generator = make(model, dtype=torch.bfloat16)
    sampling = SamplingConfig(max_completion_length=25)
    result = generator.generate(ids, mask, group_size=8, sampling=sampling, generator=torch.Generator().manual_seed(0))
    assert generator.decode_path == ("graph" if graphs else "fused")
    rounding, mismatch = mixed_precision_gaps(model, (ids, mask), result, group_size=8)
    assert rounding > 1e-3  # bfloat16 really computes otherwise
    assert mismatch < 1.5 * rounding
    assert all(parameter.dtype is torch.float32 for parameter in model.parameters())


def test_which_models_can_be_recorded():
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    for model, expected in (
        (fresh_model("llama"), True),
        (fresh_model("llama", rope_parameters=rope), False),  # looks at the batch's greatest position
        (fresh_model("gemma"), False),
        (add_lora(fresh_model("llama"), LoraSettings(rank=2)), True),
    ):
        assert can_be_recorded(make(model)._plan) is expected
