"""The scores of an example from its two losses (arXiv 2310.13008), and from one loss with and without the prompt.

A loss is the negative log-likelihood of the response given the prompt, in nats, summed over the scored tokens. The
paper does not state whether losses are summed or averaged over tokens. For DavIR both give the same; RHO has both.
"""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def davir(base_nll: Floats, reference_nll: Floats) -> Floats:
    """DavIR: (L_base - L_ref) / L_base = 1 - L_ref / L_base, the relative reduction of the response loss.

    It is 1 where the reference predicts the response with certainty, 0 where the models are equal, and negative where
    the reference is worse. Where base_nll is 0 the ratio is not defined, and the score is NaN.
    """
    defined = base_nll != 0
    ratio = np.divide(base_nll - reference_nll, base_nll, out=np.full_like(base_nll, np.nan), where=defined)
    return np.asarray(ratio)


def rho_sum(base_nll: Floats, reference_nll: Floats) -> Floats:
    """RHO-LM, summed: L_base - L_ref, in nats. Times beta it is DPO's implicit reward of the reference."""
    return base_nll - reference_nll


def rho_mean(base_nll: Floats, reference_nll: Floats, num_response_tokens: npt.NDArray[np.int32]) -> Floats:
    """RHO-LM, averaged: (L_base - L_ref) / tokens, in nats per token; NaN where there are no tokens."""
    tokens = num_response_tokens.astype(np.float64)
    out = np.full_like(base_nll, np.nan)
    return np.asarray(np.divide(base_nll - reference_nll, tokens, out=out, where=tokens > 0))


def ifd(base_nll: Floats, alone_nll: Floats) -> Floats:
    """IFD, instruction-following difficulty: L(y|x) / L(y), with and without the prompt (arXiv 2308.12032).

    The paper's losses are means over tokens; both are over the same tokens, so their ratio is that of the sums. Above 1
    the prompt makes the response less likely. Where alone_nll is 0 the ratio is not defined, and the score is NaN.
    """
    out = np.full_like(base_nll, np.nan)
    return np.asarray(np.divide(base_nll, alone_nll, out=out, where=alone_nll != 0))


def ifd_perplexity(base_nll: Floats, alone_nll: Floats, num_response_tokens: npt.NDArray[np.int32]) -> Floats:
    """The ratio of perplexities, exp(mean L(y|x) - mean L(y)) (arXiv 2402.00530); NaN where there are no tokens."""
    return np.asarray(np.exp(rho_mean(base_nll, alone_nll, num_response_tokens)))
