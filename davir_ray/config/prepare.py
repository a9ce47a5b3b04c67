"""Settings of prepare."""

from dataclasses import dataclass
from typing import Literal

from davir_ray.config.checks import check

ScoreTurns = Literal["marked", "all", "last"]


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

    def __post_init__(self) -> None:
        check(self.max_tokens >= 2, "prepare.max_tokens", self.max_tokens, "at least 2")
        if self.shard_rows is not None:
            check(1 <= self.shard_rows <= 4096, "prepare.shard_rows", self.shard_rows, "from 1 to 4096")
