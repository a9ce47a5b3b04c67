"""What a comparison measured: the inputs of its report."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from davir_ray.config.compare import TrialName
from davir_ray.formulas.statistics import Examples, Floats, Ints


@dataclass(frozen=True, kw_only=True)
class Measure:
    """Something that is measured on held-out examples; it is never negative."""

    name: str
    title: str
    short: str
    """Name in the header of a table column."""
    unit: str
    lower_is_better: bool
    margin_of: str
    """The measure in the settings whose margin counts."""
    is_share: bool = False
    """Whether the values are answers, right (1) or wrong (0)."""
    tested: bool = True
    """Whether differences are tested; else they are only shown with their intervals."""


LOSS = Measure(
    name="loss",
    title="Held-out loss",
    short="loss",
    unit="nats per response token",
    lower_is_better=True,
    margin_of="loss",
)
LOSS_BY_EXAMPLE = replace(
    LOSS,
    name="loss_by_example",
    title="Held-out loss, the mean of each example’s mean",
    short="loss by example",
    tested=False,
)
STRICT = Measure(
    name="exact_match",
    title="Exact match of the marked answer",
    short="strict exact match",
    unit="share of the questions",
    lower_is_better=False,
    margin_of="exact_match",
    is_share=True,
)
FLEXIBLE = replace(
    STRICT, name="exact_match_flexible", title="Exact match of the last number", short="flexible exact match"
)


@dataclass(frozen=True, kw_only=True)
class TrialFacts:
    """What is reported about one fine-tune."""

    row_set: int
    """Number of the draw, or of the run, whose rows the model was trained on."""
    num_examples: int
    num_shared: int
    """Different rows that are also in the selection of that size; with several runs, in that of the first."""
    num_response_tokens: int
    num_trained_tokens: int
    """Response tokens that the model was trained on, each counted every time: by the mean of its rows."""
    num_steps: int
    final_loss: float
    """Loss of the last batch, nats per token."""
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One measure of every model on the same held-out examples."""

    measure: Measure
    sources: npt.NDArray[np.str_]
    """Source of each example."""
    prompts: Ints
    """Hash of the prompt of each example: those with the same prompt are one cluster."""
    lengths: Ints
    """Response tokens of each example."""
    weights: Floats
    """Weight of each example: its tokens, or 1."""
    values: Mapping[TrialName, Floats]
    """For each fine-tune its value on each example; the measure is their sum divided by the sum of the weights."""
    base: Floats | None = None
    """The values of the untrained base."""
    without_value: int = 0
    """Number of held-out examples that are left out because a model has no value for them."""

    def of(self, rows: npt.NDArray[np.bool_]) -> "Measured":
        """The measure of these examples alone."""
        return replace(
            self,
            sources=self.sources[rows],
            prompts=self.prompts[rows],
            lengths=self.lengths[rows],
            weights=self.weights[rows],
            values={name: values[rows] for name, values in self.values.items()},
            base=None if self.base is None else self.base[rows],
        )

    @property
    def examples(self) -> Examples:
        """The examples, clustered by prompt and stratified by source."""
        clusters, strata = (np.unique(of, return_inverse=True)[1] for of in (self.prompts, self.sources))
        return Examples(weights_E=self.weights, clusters_E=clusters, strata_E=strata)


@dataclass(frozen=True, kw_only=True)
class ComparisonInputs:
    """What the facts are computed from."""

    settings: dict[str, Any]
    run: str
    base: str
    recipe: dict[str, Any]
    pairs: list[tuple[str, str]]
    """The pairs of arms that are tested, the primary test first; empty where only one arm was trained."""
    margins: Mapping[str, float]
    """By measure of the settings, the size of a difference that would not matter."""
    heldout: dict[str, int]
    """Counts of the held-out data's prepare stage."""
    in_training_pool: int
    """Number of held-out rows that are left out because the run contains them too."""
    in_pool_by_reason: Mapping[str, int]
    """These rows by the reason, one of davir_ray.compare.copies.Reason."""
    num_pool_rows_not_read: int
    """Number of rows of the run of which only the rendered text is compared."""
    trials: Mapping[TrialName, TrialFacts]
    measures: list[Measured]
