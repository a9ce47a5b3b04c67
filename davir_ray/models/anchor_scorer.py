"""The anchor in one worker: the losses of its rows under a reference that did not score them for scores/."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from davir_ray.formulas import scores as formulas
from davir_ray.models.checkpoint import Checkpoint
from davir_ray.models.scorer import FOLD, FoldScorer, ScorerSettings, nullable, tokenised
from davir_ray.schema import Status

EXAMPLE_COLUMNS = ["example_id", "num_prompt_tokens", "num_response_tokens", "input_ids", "response_spans"]
SCORE_COLUMNS = ["base_nll", "status"]
"""Columns of examples/ and of scores/ that it reads."""


class AnchorScorer:
    """Holds one reference at a time, and the base, whose weights adapters share and whose losses scores/ have."""

    def __init__(self, base: Checkpoint, references: Mapping[int, Checkpoint], settings: ScorerSettings) -> None:
        self._scorers = FoldScorer(base, references, settings)

    @property
    def numerics(self) -> dict[str, Any]:
        """The arithmetic of the last call; see Scorer."""
        return self._scorers.numerics

    def __call__(self, examples: pa.Table) -> pa.Table:
        """Score a table with EXAMPLE_COLUMNS, SCORE_COLUMNS and FOLD, the fold whose reference is to score all of it.

        Returns the columns of ANCHORED and num_prompt_tokens, in the same row order. A row whose base_nll is null keeps
        the status that says why.
        """
        scorer = self._scorers.scorer_of(examples)
        reference_nll, status = scorer.reference_nll(list(tokenised(examples)), np.asarray(examples["example_id"]))
        base_nll = examples["base_nll"].to_numpy()
        status[(status == Status.OK) & (base_nll == 0)] = Status.ZERO_BASE_NLL
        status = np.where(np.isnan(base_nll), examples["status"].to_numpy(), status)
        passed_on = {name: examples[name] for name in (*EXAMPLE_COLUMNS[:3], "base_nll")}
        columns = {
            "scored_by": examples[FOLD],
            "reference_nll": nullable(reference_nll, np.isfinite(reference_nll)),
            "davir": nullable(formulas.davir(base_nll, reference_nll), status == Status.OK),
            "status": pa.array(status.tolist(), pa.string()),
        }
        return pa.table(passed_on | columns)
