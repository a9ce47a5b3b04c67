"""The scores of an example from its two losses (arXiv 2310.13008).

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
