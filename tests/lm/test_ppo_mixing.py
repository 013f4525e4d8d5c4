"""PPO-ptx adds exactly the imitation gradient it says; the moving average is the textbook's, and leaves no trace."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf.core.presets import ALGORITHMS
from rlhf.core.types import Experience
from rlhf.data.records import Demonstration
from rlhf.errors import ConfigError, DataError
from rlhf.lm.ema import EmaConfig, PolicyAverage, evaluate_both
from rlhf.lm.policy import LanguageModelPolicy
from rlhf.lm.ptx import ImitationLoss, PtxConfig
from rlhf.training.learner import Learner
from rlhf.training.update_config import UpdateConfig
from tests.lm.fresh_models import fresh_model
from tests.lm.test_collector import TOKENIZER, make_policy

TEXTS = [Demonstration("a>", "bc"), Demonstration("abc>", "a"), Demonstration("", "abcabc"), Demonstration("c>", "bb")]


def imitation(texts=TEXTS, **settings):
    config = PtxConfig(**{"coefficient": 2.0, "batch_size": 4, **settings})
    return ImitationLoss(texts, tokenizer=TOKENIZER, config=config, seed=1)


def without_advantage(rows=4):
    """Experience from which reinforcement learning learns nothing."""
    mask = torch.ones(rows, 3, dtype=torch.bool)
    zeros = torch.zeros(rows, 3)
    prompts = torch.full((rows, 2), 3)
    inputs = {"prompt_ids": prompts, "prompt_mask": prompts > 0, "completion_mask": mask}
    return Experience(
        inputs=inputs, actions=zeros.long() + 4, action_mask=mask, old_log_probs=zeros - 2.0, advantages=zeros
    )


def nats_per_token(model):
    """-log p of every completion token and its end, by the model's own forward, one text at a time; and their count."""
    losses = []
    for text in TEXTS:
        ids = TOKENIZER(text.prompt + text.completion)["input_ids"] + [TOKENIZER.eos_token_id]
        prompt = max(1, len(text.prompt))  # of a text without a prompt, the first token is given
        log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        losses += [-log_p[place - 1, ids[place]] for place in range(prompt, len(ids))]
    return torch.stack(losses)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_step_is_that_of_the_weighted_imitation_loss(temperature):
    policy, twin = make_policy(temperature=temperature), make_policy()
    algorithm = ALGORITHMS["reinforce"]
    settings = UpdateConfig(learning_rate=1e-2, max_grad_norm=None)
    metrics = Learner(policy, algorithm, settings, mixed=imitation()).update(without_advantage())
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-2, eps=1e-5, weight_decay=0.0)
    loss = nats_per_token(twin.model).mean()
    assert metrics["ptx_loss"] == pytest.approx(loss.item(), rel=1e-5)
    (2.0 * loss).backward()
    optimizer.step()
    for (name, parameter), expected in zip(policy.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, atol=2e-6, rtol=1e-4, msg=name)


def test_microbatches_change_nothing():
    trained = []
    for size in (None, 1, 2):
        policy = make_policy()
        learner = Learner(
            policy,
            ALGORITHMS["reinforce"].model_copy(update={"minibatches": 2}),
            UpdateConfig(learning_rate=1e-2, microbatch_rows=2),
            mixed=imitation(microbatch_size=size),
        )
        metrics = learner.update(without_advantage())
        trained.append((metrics["ptx_loss"], torch.cat([p.detach().flatten() for p in policy.parameters()])))
    for loss, weights in trained[1:]:
        assert loss == pytest.approx(trained[0][0], rel=1e-5)
        torch.testing.assert_close(weights, trained[0][1], atol=1e-5, rtol=1e-4)


def test_it_is_added_to_the_loss_and_not_put_in_its_place():
    results = []
    for mixed in (None, imitation()):
        policy = make_policy()
        experience = without_advantage()
        learning = experience.select(torch.arange(4))
        object.__setattr__(learning, "advantages", torch.ones(4, 3))
        Learner(
            policy, ALGORITHMS["reinforce"], UpdateConfig(learning_rate=1e-3, max_grad_norm=None), mixed=mixed
        ).update(learning)
        results.append(policy(experience.inputs, experience.actions).log_probs.mean().item())
    start = make_policy()(without_advantage().inputs, without_advantage().actions).log_probs.mean().item()
    assert results[0] > start  # the rewarded token became likelier
    assert results[0] != results[1]


def test_a_warm_up_of_the_critic_imitates_nothing():
    policy = make_policy(critic="head")
    experience = without_advantage()
    for name in ("returns", "old_values"):
        object.__setattr__(experience, name, torch.ones(4, 3))
    algorithm = ALGORITHMS["ppo_rlhf"].model_copy(update={"kl": ALGORITHMS["reinforce"].kl})
    learner = Learner(policy, algorithm, UpdateConfig(learning_rate=1e-2), mixed=imitation())
    before = policy.model.lm_head.weight.detach().clone()
    assert "ptx_loss" not in learner.update(experience, critic_only=True)
    assert torch.equal(policy.model.lm_head.weight, before)


def test_the_stream_of_texts_resumes():
    whole = imitation(batch_size=1)
    drawn = [whole.minibatch()[0].actions.tolist() for _ in range(6)]
    first = imitation(batch_size=1)
    for _ in range(3):
        first.minibatch()
    second = imitation(batch_size=1)
    second.load_state_dict(first.state_dict())
    assert [second.minibatch()[0].actions.tolist() for _ in range(3)] == drawn[3:]
    assert sorted(map(str, drawn[:4])) == sorted(map(str, {str(ids): ids for ids in drawn}.values()))  # each text once


def test_what_cannot_be_imitated_is_refused():
    with pytest.raises(DataError, match="no demonstration"):
        imitation([])
    with pytest.raises(DataError, match="too long"):
        imitation(max_length=5)
    with pytest.raises(ConfigError, match="shared evenly"):
        imitation(batch_size=4, microbatch_size=3)


# --- moving average -----------------------------------------------------------------------------------------------


def shifted(policy, amount):
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(amount)


def test_the_average_is_the_textbooks():
    policy = LanguageModelPolicy(fresh_model(dtype=torch.float64), critic="head")
    start = policy.model.lm_head.weight.detach().clone()
    average = PolicyAverage(policy, EmaConfig(decay=0.9))
    for _ in range(3):
        shifted(policy, 1.0)
        average.after_update(1, {})
    # weights start + 1, + 2, + 3: 0.1 x (0.9^2 x 1 + 0.9 x 2 + 3) = 0.561 above the start
    with average.in_place():
        torch.testing.assert_close(policy.model.lm_head.weight.detach(), start + 0.561)
    assert torch.equal(policy.model.lm_head.weight, start + 1.0 + 1.0 + 1.0)


def test_the_policy_gets_its_own_weights_back_after_an_error():
    policy = LanguageModelPolicy(fresh_model())
    average = PolicyAverage(policy, EmaConfig())
    shifted(policy, 1.0)
    own = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    with pytest.raises(RuntimeError), average.in_place():
        raise RuntimeError
    assert all(torch.equal(own[name], tensor) for name, tensor in policy.state_dict().items())


def test_the_average_is_saved_as_a_model_and_resumes(tmp_path):
    policy = LanguageModelPolicy(fresh_model())
    average = PolicyAverage(policy, EmaConfig(decay=0.5))
    shifted(policy, 1.0)
    average.update()
    average.save(tmp_path / "ema", tokenizer=TOKENIZER)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "ema")
    expected = fresh_model().lm_head.weight + 0.5  # half the way to + 1
    torch.testing.assert_close(opened.lm_head.weight, expected)
    resumed = PolicyAverage(LanguageModelPolicy(fresh_model()), EmaConfig(decay=0.5))
    resumed.load_state_dict(average.state_dict())
    with resumed.in_place():
        torch.testing.assert_close(resumed._policy.model.lm_head.weight.detach(), expected)


def test_both_are_evaluated():
    policy = LanguageModelPolicy(fresh_model())
    average = PolicyAverage(policy, EmaConfig())
    start = policy.model.lm_head.weight.detach()[0, 0].item()
    shifted(policy, 1.0)
    evaluate = evaluate_both(lambda: {"weight": policy.model.lm_head.weight[0, 0].item()}, average)
    assert evaluate() == {"weight": pytest.approx(start + 1.0), "ema_weight": pytest.approx(start)}
