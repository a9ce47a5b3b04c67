"""The configuration of jobs/align.py: preference training and its objective."""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from davir_ray.config.checks import check, check_fields, check_no_secret
from davir_ray.config.prepare import PrepareConfig
from davir_ray.config.run import InputConfig
from davir_ray.config.scoring import ScoreConfig
from davir_ray.config.training import FinetuneConfig

PairLossName = Literal["davir_dpo", "dpo", "ipo", "dpo_norm"]


class PairLossFacts(NamedTuple):
    """What is known of a loss of pairs beside its formula, which is in formulas/losses.py."""

    title: str
    default_beta: float | None
    """None: it follows from the log-probabilities of the training responses (models/training/pairs.py)."""
    paper_correlation: float | None
    """Pearson correlation of the margin with the difference in response length, as the DavIR paper reports it without
    stating data or recipe."""


PAIR_LOSSES: dict[PairLossName, PairLossFacts] = {
    "dpo": PairLossFacts("DPO", 0.1, 0.38),  # the beta of Rafailov et al. 2023 and TRL
    "ipo": PairLossFacts("IPO", 0.1, -0.10),  # the beta of TRL
    "davir_dpo": PairLossFacts("DavIR-DPO", None, 0.07),
    "dpo_norm": PairLossFacts("length-normalised DPO", 5.0, None),  # the beta of Tulu 3 (arXiv 2411.15124)
}


@dataclass(frozen=True, kw_only=True)
class AlignConfig:
    """The objective of preference training."""

    loss: PairLossName = "davir_dpo"
    """davir_dpo: DPO with each reward divided by the |log-probability| of its response under the frozen policy. dpo:
    DPO. ipo: IPO on token means, as in TRL. dpo_norm: DPO on token means."""
    beta: float | None = None
    """How strongly the policy is kept near the frozen one. None: 0.1 for dpo and ipo; 5 for dpo_norm, as in Tulu 3; for
    davir_dpo, whose beta the paper does not state, 0.1 times the median |log-probability| of the training responses
    in nats, which makes its gradient as large as DPO's at 0.1."""
    heldout_fraction: float = 0.0
    """Share of the prompts, drawn by hash, whose pairs are held out of training and measured separately."""

    def __post_init__(self) -> None:
        check_fields(self, "align.", ["beta"], lambda beta: beta > 0, "above 0")
        check_fields(self, "align.", ["heldout_fraction"], lambda share: 0 <= share < 1, "from 0 to below 1")


@dataclass(frozen=True, kw_only=True)
class AlignRunConfig(InputConfig):
    """Train a policy on preference pairs with DavIR-DPO, or with a loss that it is compared with."""

    prepare: PrepareConfig = field(default_factory=lambda: PrepareConfig(max_tokens=1024))
    """How raw records become tokenised pairs."""
    finetune: FinetuneConfig = field(
        default_factory=lambda: FinetuneConfig(epochs=1, batch_size=64, learning_rate=5e-7, warmup_ratio=0.1)
    )
    """The training of the policy; batch_size counts pairs. Defaults: a common recipe for DPO, as the paper does not
    state its own."""
    score: ScoreConfig = field(default_factory=lambda: ScoreConfig(precision="float32"))
    """The losses of both policies; by default in float32, as bfloat16 cannot resolve how little a policy differs from
    its base."""
    align: AlignConfig = field(default_factory=AlignConfig)
    """The objective."""
    beside: list[str] = field(default_factory=list)
    """Folders of finished runs of this job on the same pairs, with another loss, setting or seed: the report then has a
    table of all, with means over the seeds of each setting."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_no_secret("beside", self.beside)
        need = "marked: of a pair, every turn after the common prompt is scored"
        check(self.prepare.score_turns == "marked", "prepare.score_turns", self.prepare.score_turns, need)
        check(self.prepare.folds == 1, "prepare.folds", self.prepare.folds, "1: the rows of a pair stay side by side")
        need = "keep: without one of its rows a pair is none"
        check(self.prepare.near_duplicates == "keep", "prepare.near_duplicates", self.prepare.near_duplicates, need)

    def reasons_without_effect(self) -> dict[str, str | None]:
        """See OutputConfig."""
        why = "preference training ranks nothing"
        return {**super().reasons_without_effect(), "score.also": why, "score.both": why}
