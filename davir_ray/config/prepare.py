"""Settings of prepare."""

from dataclasses import dataclass

from davir_ray.config.checks import check


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """How raw records become tokenised examples."""

    max_tokens: int = 512
    """Maximum number of tokens of prompt and response together. A longer response loses its tail; a prompt that leaves
    no room for one is rejected."""
    shard_rows: int = 4096
    """Maximum number of rows in a shard, the unit of work, commit and resume. A very large corpus gets larger shards,
    so that there are about 20,000 of them at most."""

    def __post_init__(self) -> None:
        check(self.max_tokens >= 2, "prepare.max_tokens", self.max_tokens, "at least 2")
        check(1 <= self.shard_rows <= 4096, "prepare.shard_rows", self.shard_rows, "from 1 to 4096")
