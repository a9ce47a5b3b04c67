"""The scores of an example from its two losses (arXiv 2310.13008).

Losses are negative log-likelihoods of the response given the prompt, in nats, summed over the scored tokens. The paper
does not state whether they are summed or averaged; in DavIR it cancels, for RHO both are given.
"""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def davir(base_nll: Floats, reference_nll: Floats) -> Floats:
    """DavIR: (L_base - L_ref) / L_base = 1 - L_ref / L_base, the relative reduction of the response loss.

    At most 1 (the reference has memorised the response), 0 for equal models, negative where the reference is worse.
    Where base_nll is 0 the ratio is not defined: NaN, and never a substitute.
    """
    defined = base_nll != 0
    ratio = np.divide(base_nll - reference_nll, base_nll, out=np.full_like(base_nll, np.nan), where=defined)
    return np.asarray(ratio)


def rho_sum(base_nll: Floats, reference_nll: Floats) -> Floats:
    """RHO-LM, summed: L_base - L_ref, in nats; beta times this is DPO's implicit reward of the reference."""
    return base_nll - reference_nll


def rho_mean(base_nll: Floats, reference_nll: Floats, num_response_tokens: npt.NDArray[np.int32]) -> Floats:
    """RHO-LM over token means: (L_base - L_ref) / tokens, in nats a token; NaN for no tokens."""
    tokens = num_response_tokens.astype(np.float64)
    out = np.full_like(base_nll, np.nan)
    return np.asarray(np.divide(base_nll - reference_nll, tokens, out=out, where=tokens > 0))
