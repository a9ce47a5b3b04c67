"""Settings of prepare."""

from dataclasses import dataclass
from typing import Literal

from davir_ray.config.checks import check
from davir_ray.errors import ConfigError

ScoreTurns = Literal["marked", "all", "last"]
NearDuplicates = Literal["keep", "drop"]

MAX_FOLDS = 64


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """How raw records become tokenised examples."""

    max_tokens: int = 512
    """Maximum number of tokens of prompt and response together. A longer response loses its tail; a prompt that leaves
    no room for one is rejected."""
    shard_rows: int | None = None
    """Maximum number of rows in a shard, the unit of work, commit and resume. None: about a 64th of the corpus, so that
    eight GPUs stay busy, between 65,536 and 4 million tokens and at most 4,096 rows; no shard depends on the number of
    workers. A very large corpus gets shards of more rows, up to 4 million tokens."""
    chat: bool = False
    """Give data of one prompt and one response, such as Alpaca's, as a user's and an assistant's turn in the chat
    template. Default: as plain text, Alpaca's in the prompt that the paper uses."""
    score_turns: ScoreTurns = "marked"
    """Assistant turns of a conversation that are scored. marked: those that the data mark (`weight`, `loss`, `train` of
    a message, `mask_history` of a record), all where there are no marks. all: every one. last: the last."""
    folds: int = 1
    """Number of folds that the rows are dealt to, so that a row can be scored by a reference that has not seen it. Rows
    with the same prompt, the same long response or nearly the same text share a fold. 1: no folds, as in the paper."""
    fold_by: str | None = None
    """Column of the data whose equal values share a fold, instead of copies: a document, a conversation or a user that
    several rows come from. None: copies."""
    fold_seed: int = 0
    """Seed of the deal: another one deals the same rows to other folds, for a repeat (rank.repeats)."""
    anchor: float = 0.0
    """Share of the rows that are dealt to no fold (fold -1): no reference is trained on them, and all score them. With
    fold_by, they link the folds' scores; else rows rank by their place in the fold."""
    near_duplicates: NearDuplicates = "keep"
    """drop: of rows with nearly the same prompt and response (5-grams of words, Jaccard similarity of at least 0.7) all
    but one are left out, and counted."""

    def __post_init__(self) -> None:
        check(self.max_tokens >= 2, "prepare.max_tokens", self.max_tokens, "at least 2")
        if self.shard_rows is not None:
            check(1 <= self.shard_rows <= 4096, "prepare.shard_rows", self.shard_rows, "from 1 to 4096")
        check(1 <= self.folds <= MAX_FOLDS, "prepare.folds", self.folds, f"from 1 to {MAX_FOLDS}")
        check(self.fold_by is None or bool(self.fold_by.strip()), "prepare.fold_by", self.fold_by, "a column's name")
        check(self.fold_seed >= 0, "prepare.fold_seed", self.fold_seed, "0 or more")
        check(0 <= self.anchor < 1, "prepare.anchor", self.anchor, "from 0 to below 1")
        for name, unset in (("fold_by", None), ("fold_seed", 0), ("anchor", 0.0)):
            if getattr(self, name) != unset and self.folds == 1:
                raise ConfigError(
                    f"prepare.{name} is {getattr(self, name)!r}, but prepare.folds is 1; give --prepare.folds, or "
                    f"leave prepare.{name} out"
                )
