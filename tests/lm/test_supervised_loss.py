"""Labels scored for TRL's trainer against the model's own logits and torch's cross-entropy."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from trl.trainer.utils import add_fused_lm_head

from rlhf.lm import supervised_loss
from rlhf.lm.supervised_loss import UNLABELLED, ScoredLabels, score_labels_on_cpu
from tests.lm.fresh_models import VOCABULARY, fresh_model


def batch(*, left_padded=False):
    """Three rows of several lengths; their first two tokens, and padding, have no label."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (3, 9), generator=generator)
    mask = torch.arange(9) < torch.tensor([9, 4, 7])[:, None]
    mask = mask.flip(1) if left_padded else mask
    labels = ids.masked_fill(~mask | (mask.cumsum(dim=1) <= 2), UNLABELLED)
    return {"input_ids": ids * mask, "attention_mask": mask.long(), "labels": labels}


def expected(model, inputs):
    """Log-probs, entropy, whether the label is on top, and the mean loss's gradients, from the logits."""
    labels = inputs["labels"][:, 1:]
    logits = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits[:, :-1].float()
    log_p, mask = logits.log_softmax(dim=-1), labels != UNLABELLED
    log_probs = log_p.gather(2, labels.clamp(min=0)[..., None]).squeeze(2) * mask
    entropy = -(log_p.exp() * log_p).sum(dim=-1) * mask
    loss = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=UNLABELLED)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    gradients = torch.autograd.grad(loss, weights, allow_unused=True)
    return log_probs, entropy, (logits.argmax(dim=-1) == labels) & mask, gradients


def assert_scored_as_logits(model, inputs, *, ours=True):
    log_probs, entropy, on_top, gradients = expected(model, inputs)
    add_fused_lm_head(supervised_loss.unwrap_adapters(model), outputs=("log_probs", "entropy", "is_top1"))
    score_labels_on_cpu(model)
    found = model(**inputs, fused_lm_head=True)
    assert isinstance(found, ScoredLabels) == ours
    torch.testing.assert_close(found.log_probs, log_probs.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.entropy, entropy.detach(), rtol=1e-5, atol=1e-5)
    assert torch.equal(found.is_top1.bool(), on_top)
    assert torch.equal(found.label_mask, inputs["labels"][:, 1:] != UNLABELLED)
    loss = -found.log_probs.sum() / found.label_mask.sum()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    for got, wanted in zip(torch.autograd.grad(loss, weights, allow_unused=True), gradients, strict=True):
        if wanted is not None:
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
    plain = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    assert plain.logits.shape == (3, 9, VOCABULARY)  # without the question for labels, the forward is the former one


@pytest.mark.parametrize("name", ["llama", "llama_tied", "qwen3", "gpt2", "gemma2", "cohere", "granite"])
def test_labels_are_scored_as_the_logits_say(name):
    assert_scored_as_logits(fresh_model(name).eval(), batch())


@pytest.mark.parametrize("left_padded", [False, True])
def test_padding_may_stand_on_either_side(left_padded):
    inputs = batch(left_padded=left_padded)
    assert_scored_as_logits(fresh_model("llama").eval(), {**inputs, "use_cache": False})


def test_packed_rows_keep_their_positions():
    inputs = batch()
    inputs["position_ids"] = torch.arange(9).expand(3, -1) % 5
    assert_scored_as_logits(fresh_model("llama").eval(), inputs)


def test_adapters_learn():
    model = get_peft_model(fresh_model("llama"), LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    assert_scored_as_logits(model.eval(), batch())


def test_what_is_not_known_goes_to_trls_own_answer():
    """An argument that may change what the model computes."""
    inputs = batch() | {"output_hidden_states": True}
    assert_scored_as_logits(fresh_model("llama").eval(), inputs, ours=False)


def test_nothing_to_learn_from_gives_zeros_and_no_error():
    model, inputs = fresh_model("llama"), batch()
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    score_labels_on_cpu(model)
    found = model(**inputs | {"labels": torch.full_like(inputs["labels"], UNLABELLED)}, fused_lm_head=True)
    assert found.log_probs.abs().sum() == 0
    found.log_probs.sum().backward()
