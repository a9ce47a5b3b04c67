"""The options of jobs/export.py: which rows of a run go to which trainer, and where."""

import re
from dataclasses import dataclass
from typing import Literal

from davir_ray.config.checks import check, check_no_secret
from davir_ray.errors import ConfigError

Trainer = Literal["trl", "axolotl", "llamafactory", "messages", "sharegpt", "parquet"]
Rows = Literal["selected", "mixture", "scored"]


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """The options of this job."""

    run: str
    """Folder of a finished run of jobs/score.py, which is only read."""
    to: Trainer
    """Who reads the rows. trl, axolotl, llamafactory: these trainers, with what they need to load the rows. messages:
    chat messages. sharegpt: turns of from and value. parquet: the columns of selected/, in the format Parquet."""
    output: str
    """Folder to write: a local path or s3://…; a folder that holds an earlier export is replaced."""
    rows: Rows = "selected"
    """selected: the selection. mixture: the run's mixture, repeated and shuffled. scored: every row with a rank."""
    shuffle: bool = False
    """Write the rows in a random order, not by rank."""
    seed: int = 0
    """Seed of the random order."""
    output_is_shared: bool = False
    """The local output is on a file system that every node sees; needed where the cluster has several nodes."""
    push_to_hub: str | None = None
    """Also upload the folder as this data set (org/name) of the hub, which is private unless --public is given. Needs a
    local output."""
    public: bool = False
    """Let everybody see the data set on the hub."""
    license: str | None = None
    """Licence of the rows, for the data set card. None: that of the source on the hub, if it is there."""

    def __post_init__(self) -> None:
        check_no_secret("run", self.run)
        check_no_secret("output", self.output)
        if self.rows == "mixture" and self.shuffle:
            raise ConfigError("--shuffle has no effect: the mixture is shuffled already; leave it out")
        if not self.shuffle and self.seed:
            raise ConfigError("--seed has no effect: the rows are not shuffled; add --shuffle, or leave it out")
        if self.push_to_hub is None:
            for name in ("public", "license"):
                if getattr(self, name):
                    raise ConfigError(f"--{name} has no effect: nothing is uploaded; add --push_to_hub org/name")
            return
        check(
            re.fullmatch(r"[\w.-]+/[\w.-]+", self.push_to_hub) is not None,
            "push_to_hub", self.push_to_hub, "a name on the hub such as org/name",
        )  # fmt: skip
        if "://" in self.output:
            raise ConfigError(f"push_to_hub uploads a local folder, but output is {self.output}; give a local output")
