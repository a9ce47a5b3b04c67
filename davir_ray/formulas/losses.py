"""The losses of a packed batch, as functions of logits and targets; and those of preference pairs.

The losses of pairs are functions of four log-probabilities of whole responses given their prompts, in nats, at most 0:
of the policy, which is trained, and of the frozen one that it started from, for the chosen and the rejected response.
Letters: T tokens, V vocabulary, N pairs.
"""

from typing import NamedTuple

import torch
from torch.nn.functional import logsigmoid


def token_nll(logits_TV: torch.Tensor, targets_T: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of each target, in nats: logsumexp(logits) - logits[target].

    T tokens over a vocabulary of V. Computed in float32 at least: a bfloat16 softmax is off by up to 0.07 nats a token.
    """
    logits_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
    return torch.nn.functional.cross_entropy(logits_TV, targets_T, reduction="none")


class PairLogprobs(NamedTuple):
    """Log-probabilities of N pairs, in nats: summed over the tokens of a response."""

    policy_chosen_N: torch.Tensor
    policy_rejected_N: torch.Tensor
    frozen_chosen_N: torch.Tensor
    frozen_rejected_N: torch.Tensor

    def of_tokens(self, num_chosen_N: torch.Tensor, num_rejected_N: torch.Tensor) -> "PairLogprobs":
        """Means over tokens instead of sums."""
        return PairLogprobs(
            self.policy_chosen_N / num_chosen_N,
            self.policy_rejected_N / num_rejected_N,
            self.frozen_chosen_N / num_chosen_N,
            self.frozen_rejected_N / num_rejected_N,
        )


class PairLoss(NamedTuple):
    """Loss and implicit rewards of N pairs; the margin is the difference of the rewards."""

    loss_N: torch.Tensor
    chosen_reward_N: torch.Tensor
    rejected_reward_N: torch.Tensor


def dpo(logprobs: PairLogprobs, beta: float) -> PairLoss:
    """DPO: -log sigmoid(r_w - r_l) with r = beta (log pi - log pi_f) (Rafailov et al. 2023, equation 7)."""
    return _bradley_terry(
        beta * (logprobs.policy_chosen_N - logprobs.frozen_chosen_N),
        beta * (logprobs.policy_rejected_N - logprobs.frozen_rejected_N),
    )


def davir_dpo(logprobs: PairLogprobs, beta: float) -> PairLoss:
    """DavIR-DPO: DPO whose rewards are divided by |log pi_f| of their own response (arXiv 2310.13008).

    The reward is beta (1 - L / L_f) in losses L = -log pi, so that sums and means of token log-probabilities give the
    same. A response that the frozen policy is certain of (log pi_f = 0) has no relative gain: its reward is 0, as the
    limit of no change.
    """
    return _bradley_terry(
        beta * _relative_gain(logprobs.policy_chosen_N, logprobs.frozen_chosen_N),
        beta * _relative_gain(logprobs.policy_rejected_N, logprobs.frozen_rejected_N),
    )


def dpo_norm(logprobs: PairLogprobs, beta: float, num_chosen_N: torch.Tensor, num_rejected_N: torch.Tensor) -> PairLoss:
    """Length-normalised DPO: DPO of means over tokens (Tulu 3, arXiv 2411.15124)."""
    return dpo(logprobs.of_tokens(num_chosen_N, num_rejected_N), beta)


def ipo(logprobs: PairLogprobs, beta: float) -> PairLoss:
    """IPO: (h - 1 / (2 beta))^2 with h the difference of the log-ratios (Azar et al. 2023, equation 17).

    beta is the paper's tau. Its rewards are the log-ratios themselves. The paper sums over tokens; TRL takes means:
    give it those to agree.
    """
    chosen_N = logprobs.policy_chosen_N - logprobs.frozen_chosen_N
    rejected_N = logprobs.policy_rejected_N - logprobs.frozen_rejected_N
    return PairLoss((chosen_N - rejected_N - 1 / (2 * beta)) ** 2, chosen_N, rejected_N)


def pair_loss(
    name: str, logprobs: PairLogprobs, num_chosen_N: torch.Tensor, num_rejected_N: torch.Tensor, beta: float
) -> PairLoss:
    """A loss by its name in the settings, given sums over tokens; ipo is of means over tokens here, as in TRL."""
    match name:
        case "davir_dpo":
            return davir_dpo(logprobs, beta)
        case "dpo":
            return dpo(logprobs, beta)
        case "dpo_norm":
            return dpo_norm(logprobs, beta, num_chosen_N, num_rejected_N)
        case "ipo":
            return ipo(logprobs.of_tokens(num_chosen_N, num_rejected_N), beta)
    raise ValueError(f"{name!r} is no loss of pairs")


def _bradley_terry(chosen_N: torch.Tensor, rejected_N: torch.Tensor) -> PairLoss:
    """-log sigmoid of the margin: how unlikely the preference is under these rewards."""
    return PairLoss(-logsigmoid(chosen_N - rejected_N), chosen_N, rejected_N)


def _relative_gain(policy_N: torch.Tensor, frozen_N: torch.Tensor) -> torch.Tensor:
    """(log pi - log pi_f) / |log pi_f|, as far as the type can still tell two of them apart from infinity."""
    certain_N = frozen_N == 0
    normaliser_N = torch.where(certain_N, torch.ones_like(frozen_N), frozen_N.abs())
    gain_N = torch.where(certain_N, torch.zeros_like(policy_N), (policy_N - frozen_N) / normaliser_N)
    greatest = torch.finfo(gain_N.dtype).max ** 0.5
    return gain_N.clamp(-greatest, greatest)
