"""IFD in one worker: the base's losses of the responses without their prompts, and IFD from those with them."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from davir_ray.formulas import scores as formulas
from davir_ray.models.base_cache import BaseCache
from davir_ray.models.checkpoint import Checkpoint
from davir_ray.models.kernel.packing import scored_positions
from davir_ray.models.scorer import Scorer, ScorerSettings, Tokenised, nullable, tokenised
from davir_ray.schema import IFD, Status

EXAMPLE_COLUMNS = ["example_id", "num_response_tokens", "input_ids", "response_spans"]
SCORE_COLUMNS = ["base_nll", "status"]
"""Columns of examples/ and of scores/ that it reads."""


class ResponseScorer:
    """Holds the base, and computes IFD for tables of examples that have been scored.

    The response alone is the start token followed by the scored tokens, so its loss is of the same tokens as base_nll:
    of a conversation the assistant's turns one after the other, of a truncated response what is left of it.
    """

    def __init__(
        self, base: Checkpoint, settings: ScorerSettings, start_id: int | None, base_cache: BaseCache | None = None
    ) -> None:
        self._scorer = Scorer(base, None, settings, base_cache)
        self._start_id = start_id
        self.numerics: dict[str, Any] = self._scorer.numerics

    def __call__(self, examples: pa.Table) -> pa.Table:
        """Return the columns of IFD for a table with EXAMPLE_COLUMNS and SCORE_COLUMNS, in the same row order.

        A row whose base_nll is null keeps the status that says why.
        """
        sequences = [response_alone(*sequence, self._start_id) for sequence in tokenised(examples)]
        alone_nll, status = self._scorer.base_nll(sequences, np.asarray(examples["example_id"]))
        base_nll = examples["base_nll"].to_numpy()
        status[(status == Status.OK) & (alone_nll == 0)] = Status.ZERO_ALONE_NLL
        status = np.where(np.isnan(base_nll), examples["status"].to_numpy(), status)
        num_tokens, is_ok = np.asarray(examples["num_response_tokens"]), status == Status.OK
        columns = {
            "example_id": examples["example_id"],
            "num_response_tokens": examples["num_response_tokens"],
            "alone_nll": nullable(alone_nll, np.isfinite(alone_nll)),
            "ifd": nullable(formulas.ifd(base_nll, alone_nll), is_ok),
            "ifd_perplexity": nullable(formulas.ifd_perplexity(base_nll, alone_nll, num_tokens), is_ok),
            "status": pa.array(status.tolist(), pa.string()),
        }
        return pa.table(columns, schema=IFD)


def response_alone(input_ids: npt.NDArray[np.int32], spans: tuple[int, ...], start_id: int | None) -> Tokenised:
    """The scored tokens after a start token, all of them scored; nothing if one of the two is missing.

    Also nothing if no token precedes the first scored one in the example, because that token has no loss there.
    """
    if start_id is None or not spans or spans[0] == 0:
        return np.empty(0, np.int32), ()
    response = input_ids[scored_positions(spans)]
    return np.concatenate([np.array([start_id], np.int32), response]), (1, 1 + len(response))


def start_id_of(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that stands before a response alone: BOS, or EOS where there is none, as after another document.

    lm-evaluation-harness puts the same token before a text without a context. None if there is neither.
    """
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    return next((int(token_id) for token_id in ids if token_id is not None), None)
