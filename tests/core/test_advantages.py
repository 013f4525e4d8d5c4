"""Vectors of rlax and tianshou: recomputed in float64 from the inputs of their tests (both Apache-2.0 or MIT).

rlax: google-deepmind/rlax `rlax/_src/multistep_test.py`; tianshou: thu-ml/tianshou `test/base/test_returns.py`.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf.core.advantages import (
    carry_values,
    discounted_scan,
    gae,
    group_relative,
    leave_one_out,
    n_step_returns,
    next_own_step,
    rewards_to_go,
)
from rlhf.errors import ConfigError

NAN = float("nan")


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def flags(*values: int) -> Tensor:
    return torch.tensor([values], dtype=torch.bool)


# --- the scan -----------------------------------------------------------------------------------------------------

REWARDS = torch.tensor([[1.0, 0.0, -1.0, 0.0, 1.0], [0.5, 0.8, -0.7, 0.0, 2.1]], dtype=torch.float64)
DISCOUNTS = torch.tensor([[0.5, 0.9, 1.0, 0.5, 0.8], [0.9, 0.5, 0.3, 0.8, 0.7]], dtype=torch.float64)
NEXT = torch.tensor([[3.0, 1.0, 5.0, -5.0, 3.0], [-1.7, 1.2, 2.3, 2.2, 2.7]], dtype=torch.float64)


def test_scan_gives_rlax_discounted_returns():
    # rlax DiscountedReturnsTest: G_t = r_t + discount_t G_{t+1}, bootstrapped with 3.0 and 2.7.
    last = torch.zeros_like(REWARDS)
    last[:, -1] = DISCOUNTS[:, -1] * torch.tensor([3.0, 2.7])
    expected = torch.tensor([[1.315, 0.63, 0.7, 1.7, 3.4], [1.33592, 0.9288, 0.2576, 3.192, 3.99]], dtype=torch.float64)
    assert torch.allclose(discounted_scan(REWARDS + last, DISCOUNTS), expected, atol=1e-12)


def test_scan_gives_rlax_lambda_returns():
    # rlax LambdaReturnsTest: G_t = r_t + discount_t ((1 - .75) v_{t+1} + .75 G_{t+1}), G_T = v_T.
    increments = REWARDS + DISCOUNTS * 0.25 * NEXT
    increments[:, -1] += DISCOUNTS[:, -1] * 0.75 * NEXT[:, -1]
    expected = torch.tensor(
        [
            [1.6460546875, 0.7228125, 0.7375, 0.65, 3.4],
            [0.78663171875, 0.99130625, 0.11015, 2.834, 3.99],
        ],
        dtype=torch.float64,
    )
    assert torch.allclose(discounted_scan(increments, DISCOUNTS * 0.75), expected, atol=1e-12)


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 4, 5, 7, 8, 9, 31, 32, 33, 100])
def test_scan_equals_the_loop_at_every_length(steps):
    generator = torch.Generator().manual_seed(steps)
    x = torch.randn(3, steps, generator=generator, dtype=torch.float64)
    decay = torch.rand(3, steps, generator=generator, dtype=torch.float64) * 1.1
    decay[torch.rand(3, steps, generator=generator) < 0.1] = 0.0
    kept = x.clone(), decay.clone()
    assert torch.allclose(discounted_scan(x, decay), loop_scan(x, decay), atol=1e-12)
    assert torch.equal(x, kept[0])
    assert torch.equal(decay, kept[1])


def loop_scan(x: Tensor, decay: Tensor) -> Tensor:
    y, later = torch.zeros_like(x), torch.zeros_like(x[:, 0]) if x.shape[1] else None
    for t in reversed(range(x.shape[1])):
        later = x[:, t] + decay[:, t] * later
        y[:, t] = later
    return y


# --- GAE ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gae_lambda", "expected"),
    [
        # rlax TruncatedGeneralizedAdvantageEstimationTest, first row (constant discount .99).
        (1.0, [-1.4511880549, -4.45574551, 2.539651, 0.5249, -0.49]),
        (0.7, [-0.6769794974104899, -5.24816666293, 2.48460799, 0.67043, -0.49]),
        (0.4, [0.5673187310105599, -6.04212441664, 2.34312016, 0.81596, -0.49]),
    ],
)
def test_gae_of_one_running_episode(gae_lambda, expected):
    advantages, returns = gae(
        row(0.0, 0.0, 1.0, 0.0, -0.5),
        row(1.0, 4.0, -3.0, -2.0, -1.0),
        next_values=row(4.0, -3.0, -2.0, -1.0, -1.0),
        episode_ends=flags(0, 0, 0, 0, 0),
        mask=flags(1, 1, 1, 1, 1),
        discount=0.99,
        gae_lambda=gae_lambda,
    )
    assert advantages[0].tolist() == pytest.approx(expected)
    assert torch.allclose(returns, advantages + row(1.0, 4.0, -3.0, -2.0, -1.0))


@pytest.mark.parametrize(
    ("gae_lambda", "expected"),
    [
        # The same test, second row: discounts [.9, .9, .9, 0, .9], the 0 being an episode's end.
        (1.0, [3.0, 2.0, 1.0, 0.0, -4.9]),
        (0.7, [2.2899, 1.73, 1.0, 0.0, -4.9]),
        (0.4, [1.7256, 1.46, 1.0, 0.0, -4.9]),
    ],
)
def test_gae_is_cut_where_an_episode_terminates(gae_lambda, expected):
    advantages, _ = gae(
        row(0.0, 0.0, 0.0, 0.0, 1.0),
        row(-3.0, -2.0, -1.0, 0.0, 5.0),
        next_values=row(-2.0, -1.0, 0.0, 0.0, -1.0),
        episode_ends=flags(0, 0, 0, 1, 0),
        mask=flags(1, 1, 1, 1, 1),
        discount=0.9,
        gae_lambda=gae_lambda,
    )
    assert advantages[0].tolist() == pytest.approx(expected)


TIANSHOU_REWARDS = row(101, 102, 103, 200, 104, 105, 106, 201, 107, 108, 109, 202)
TIANSHOU_VALUES = row(0, 2, 3, 4, -1, 5, 6, 7, -2, 8, 9, 10)
TIANSHOU_NEXT = row(2, 3, 4, -1, 5, 6, 7, -2, 8, 9, 10, -3)
EVERY_FOURTH = flags(0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1)
ONLY_LAST = flags(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1)


@pytest.mark.parametrize(
    ("terminated", "expected"),
    [
        # tianshou test_returns.test_episodic_returns, gamma .99, lambda .95: three episodes that terminate ...
        (
            EVERY_FOURTH,
            "454.83446999450007 376.114269 291.298 200 464.56101932675 383.1084735 295.387 201 "
            "474.287568659 390.102678 299.476 202",
        ),
        # ... and the first two truncated instead: bootstrapped with V(s'), yet cut.
        (
            ONLY_LAST,
            "454.01087899042625 375.2385741525 290.366905 199.01 462.9138373186025 381.357083805 293.52481 199.02 "
            "474.287568659 390.102678 299.476 202",
        ),
    ],
)
def test_gae_returns_of_terminated_and_truncated_episodes(terminated, expected):
    _, returns = gae(
        TIANSHOU_REWARDS,
        TIANSHOU_VALUES,
        next_values=torch.where(terminated, 0.0, TIANSHOU_NEXT),
        episode_ends=EVERY_FOURTH,
        mask=torch.ones_like(EVERY_FOURTH),
        discount=0.99,
        gae_lambda=0.95,
    )
    assert returns[0].tolist() == pytest.approx([float(number) for number in expected.split()])


def loop_gae(rewards, values, next_values, ends, mask, discount, gae_lambda) -> list[float]:
    """One row, as SPEC writes it: masked steps hand V_next and A_next on."""
    advantages, later = [0.0] * len(rewards), 0.0
    for t in reversed(range(len(rewards))):
        if not mask[t]:
            continue
        going_on = 0.0 if ends[t] else 1.0
        delta = rewards[t] + discount * next_values[t] - values[t]
        later = delta + discount * gae_lambda * going_on * later
        advantages[t] = later
    return advantages


def random_segment(seed: int, rows: int, steps: int) -> dict[str, Tensor]:
    """Random rows with masks and ends; the masked entries are NaN."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, steps, generator=generator) < 0.7
    ends = (torch.rand(rows, steps, generator=generator) < 0.15) & mask

    def normal() -> Tensor:
        return torch.where(mask, torch.randn(rows, steps, generator=generator, dtype=torch.float64), NAN)

    rewards, values, next_values = normal(), normal(), normal()
    return {"rewards": rewards, "values": values, "next_values": next_values, "episode_ends": ends, "mask": mask}


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 4),
    steps=st.integers(1, 40),
    discount=st.sampled_from([0.0, 0.9, 0.99, 1.0]),
    gae_lambda=st.sampled_from([0.0, 0.5, 0.95, 1.0]),
)
def test_gae_equals_the_python_loop_with_masks_and_ends(seed, rows, steps, discount, gae_lambda):
    segment = random_segment(seed, rows, steps)
    advantages, returns = gae(**segment, discount=discount, gae_lambda=gae_lambda)
    for b in range(rows):
        columns = [segment[name][b].tolist() for name in ("rewards", "values", "next_values", "episode_ends", "mask")]
        assert advantages[b].tolist() == pytest.approx(loop_gae(*columns, discount, gae_lambda), abs=1e-10)
    assert torch.equal(returns, torch.where(segment["mask"], advantages + segment["values"], 0.0))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), steps=st.integers(1, 30))
def test_gae_at_lambda_0_and_1_is_the_td_error_and_the_monte_carlo_error(seed, steps):
    segment = random_segment(seed, 2, steps)
    values, mask = segment.pop("values"), segment["mask"]
    td_error, _ = gae(values=values, **segment, discount=0.9, gae_lambda=0.0)
    one_step = segment["rewards"] + 0.9 * segment["next_values"] - values
    assert torch.allclose(td_error[mask], one_step[mask])
    # Telescoping needs next_values that really are the values of the next steps.
    following = carry_values(values, mask, episode_ends=segment["episode_ends"])
    segment["next_values"] = following
    monte_carlo, returns = gae(values=values, **segment, discount=0.9, gae_lambda=1.0)
    to_go = rewards_to_go(**segment, discount=0.9)
    assert torch.allclose(returns, to_go, atol=1e-10)
    assert torch.allclose(monte_carlo[mask], (to_go - values)[mask], atol=1e-10)


def test_long_horizons_in_float32_stay_close_to_float64():
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 8, 2048, generator=generator)
    ends = torch.rand(8, 2048, generator=generator) < 0.005
    settings_of = {"episode_ends": ends, "mask": torch.ones_like(ends), "discount": 0.99, "gae_lambda": 0.95}
    following = carry_values(values, torch.ones_like(ends), episode_ends=ends)
    single, _ = gae(rewards, values, next_values=following, **settings_of)
    double, _ = gae(rewards.double(), values.double(), next_values=following.double(), **settings_of)
    assert (single - double).abs().max().item() < 2e-5


# --- next steps, rewards to go, n-step -------------------------------------------------------------------------------


def test_next_own_step_and_carried_values_skip_masked_steps():
    mask = flags(1, 0, 0, 1, 1, 0)
    assert next_own_step(mask).tolist() == [[3, 3, 3, 4, 6, 6]]
    carried = carry_values(
        row(1, NAN, NAN, 2, 3, NAN), mask, episode_ends=flags(0, 0, 0, 0, 0, 0), bootstrap=torch.tensor([7.0])
    )
    assert carried[mask].tolist() == [2.0, 3.0, 7.0]
    ended = carry_values(row(1, NAN, NAN, 2, 3, NAN), mask, episode_ends=flags(1, 0, 0, 0, 1, 0))
    assert ended[mask].tolist() == [0.0, 3.0, 0.0]


def test_rewards_to_go_by_hand():
    # Discount .5, an end after the second step, masked fourth step, bootstrap 8 after the last:
    # 1 + .5 * 2 = 2 | 2 | 3 + .5 * 5 + .5 * .5 * 8 = 7.5 | masked | 5 + .5 * 8 = 9.
    arguments = {"episode_ends": flags(0, 1, 0, 0, 0), "mask": flags(1, 1, 1, 0, 1), "discount": 0.5}
    rewards = row(1, 2, 3, NAN, 5)
    with_tail = rewards_to_go(rewards, next_values=row(9, 0, 9, NAN, 8), **arguments)
    assert with_tail.tolist() == [[2.0, 2.0, 7.5, 0.0, 9.0]]
    # Without values nothing is added: 3 + .5 * 5 = 5.5.
    assert rewards_to_go(rewards, **arguments).tolist() == [[2.0, 2.0, 5.5, 0.0, 5.0]]
    # An episode truncated after the second step goes on with its own bootstrap: 2 + .5 * 4 = 4, 1 + .5 * 4 = 3.
    truncated = rewards_to_go(rewards, next_values=row(9, 4, 9, NAN, 8), **arguments)
    assert truncated.tolist() == [[3.0, 4.0, 7.5, 0.0, 9.0]]


@pytest.mark.parametrize(
    ("n", "expected"),
    [
        # Discount .5; own steps are 0, 1, 2, 4; the episode ends (truncated, V' = 4) after step 1; V' = 8 after step 4.
        # n = 1: r + .5 V'.
        (1, [1 + 5, 2 + 2, 3 + 10, 0, 5 + 4]),
        # n = 2: 1 + .5 (2 + .5 * 4) = 3 | 4 | 3 + .5 (5 + .5 * 8) = 7.5 | masked | 9.
        (2, [3, 4, 7.5, 0, 9]),
        # Longer than what is left changes nothing.
        (3, [3, 4, 7.5, 0, 9]),
        (50, [3, 4, 7.5, 0, 9]),
    ],
)
def test_n_step_returns_by_hand(n, expected):
    returns = n_step_returns(
        row(1, 2, 3, NAN, 5),
        next_values=row(10, 4, 20, NAN, 8),
        episode_ends=flags(0, 1, 0, 0, 0),
        mask=flags(1, 1, 1, 0, 1),
        discount=0.5,
        n=n,
    )
    assert returns.tolist() == [pytest.approx(expected)]


def test_n_step_returns_bootstrap_with_discount_to_the_n():
    # Lecture notes that print `discount * max Q(s_{t+n})` are wrong: 1 + .5 + .25 + .125 * 16 = 3.75.
    returns = n_step_returns(
        row(1, 1, 1, 1),
        next_values=row(0, 0, 16, 0),
        episode_ends=flags(0, 0, 0, 0),
        mask=flags(1, 1, 1, 1),
        discount=0.5,
        n=3,
    )
    assert returns[0, 0].item() == 3.75


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 8))
def test_masked_steps_are_as_if_they_were_not_there(seed, n):
    """Squeezing the masked steps out of a row changes no advantage and no return."""
    segment = random_segment(seed, 1, 12)
    kept = segment["mask"][0]
    if not kept.any():
        return
    squeezed = {name: tensor[:, kept] for name, tensor in segment.items()}
    for whole, short in zip(
        gae(**segment, discount=0.9, gae_lambda=0.8), gae(**squeezed, discount=0.9, gae_lambda=0.8), strict=True
    ):
        assert torch.allclose(whole[:, kept], short, atol=1e-12)
    segment.pop("values")
    squeezed.pop("values")
    assert torch.allclose(
        n_step_returns(**segment, discount=0.9, n=n)[:, kept], n_step_returns(**squeezed, discount=0.9, n=n)
    )
    assert torch.allclose(rewards_to_go(**segment, discount=0.9)[:, kept], rewards_to_go(**squeezed, discount=0.9))


def test_a_row_without_own_steps_gets_zeros():
    nothing = torch.full((1, 3), NAN)
    arguments = {
        "next_values": nothing,
        "episode_ends": flags(0, 0, 0),
        "mask": flags(0, 0, 0),
        "discount": 0.9,
    }
    zeros = torch.zeros(1, 3)
    assert torch.equal(gae(nothing, nothing, **arguments, gae_lambda=0.9)[0], zeros)
    assert torch.equal(rewards_to_go(nothing, **arguments), zeros)
    assert torch.equal(n_step_returns(nothing, **arguments, n=2), zeros)


# --- groups -------------------------------------------------------------------------------------------------------


def test_group_relative_with_population_and_sample_deviation():
    # DeepSeekMath eq. 3 on [1, 0, 0, 1]: mean .5; population std .5 -> +-1; sample std sqrt(1/3) -> +-.8660254.
    scores, ids = torch.tensor([1.0, 0.0, 0.0, 1.0]), torch.zeros(4, dtype=torch.int64)
    population = group_relative(scores, ids, scale="population_std", epsilon=0.0)
    sample = group_relative(scores, ids, scale="sample_std", epsilon=0.0)
    assert population.tolist() == [1.0, -1.0, -1.0, 1.0]
    half_root = 0.8660254037844387
    assert sample.tolist() == pytest.approx([half_root, -half_root, -half_root, half_root])
    # epsilon is added to the deviation: .5 / (.57735027 + .1) = .73816933.
    assert group_relative(scores, ids, epsilon=0.1)[0].item() == pytest.approx(0.5 / (3**-0.5 + 0.1))
    assert group_relative(scores, ids, scale="none").tolist() == [0.5, -0.5, -0.5, 0.5]


def test_group_relative_with_the_deviation_of_the_batch():
    # Groups [0, 2] and [10, 14] (means 1, 12); all four: mean 6.5, squares 42.25 + 20.25 + 12.25 + 56.25 = 131,
    # sample std sqrt(131 / 3) = 6.6080758. Lite PPO, https://arxiv.org/abs/2508.08221.
    ids = torch.tensor([7, -1, 7, -1])
    result = group_relative(torch.tensor([0.0, 10.0, 2.0, 14.0]), ids, scale="batch_std", epsilon=0.0)
    assert result.tolist() == pytest.approx([number / (131 / 3) ** 0.5 for number in (-1, -2, 1, 2)])


def test_group_ids_need_neither_order_nor_density():
    ids = torch.tensor([900, -3, 900, -3, 900])
    result = group_relative(torch.tensor([1.0, 5.0, 2.0, 7.0, 6.0]), ids, scale="none")
    assert result.tolist() == [-2.0, -1.0, -1.0, 1.0, 3.0]


@pytest.mark.parametrize("scale", ["sample_std", "population_std", "batch_std", "none"])
@pytest.mark.parametrize("epsilon", [0.0, 1e-4])
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1 / 3, 1e8, 1e8 / 3, -123.456, 1e-30])
@pytest.mark.parametrize("size", [2, 3, 7, 64])
def test_a_group_of_equal_scores_gets_exactly_zero(scale, epsilon, value, size):
    scores, ids = torch.full((size,), value), torch.zeros(size, dtype=torch.int64)
    assert (group_relative(scores, ids, scale=scale, epsilon=epsilon) == 0).all()
    assert (leave_one_out(scores, ids) == 0).all()


@settings(max_examples=60, deadline=None)
@given(
    value=st.floats(-1e8, 1e8, width=32),
    size=st.integers(2, 9),
    scale=st.sampled_from(["sample_std", "population_std", "batch_std", "none"]),
)
def test_equal_groups_stay_zero_beside_others(value, size, scale):
    scores = torch.cat([torch.full((size,), value), torch.tensor([1.0, 2.0])])
    ids = torch.tensor([0] * size + [1, 1])
    assert (group_relative(scores, ids, scale=scale)[:size] == 0).all()
    assert (leave_one_out(scores, ids)[:size] == 0).all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=9))
def test_leave_one_out_is_score_minus_mean_of_the_others(scores):
    # Both forms of the definition, in plain python: r_i - mean_{j != i} r_j = n / (n - 1) (r_i - mean r).
    n = len(scores)
    by_others = [score - (sum(scores) - score) / (n - 1) for score in scores]
    by_mean = [n / (n - 1) * (score - sum(scores) / n) for score in scores]
    result = leave_one_out(torch.tensor(scores, dtype=torch.float64), torch.zeros(n, dtype=torch.int64)).tolist()
    assert result == pytest.approx(by_others, abs=1e-9)
    assert result == pytest.approx(by_mean, abs=1e-9)


@pytest.mark.parametrize("function", [group_relative, leave_one_out])
def test_a_group_of_one_is_refused(function):
    # verl lets its raw reward become the advantage; NeMo-RL divides by zero and replaces the NaN by 0.
    with pytest.raises(ConfigError, match=r"1 of 2 groups with a single row.*at least 2 rows.*Raise group_size"):
        function(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 0, 1]))


def test_no_rows_give_no_advantages():
    empty = group_relative(torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    assert empty.shape == (0,)


def test_the_deviation_of_the_batch_spans_processes(on_two_processes):
    scores, ids = torch.tensor([0.0, 2.0, 10.0, 14.0]), torch.tensor([0, 0, 1, 1])
    whole = group_relative(scores, ids, scale="batch_std")
    parts = on_two_processes(
        lambda rows, reduce: group_relative(scores[rows], ids[rows], scale="batch_std", reduce=reduce),
        slice(0, 2),
        slice(2, 4),
    )
    assert torch.allclose(torch.cat(parts), whole)


def test_the_scan_of_many_rows_is_the_scan_of_each():
    # 300 rows of 2000 steps exceed one block of the CPU's cache.
    generator = torch.Generator().manual_seed(0)
    x, decay = torch.rand(300, 2000, generator=generator), torch.rand(300, 2000, generator=generator)
    scanned = discounted_scan(x, decay)
    for row in (0, 130, 131, 299):
        assert torch.equal(scanned[row : row + 1], discounted_scan(x[row : row + 1], decay[row : row + 1]))
