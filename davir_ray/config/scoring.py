"""Settings of the scoring pool."""

from dataclasses import dataclass, field
from typing import Literal

from davir_ray.config.checks import check, check_fields
from davir_ray.errors import ConfigError

Precision = Literal["auto", "float32", "bfloat16", "float64"]
ExtraScore = Literal["ifd"]
"""Scores that take a pass of their own; each has its stage, its folder extra/NAME and its order, of the same name."""


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Scoring with a pool of actors, each holding base and reference."""

    num_actors: int | None = None
    """Actors in the pool. None: as many as the cluster has room for, with one CPU left for reading and writing."""
    autoscale: list[int] | None = None
    """[min, max] actors, instead of num_actors: the pool starts with as many as fit, requests more nodes from the
    cluster's autoscaler, and grows as they join. Where no node has a GPU yet, give num_gpus. None: a pool of fixed
    size."""
    num_cpus: float = 1.0
    """CPUs of one actor; on a CPU, also its number of threads (at least 1), which is part of the numerics."""
    num_gpus: float | None = None
    """GPUs of one actor, fractions allowed. None: 1 if the cluster has any, else 0."""
    precision: Precision = "auto"
    """Type of weights and activations; auto is bfloat16 on a GPU that has it, else float32. Losses are float32."""
    compile: bool = False
    """Let torch compile the models' layers when an actor starts, which takes a minute or more; part of the numerics. A
    model whose compiled layers do not give its own losses is refused. A CPU needs a C++ compiler, a GPU Triton."""
    tokens_per_pack: int | None = None
    """Token budget of one forward pass; halved automatically when the device runs out of memory. None: by device."""
    base_cache: str | None = None
    """Folder (local or s3://…) of base losses for later runs: scoring the same examples with a second reference then
    needs only the reference's pass. None: no cache."""
    also: list[ExtraScore] = field(default_factory=list)
    """Scores that take another pass, each written to a folder of its own. ifd: the base's losses of the responses
    without their prompts, for rank.order ifd, in extra/ifd. With the settings of a complete run, only that pass is
    made."""
    both: bool = False
    """With two folds, also score each row with the reference that has seen it (extra/seen/): what it gains there is
    memorised."""
    no_progress_timeout_s: int = 1800
    """Seconds without a finished task after which the run fails instead of hanging."""

    def __post_init__(self) -> None:
        counts = ("num_actors", "tokens_per_pack", "no_progress_timeout_s")
        check_fields(self, "score.", counts, lambda count: count >= 1, "at least 1")
        check_fields(self, "score.", ["num_cpus"], lambda count: count > 0, "above 0")
        check_fields(self, "score.", ["num_gpus"], lambda count: count >= 0, "0 or more")
        check(len(set(self.also)) == len(self.also), "score.also", self.also, "without repetition")
        if self.autoscale is not None:
            ascending = len(self.autoscale) == 2 and 1 <= self.autoscale[0] <= self.autoscale[1]
            check(ascending, "score.autoscale", self.autoscale, "[min, max], two ascending numbers from 1")
            if self.num_actors is not None:
                raise ConfigError("both score.num_actors and score.autoscale are given; give one of the two")
