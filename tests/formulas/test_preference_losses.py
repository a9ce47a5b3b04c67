"""Losses of preference pairs: properties, and an independent way of writing each."""

import math
from collections.abc import Callable
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch

from davir_ray.formulas.losses import PairLogprobs, PairLoss, davir_dpo, dpo, dpo_norm, ipo, pair_loss

PAIRS = 50
CHOSEN, REJECTED = torch.arange(1, PAIRS + 1).double(), torch.arange(PAIRS, 0, -1).double()
"""Lengths in tokens."""

Loss = Callable[[PairLogprobs], PairLoss]
LOSSES: dict[str, Loss] = {
    "dpo": partial(dpo, beta=0.1),
    "davir_dpo": partial(davir_dpo, beta=27.0),
    "dpo_norm": partial(dpo_norm, beta=5.0, num_chosen_N=CHOSEN, num_rejected_N=REJECTED),
}


def draw(seed: int = 0) -> PairLogprobs:
    """Summed log-probabilities of responses, a few nats a token, the policy a little away from the frozen one."""
    generator = torch.Generator().manual_seed(seed)

    def of(lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        frozen = -lengths * (0.5 + 3 * torch.rand(PAIRS, generator=generator, dtype=torch.float64))
        policy = frozen * (1 + 0.3 * torch.randn(PAIRS, generator=generator, dtype=torch.float64))
        return policy.clamp(max=0), frozen

    (policy_chosen, frozen_chosen), (policy_rejected, frozen_rejected) = of(CHOSEN), of(REJECTED)
    return PairLogprobs(policy_chosen, policy_rejected, frozen_chosen, frozen_rejected)


def gradients(loss: Loss, logprobs: PairLogprobs) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each pair's loss, by the policy's two log-probabilities."""
    chosen, rejected = (part.clone().requires_grad_() for part in logprobs[:2])
    loss(PairLogprobs(chosen, rejected, *logprobs[2:])).loss_N.sum().backward()
    assert chosen.grad is not None
    assert rejected.grad is not None
    return chosen.grad, rejected.grad


@pytest.mark.parametrize("name", LOSSES)
def test_a_policy_that_has_not_moved_loses_log_2(name: str) -> None:
    _, _, frozen_chosen, frozen_rejected = draw()
    found = LOSSES[name](PairLogprobs(frozen_chosen, frozen_rejected, frozen_chosen, frozen_rejected))
    assert found.loss_N.tolist() == pytest.approx([math.log(2)] * PAIRS)
    assert not found.chosen_reward_N.any()
    assert not found.rejected_reward_N.any()


def test_dpo_in_numpy() -> None:
    logprobs = draw()
    pw, pl, fw, fl = (np.asarray(part) for part in logprobs)
    expected = np.log1p(np.exp(-0.1 * ((pw - fw) - (pl - fl))))
    np.testing.assert_allclose(dpo(logprobs, 0.1).loss_N, expected, rtol=1e-12)


def test_davir_dpo_is_its_ratio_form() -> None:
    """Beta [L(y_l) / L_f(y_l) - L(y_w) / L_f(y_w)] in losses."""
    logprobs = draw()
    lw, ll, fw, fl = (-np.asarray(part) for part in logprobs)
    margin = 27.0 * (ll / fl - lw / fw)
    found = davir_dpo(logprobs, 27.0)
    np.testing.assert_allclose(found.chosen_reward_N - found.rejected_reward_N, margin, rtol=1e-9)
    np.testing.assert_allclose(found.loss_N, np.logaddexp(0, -margin), rtol=1e-9)


def test_ipo_in_numpy() -> None:
    logprobs = draw()
    pw, pl, fw, fl = (np.asarray(part) for part in logprobs)
    np.testing.assert_allclose(ipo(logprobs, 0.1).loss_N, ((pw - fw) - (pl - fl) - 5) ** 2, rtol=1e-12)


def test_ipo_is_least_where_the_margin_is_half_the_inverse_of_beta() -> None:
    _, _, frozen_chosen, frozen_rejected = draw()
    moved = PairLogprobs(frozen_chosen + 2.5, frozen_rejected - 2.5, frozen_chosen, frozen_rejected)
    assert ipo(moved, 0.1).loss_N.abs().max() < 1e-20


def test_the_gradient_of_davir_dpo_is_that_of_dpo_over_the_frozen_log_probability_of_each_response() -> None:
    """At the same margin: sigmoid(-margin) is common to both."""
    logprobs, beta = draw(), 27.0
    found = davir_dpo(logprobs, beta)
    weight = torch.sigmoid(found.rejected_reward_N - found.chosen_reward_N)
    chosen, rejected = gradients(partial(davir_dpo, beta=beta), logprobs)
    torch.testing.assert_close(chosen, -beta * weight / logprobs.frozen_chosen_N.abs())
    torch.testing.assert_close(rejected, beta * weight / logprobs.frozen_rejected_N.abs())
    plain = dpo(logprobs, 0.1)
    weight = torch.sigmoid(plain.rejected_reward_N - plain.chosen_reward_N)
    chosen, rejected = gradients(partial(dpo, beta=0.1), logprobs)
    torch.testing.assert_close(chosen, -0.1 * weight)
    torch.testing.assert_close(rejected, 0.1 * weight)


def test_equal_frozen_log_probabilities_give_dpo_at_beta_over_them() -> None:
    policy_chosen, policy_rejected, _, _ = draw()
    frozen = torch.full_like(policy_chosen, -270.0)
    logprobs = PairLogprobs(policy_chosen, policy_rejected, frozen, frozen)
    torch.testing.assert_close(davir_dpo(logprobs, 27.0).loss_N, dpo(logprobs, 0.1).loss_N)


def test_sums_and_means_over_tokens_are_the_same_to_davir_dpo_and_not_to_dpo() -> None:
    logprobs = draw()
    means = logprobs.per_token(CHOSEN, REJECTED)
    torch.testing.assert_close(davir_dpo(means, 27.0).loss_N, davir_dpo(logprobs, 27.0).loss_N)
    assert not torch.allclose(dpo(means, 0.1).loss_N, dpo(logprobs, 0.1).loss_N)
    torch.testing.assert_close(dpo_norm(logprobs, 5.0, CHOSEN, REJECTED).loss_N, dpo(means, 5.0).loss_N)


@pytest.mark.parametrize("name", LOSSES)
def test_exchanging_the_answers_turns_the_margin_round(name: str) -> None:
    loss, logprobs = LOSSES[name], draw()
    other = PairLogprobs(*(logprobs[at] for at in (1, 0, 3, 2)))
    if name == "dpo_norm":
        loss_of_other = partial(dpo_norm, beta=5.0, num_chosen_N=REJECTED, num_rejected_N=CHOSEN)
    else:
        loss_of_other = loss  # type: ignore[assignment]
    one, two = loss(logprobs), loss_of_other(other)
    torch.testing.assert_close(one.chosen_reward_N, two.rejected_reward_N)
    # log sigmoid(m) - log sigmoid(-m) = m
    torch.testing.assert_close(two.loss_N - one.loss_N, one.chosen_reward_N - one.rejected_reward_N)


EXTREMES = [0.0, -1e-30, -1e-6, -1e4, -1e30]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", [*LOSSES, "ipo"])
def test_no_value_makes_a_nan(name: str, dtype: torch.dtype) -> None:
    """Of any four of these log-probabilities, neither loss nor gradient; the margin stays a number, too."""
    every = torch.tensor(list(product(EXTREMES, repeat=4)), dtype=dtype)
    logprobs, num_tokens = PairLogprobs(*every.T), torch.ones(len(every))

    def loss(logprobs: PairLogprobs) -> PairLoss:
        return pair_loss(name, logprobs, num_tokens, num_tokens, beta=27.0)

    found = loss(logprobs)
    assert not found.loss_N.isnan().any()
    assert not (found.chosen_reward_N - found.rejected_reward_N).isnan().any()
    for gradient in gradients(loss, logprobs):
        assert not gradient.isnan().any()


def test_a_response_that_the_frozen_policy_is_certain_of_has_no_reward_and_no_gradient() -> None:
    parts = [torch.tensor([number]) for number in (-1.0, -3.0, 0.0, -2.0)]
    found = davir_dpo(PairLogprobs(*parts), 27.0)
    assert found.chosen_reward_N.item() == 0
    chosen, rejected = gradients(partial(davir_dpo, beta=27.0), PairLogprobs(*parts))
    assert chosen.item() == 0
    assert rejected.item() != 0
