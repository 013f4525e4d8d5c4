"""TRL 1.16's group advantages (GRPO) and leave-one-out baseline (RLOO), from its own trainers on a tiny model."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from rlhf.core.advantages import group_relative, leave_one_out
from rlhf.core.algorithm import AlgorithmConfig, Clipped, LeaveOneOut, SequenceMean
from rlhf.core.estimate import estimate
from rlhf.core.objective import Objective
from rlhf.core.presets import ALGORITHMS
from rlhf.core.types import Experience, PolicyOutput, Rollout

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
GROUP = 4
SCORES = [1.0, 0.0, 0.0, 1.0, 0.1, 0.1, 0.1, 0.1, -3.0, 2.5, 0.75, 10.0]
"""Three groups; in the second all scores are equal."""
IDS = torch.arange(12) // GROUP


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A Llama of 5,000 parameters, a tokenizer of ten words, and a folder for the trainers."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {word: index for index, word in enumerate(["<pad>", "<eos>", "<unk>", *"abcdefg"])}
    model = Tokenizer(WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    folder = tmp_path_factory.mktemp("trl")
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    return LlamaForCausalLM, tokenizer, folder


def outputs_of(parts, kind: str, *, watch=lambda trainer: None, **settings) -> dict[str, torch.Tensor]:
    """What the trainer hands to its loss for twelve completions with the scores above."""
    from datasets import Dataset

    model_class, tokenizer, folder = parts
    config_class, trainer_class = getattr(trl, f"{kind}Config"), getattr(trl, f"{kind}Trainer")
    arguments = config_class(
        output_dir=str(folder / "run"),
        per_device_train_batch_size=12,
        num_generations=GROUP,
        max_completion_length=5,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
        seed=0,
        **settings,
    )
    trainer = trainer_class(
        model=str(folder / "model") if settings.get("beta") else model_class.from_pretrained(folder / "model"),
        args=arguments,
        reward_funcs=lambda prompts, completions, **columns: SCORES,
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"prompt": ["a b", "c", "d e f"]}),
    )
    trainer.model.train()
    watch(trainer)
    return trainer._generate_and_score_completions([{"prompt": p} for p in ["a b", "c", "d e f"] for _ in range(GROUP)])


@pytest.mark.parametrize(
    ("scale_rewards", "scale"), [("group", "sample_std"), ("batch", "batch_std"), ("none", "none")]
)
def test_group_advantages(parts, scale_rewards, scale):
    """TRL's epsilon is 1e-4 and its deviation the sample's (n - 1), as ours by default."""
    theirs = outputs_of(parts, "GRPO", scale_rewards=scale_rewards, beta=0.0)["advantages"]
    ours = group_relative(torch.tensor(SCORES), IDS, scale=scale)
    assert torch.allclose(ours, theirs, atol=1e-5)
    # The group of equal scores: TRL's mean of four .1 is off by a rounding error or not; ours is exactly 0.
    assert (ours[4:8] == 0).all()


def test_leave_one_out_baseline(parts):
    theirs = outputs_of(parts, "RLOO", beta=0.0)["advantages"]
    assert torch.allclose(leave_one_out(torch.tensor(SCORES), IDS), theirs, atol=1e-5)


def test_leave_one_out_with_the_kl_inside_the_score(parts):
    """TRL subtracts beta times the sum of k1 over the completion; so does our preset `rloo`, from rewards per token."""
    spoken = []

    def watch(trainer):
        # The reference moves away from the policy, and both models' log-probs are overheard.
        with torch.no_grad():
            for parameter in trainer.ref_model.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        answer = trainer._get_per_token_logps_and_entropies

        def overheard(*arguments, **named):
            spoken.append(answer(*arguments, **named))
            return spoken[-1]

        trainer._get_per_token_logps_and_entropies = overheard

    output = outputs_of(parts, "RLOO", beta=0.5, watch=watch)
    old, reference = (log_probs for log_probs, *_ in spoken)
    mask = output["completion_mask"].bool()
    last = torch.arange(mask.shape[1]) == (mask.sum(1, keepdim=True) - 1)
    rollout = Rollout(
        inputs={},
        actions=output["completion_ids"],
        action_mask=mask,
        rewards=torch.where(last, torch.tensor(SCORES).unsqueeze(1), 0.0),
        old_log_probs=old,
        ref_log_probs=reference,
        episode_ends=last,
        group_ids=IDS,
    )
    ours = estimate(rollout, ALGORITHMS["rloo"], kl_coef=0.5).advantages
    assert torch.allclose(ours, torch.where(mask, output["advantages"].unsqueeze(1), 0.0), atol=1e-5)
    without_kl = leave_one_out(torch.tensor(SCORES), IDS)
    assert (output["advantages"] - without_kl).abs().max() > 0.05


def test_rloo_loss_is_the_exact_row_weight_clipped(completions):
    """`RLOOTrainer._compute_loss`: one ratio per completion, the product over its tokens, clipped; mean over rows."""
    from trl.trainer.rloo_trainer import RLOOTrainer

    gradients, losses = [], []
    for library in ("trl", "ours"):
        log_probs = completions.log_probs.clone().requires_grad_()
        if library == "trl":
            trainer = SimpleNamespace(
                epsilon_low=0.2,
                epsilon_high=0.2,
                aux_loss_enabled=False,
                model=SimpleNamespace(training=True),
                accelerator=SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x),
                _metrics=defaultdict(lambda: defaultdict(list)),
                _get_per_token_logps_and_entropies=lambda *a, lp=log_probs, **k: (lp, completions.entropy, None),
            )
            ids = torch.zeros(completions.mask.shape, dtype=torch.int64)
            inputs = {
                "prompt_ids": ids[:, :1],
                "prompt_mask": ids[:, :1] + 1,
                "completion_ids": ids,
                "completion_mask": completions.mask.long(),
                "old_logps": (completions.old_log_probs * completions.mask).sum(1),
                "advantages": completions.advantages,
            }
            loss = RLOOTrainer._compute_loss(trainer, None, inputs)
        else:
            objective = Objective(
                AlgorithmConfig(
                    advantages=LeaveOneOut(),
                    ratio="sequence_product",
                    surrogate=Clipped(clip_low=0.2, clip_high=0.2),
                    aggregation=SequenceMean(),
                )
            )
            experience = Experience(
                inputs={},
                actions=torch.zeros_like(completions.mask, dtype=torch.int64),
                action_mask=completions.mask,
                old_log_probs=completions.old_log_probs,
                advantages=torch.where(completions.mask, completions.advantages.unsqueeze(1), 0.0),
            )
            sums = objective(PolicyOutput(log_probs, completions.entropy, None), experience)
            loss = objective.loss(sums, objective.denominators(completions.mask))
        loss.backward()
        losses.append(loss.item())
        gradients.append(log_probs.grad)
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert torch.allclose(gradients[0], gradients[1], atol=1e-12)
    assert gradients[0].abs().max() > 0
