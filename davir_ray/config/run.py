"""The configuration of the main job: frozen, validated when it is made, every field with its unit and what None means.

A YAML file and dotted options on the command line set the same fields (see cli.py). A stage receives its own section,
never the whole configuration.
"""

import logging
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from davir_ray.config.checks import changed, check, check_fields, check_no_secret
from davir_ray.config.prepare import PrepareConfig
from davir_ray.config.scoring import ExtraScore, ScoreConfig
from davir_ray.config.selection import ALIGNED, REPEATED, Order, RankConfig, SelectConfig
from davir_ray.config.sources import FormatOption, Source
from davir_ray.config.training import FinetuneConfig
from davir_ray.errors import ConfigError

log = logging.getLogger(__name__)

Tracker = Literal["tensorboard", "wandb", "mlflow"]


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Greedy generation by a pool of actors; its size and precision are those of score."""

    max_new_tokens: int = 512
    """Maximum number of tokens of a generated text; a text that reaches it counts as unfinished."""
    tokens_per_batch: int | None = None
    """Token budget of one batch, prompts and new tokens together; halved automatically when the device runs out of
    memory. None: by device."""
    sources: list[str] = field(default_factory=list)
    """Generate for the examples of these sources only. Empty: all."""

    def __post_init__(self) -> None:
        check_fields(self, "generate.", ["max_new_tokens", "tokens_per_batch"], lambda count: count >= 1, "at least 1")


@dataclass(frozen=True, kw_only=True)
class EstimateConfig:
    """Assumptions of --dry_run; a run does not depend on them."""

    device_tflops: float | None = None
    """TFLOP/s that one device sustains. None: a share of the peak of the cluster's GPUs, or of the measured speed of a
    CPU."""
    price_per_device_hour: float | None = None
    """Price of a device for an hour, in your currency. None: no cost is given."""

    def __post_init__(self) -> None:
        names = ("device_tflops", "price_per_device_hour")
        check_fields(self, "estimate.", names, lambda value: value > 0, "above 0")


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """Where a job writes."""

    output: str | None = None
    """Folder of the run: a local path or s3://…; created if it does not exist, continued if it holds the same run."""
    output_is_shared: bool = False
    """The local output is on a file system that every node sees; needed where the cluster has several nodes."""
    overwrite: bool = False
    """Redo the stages in the output whose settings or inputs differ, and all stages after them."""
    track: Tracker | None = None
    """Log each training's curves, and the counts at the end, with this tracker; needs the extra of its name. A run that
    is continued goes on in the same tracking run. None: the curves are only in the report."""

    def __post_init__(self) -> None:
        check_no_secret("output", self.output)

    def require_output(self) -> None:
        """Raise ConfigError if no output is given."""
        if not self.output:
            raise ConfigError("no output is given; add --output DIR (a local path or s3://…)")

    def without_effect(self) -> dict[str, str]:
        """The reason for each changed setting that has no effect, given the other settings, by dotted name."""
        return {
            name: reason
            for name in changed(self)
            for section, reason in self.reasons_without_effect().items()
            if reason and f"{name}.".startswith(f"{section}.")
        }

    def warn_without_effect(self) -> None:
        """Warn about settings without effect; they are no error, because one file may serve several commands."""
        if unused := self.without_effect():
            log.warning("without effect: %s", "; ".join(f"{name} ({why})" for name, why in unused.items()))

    def reasons_without_effect(self) -> dict[str, str | None]:
        """For each section or field that other settings can disable, the reason if they do, else None."""
        return {}


@dataclass(frozen=True, kw_only=True)
class InputConfig(OutputConfig):
    """The inputs of a job: a base and data for it."""

    base: str | None = None
    """The pre-trained causal language model: a folder, s3://… or a hub name."""
    data: str | list[str] | None = None
    """The data when there is one source: a file, a folder, a glob, a list of these, or a hub name."""
    format: FormatOption | None = "auto"
    """Format of --data. auto or None: found from the columns and the first records, and logged in one line."""
    columns: dict[str, str] = field(default_factory=dict)
    """Names of the columns of --data where they differ from the format's, such as '{instruction: question}'."""
    ignore_columns: list[str] = field(default_factory=list)
    """Columns of --data that are not read although they may change the prompt, such as '[tools]'."""
    sources: list[Source] = field(default_factory=list)
    """Several named sources, instead of --data."""
    decontaminate: str | list[str] | None = None
    """Evaluation sets that no example may come from: a file, folder, glob or hub name, or a list, each a set. A row
    that has 13 words in a row with a record of one (or the whole of a string of 8 to 12 words) is a reject,
    in_evaluation_set, which is not a bad row. None: none."""
    chat_template: str | None = None
    """File with a chat template (Jinja) for the format messages. None: the base's own."""
    keep_record: bool = True
    """Keep the source row as JSON in examples and selected."""
    max_bad_fraction: float = 0.01
    """Maximum share of rejected rows; above it the run stops and reports the reasons with their counts."""
    limit: int | None = None
    """Read at most this many records from each source, for a trial. None: all."""
    trust_remote_code: bool = False
    """Run Python code that comes with a hub checkpoint."""
    prepare: PrepareConfig = PrepareConfig()
    """How raw records become tokenised examples."""
    finetune: FinetuneConfig = FinetuneConfig()
    """The reference fine-tune."""
    score: ScoreConfig = ScoreConfig()
    """The scoring pool."""
    dry_run: bool = False
    """Check everything that needs no model weights, show three rendered examples, and stop."""
    estimate: EstimateConfig = EstimateConfig()
    """Assumptions of --dry_run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, "", ["max_bad_fraction"], lambda share: 0 <= share <= 1, "from 0 to 1")
        check_fields(self, "", ["limit"], lambda count: count >= 1, "at least 1")
        if self.data is not None and self.sources:
            raise ConfigError("both data and sources are given; give exactly one of the two")
        of_data = {
            "format": self.format not in ("auto", None), "columns": self.columns, "ignore_columns": self.ignore_columns
        }  # fmt: skip
        for name in (name for name, given in of_data.items() if given and self.data is None):
            raise ConfigError(f"{name} is given without data; give --data, or the {name} of each source")
        for name in ("base", "chat_template", "data", "decontaminate"):
            check_no_secret(name, getattr(self, name))
        for path in self.evaluation_sets:
            check(bool(path.strip()), "decontaminate", self.decontaminate, "a path, or a list of paths")
            check(self.evaluation_sets.count(path) == 1, "decontaminate", self.decontaminate, "without repetition")
        check_no_secret("score.base_cache", self.score.base_cache)
        names = [source.name for source in self.sources]
        for name in names:
            check(names.count(name) == 1, "source name", name, "unique, because example_id depends on it")

    @property
    def evaluation_sets(self) -> list[str]:
        """The evaluation sets as a list, also where there is one or none."""
        return [self.decontaminate] if isinstance(self.decontaminate, str) else self.decontaminate or []

    def all_sources(self) -> list[Source]:
        """The sources, with --data and --format as one source named after its format."""
        if self.data is None:
            return self.sources
        form = self.format or "auto"
        source = Source(
            name=form, path=self.data, format=form, columns=self.columns, ignore_columns=self.ignore_columns
        )
        return [source]

    def require_input(self) -> None:
        """Raise ConfigError if output, base or data is missing, or an option does not fit the others."""
        self.require_output()
        if not self.base:
            raise ConfigError("no base is given; add --base MODEL (a folder or a hub name)")
        if not self.all_sources():
            raise ConfigError("no data is given; add --data PATH, or sources in the configuration file")
        if self.finetune.lora_rank is None:
            for name in changed(self):
                if name.startswith("finetune.lora_"):
                    raise ConfigError(f"{name} is given, but finetune.lora_rank is not; give it, or leave {name} out")

    def reasons_without_effect(self) -> dict[str, str | None]:
        """See OutputConfig."""
        return {
            "finetune.epochs": None if self.finetune.max_steps is None else "finetune.max_steps is given",
            "estimate": None if self.dry_run else "only --dry_run uses it",
        }


@dataclass(frozen=True, kw_only=True)
class RunConfig(InputConfig):
    """Score instruction data by DavIR and select the best part of it."""

    reference: str | None = None
    """A fine-tune of the base to score with: a checkpoint, or a folder with a peft adapter; with folds, the output of a
    run that has trained theirs. None: fine-tune one on the whole set, or one for each fold."""
    keep_token_nll: Literal["sample", "all", "none"] = "sample"
    """Rows whose token losses are kept in scores: sample (about 200 rows or more, chosen by hash), all or none."""
    rank: RankConfig = RankConfig()
    """The order of the ranking."""
    select: SelectConfig = SelectConfig()
    """Where the ranking is cut."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_no_secret("reference", self.reference)
        self._check_order()
        if self.data is None or self.format not in ("auto", None):  # a source is named after its format
            self.select.check_fits(self.rank, [source.name for source in self.all_sources()])
        if self.rank.order is None:  # from here on, it is known
            object.__setattr__(self, "rank", replace(self.rank, order=self._default_order))
        if self.score.both and self.prepare.folds != 2:
            raise ConfigError(
                f"score.both is given, but prepare.folds is {self.prepare.folds}; with 2 folds one reference has seen "
                "each row and one has not"
            )
        if self.select.jsonl and not self.keep_record:
            raise ConfigError("select.jsonl writes the source records, which keep_record false leaves out")

    @property
    def _default_order(self) -> Order:
        """The order where none is given."""
        if self.rank.repeats:
            return REPEATED
        return "davir" if self.prepare.folds == 1 else ALIGNED

    def _check_order(self) -> None:
        """Raise ConfigError if the order, or what bounds its values, does not suit the folds and repeats."""
        has_folds = self.prepare.folds > 1
        if self.rank.order == REPEATED and not self.rank.repeats:
            raise ConfigError(
                f"rank.order is {REPEATED}, but rank.repeats is empty: there is nothing to average; give "
                "--rank.repeats, or another order"
            )
        if self.rank.order == ALIGNED and not has_folds:
            raise ConfigError(f"rank.order is {ALIGNED}, but prepare.folds is 1: there is nothing to align; give davir")
        for name in ("min_score", "max_score"):
            order = self._default_order
            if order != "davir" and self.rank.order is None and getattr(self.select, name) is not None:
                given = "repeats" if order == REPEATED else "folds"
                raise ConfigError(
                    f"select.{name} is given, and with {given} the order is {order}, on a scale of its own; give "
                    f"--rank.order {order} or davir, so that it is clear what it bounds"
                )

    def require_input(self) -> None:
        """See InputConfig; the order's extra score must be computed, too."""
        super().require_input()
        order = self.rank.order
        if order in get_args(ExtraScore) and order not in self.score.also:
            raise ConfigError(
                f"rank.order is {order}, which takes another pass of the base; add --score.also '[{order}]'"
            )

    def reasons_without_effect(self) -> dict[str, str | None]:
        """See OutputConfig."""
        order, has_mixture, by_length = self.rank.by, bool(self.select.mixture), "length" in self.select.balance
        return {
            **super().reasons_without_effect(),
            "finetune": None if self.reference is None else "a reference is given, so nothing is trained",
            "rank.repeats": None if self.rank.is_by_davir else f"rank.order is {order}, not a score by davir",
            "rank.seed": None if order == "random" else f"rank.order is {order}, not random",
            "select.shuffle_seed": None if has_mixture else "there is no select.mixture",
            "select.length_edges": None if by_length else "select.balance has no length",
        }
