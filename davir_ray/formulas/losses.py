"""The loss of tokens, and the losses of preference pairs.

A loss of pairs is a function of four log-probabilities (nats, at most 0) of a whole response given its prompt: those of
the chosen and of the rejected response, each under the policy, which is trained, and under the frozen policy, from
which it started. The letters in names are dimensions: T tokens, V vocabulary, N pairs.
"""

from typing import NamedTuple

import torch
from torch.nn.functional import logsigmoid


def token_nll(logits_TV: torch.Tensor, targets_T: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of each target, in nats: logsumexp(logits) - logits[target].

    Computed in at least float32: a bfloat16 softmax is wrong by up to 0.07 nats per token.
    """
    logits_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
    return torch.nn.functional.cross_entropy(logits_TV, targets_T, reduction="none")


class PairLogprobs(NamedTuple):
    """Log-probabilities of N pairs, in nats, summed over the tokens of a response."""

    policy_chosen_N: torch.Tensor
    policy_rejected_N: torch.Tensor
    frozen_chosen_N: torch.Tensor
    frozen_rejected_N: torch.Tensor

    def per_token(self, num_chosen_N: torch.Tensor, num_rejected_N: torch.Tensor) -> "PairLogprobs":
        """Means over the tokens of a response instead of sums."""
        return PairLogprobs(
            self.policy_chosen_N / num_chosen_N,
            self.policy_rejected_N / num_rejected_N,
            self.frozen_chosen_N / num_chosen_N,
            self.frozen_rejected_N / num_rejected_N,
        )


class PairLoss(NamedTuple):
    """Loss and implicit rewards of N pairs; the margin is the chosen reward minus the rejected one."""

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
    """DavIR-DPO: DPO with each reward divided by |log pi_f| of its response (arXiv 2310.13008).

    With losses L = -log pi the reward is beta (1 - L / L_f), so sums and means over tokens give the same. If the frozen
    policy is certain of a response (log pi_f = 0), the ratio is not defined; the reward is then 0, as for no change.
    """
    return _bradley_terry(
        beta * _relative_gain(logprobs.policy_chosen_N, logprobs.frozen_chosen_N),
        beta * _relative_gain(logprobs.policy_rejected_N, logprobs.frozen_rejected_N),
    )


def dpo_norm(logprobs: PairLogprobs, beta: float, num_chosen_N: torch.Tensor, num_rejected_N: torch.Tensor) -> PairLoss:
    """Length-normalised DPO: DPO on means over tokens (Tulu 3, arXiv 2411.15124)."""
    return dpo(logprobs.per_token(num_chosen_N, num_rejected_N), beta)


def ipo(logprobs: PairLogprobs, beta: float) -> PairLoss:
    """IPO: (h - 1 / (2 beta))^2, where h is the difference of the log-ratios (Azar et al. 2023, equation 17).

    beta is the paper's tau. The rewards are the log-ratios themselves. The paper sums over tokens; to agree with TRL,
    pass means.
    """
    chosen_N = logprobs.policy_chosen_N - logprobs.frozen_chosen_N
    rejected_N = logprobs.policy_rejected_N - logprobs.frozen_rejected_N
    return PairLoss((chosen_N - rejected_N - 1 / (2 * beta)) ** 2, chosen_N, rejected_N)


def pair_loss(
    name: str, logprobs: PairLogprobs, num_chosen_N: torch.Tensor, num_rejected_N: torch.Tensor, beta: float
) -> PairLoss:
    """The loss with this name in the settings, from sums over tokens; ipo uses means over tokens, as TRL does."""
    match name:
        case "davir_dpo":
            return davir_dpo(logprobs, beta)
        case "dpo":
            return dpo(logprobs, beta)
        case "dpo_norm":
            return dpo_norm(logprobs, beta, num_chosen_N, num_rejected_N)
        case "ipo":
            return ipo(logprobs.per_token(num_chosen_N, num_rejected_N), beta)
    raise ValueError(f"{name!r} is not a loss of pairs")


def _bradley_terry(chosen_N: torch.Tensor, rejected_N: torch.Tensor) -> PairLoss:
    """-log sigmoid(r_w - r_l): the negative log-likelihood of the preference in the Bradley-Terry model."""
    return PairLoss(-logsigmoid(chosen_N - rejected_N), chosen_N, rejected_N)


def _relative_gain(policy_N: torch.Tensor, frozen_N: torch.Tensor) -> torch.Tensor:
    """(log pi - log pi_f) / |log pi_f|, clamped so that the margin of two of them stays finite."""
    certain_N = frozen_N == 0
    normaliser_N = torch.where(certain_N, torch.ones_like(frozen_N), frozen_N.abs())
    gain_N = torch.where(certain_N, torch.zeros_like(policy_N), (policy_N - frozen_N) / normaliser_N)
    limit = torch.finfo(gain_N.dtype).max ** 0.5
    return gain_N.clamp(-limit, limit)
