"""The configuration of a run: frozen, validated when it is made, every field with its unit and the meaning of None.

One YAML file and dotted options on the command line fill the same fields (see cli.py). A stage receives its own
section, never the whole.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from decimal import Decimal
from itertools import pairwise
from typing import Any, Literal

from davir_ray.errors import ConfigError

Format = Literal["alpaca", "gsm8k", "prompt_response", "messages", "preference"]
Order = Literal["davir", "rho_sum", "rho_mean", "base_nll", "reference_nll", "length", "random"]
Precision = Literal["auto", "float32", "bfloat16", "float64"]


def check(condition: bool, field_name: str, value: object, need: str) -> None:
    """Raise ConfigError unless the condition holds."""
    if not condition:
        raise ConfigError(f"{field_name} is {value!r}; it must be {need}")


def check_chat_template(chat_template: str | None, formats: Iterable[Format]) -> None:
    """ConfigError where a chat template is given but nothing is rendered with one."""
    if chat_template is not None and not {"messages", "preference"} & set(formats):
        raise ConfigError(
            "chat_template is given, but only the format messages is rendered with one, and preference where its "
            "columns hold messages; leave it out, or choose that format"
        )


def not_default(section: str, settings: Any) -> list[str]:
    """Dotted names of a section's fields that have another value than their default."""
    default = type(settings)()
    names = (field.name for field in fields(settings))
    return [f"{section}.{name}" for name in names if getattr(settings, name) != getattr(default, name)]


def check_no_secret(field_name: str, uri: str | None) -> None:
    """Refuse credentials in a URI: it is written to config.yaml and to messages."""
    if uri and re.match(r"\w+://[^/]*:[^/]*@", uri):
        shown = re.sub(r"//.*@", "//…@", uri)
        raise ConfigError(f"{field_name} is {shown!r}, with a password in it; give credentials by the environment")


_COLUMNS_OF: dict[Format, tuple[str, ...]] = {
    "prompt_response": ("prompt_column", "response_column"),
    "messages": ("messages_column",),
    "preference": ("prompt_column", "chosen_column", "rejected_column"),
}
"""Fields of a source that its format reads; the other formats have columns of fixed names."""

DEFAULT_SPLIT = "train"


@dataclass(frozen=True, kw_only=True)
class Source:
    """One named source of instruction data."""

    name: str
    """Name of the source; part of every example_id and the value of the column `source`."""
    path: str | list[str]
    """A file, folder, glob or list of these (local, s3://, hf://), a folder written by `datasets`, or a hub name."""
    format: Format
    """How a record becomes prompt and response."""
    prompt_column: str = "prompt"
    """Column of the prompt, for the format prompt_response."""
    response_column: str = "response"
    """Column of the response, for the format prompt_response."""
    chosen_column: str = "chosen"
    """Column of the preferred response, for the format preference; its prompt may be in prompt_column."""
    rejected_column: str = "rejected"
    """Column of the other response, for the format preference."""
    messages_column: str = "messages"
    """Column of the list of {role, content}, for the format messages."""
    split: str = DEFAULT_SPLIT
    """Split to read, for a hub name or a folder written by `datasets` that holds several."""

    def __post_init__(self) -> None:
        check(bool(self.name.strip()), "source name", self.name, "a non-empty name")
        named = f"path of source {self.name!r}"
        check(bool(self.paths) and all(path.strip() for path in self.paths), named, self.path, "a path")
        for path in self.paths:
            check_no_secret(named, path)

    def check_columns(self) -> None:
        """ConfigError for a column that is named, but is not of this format."""
        defaults = {field.name: field.default for field in fields(self) if field.name.endswith("_column")}
        for name, default in defaults.items():
            value = getattr(self, name)
            if value != default and name not in _COLUMNS_OF.get(self.format, ()):
                raise ConfigError(
                    f"{name} of source {self.name!r} is {value!r}, but the format {self.format} does not read it; "
                    "leave it out, or choose another format"
                )

    @property
    def paths(self) -> list[str]:
        """The path, or the list of them."""
        return [self.path] if isinstance(self.path, str) else self.path


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """From raw records to tokenised examples."""

    max_tokens: int = 512
    """Token limit of prompt and response. A longer response loses its tail; a prompt that fills it is rejected."""
    shard_rows: int = 4096
    """Most rows in a shard, the unit of work, commit and resume. Grows with the corpus to keep about 20,000 shards."""

    def __post_init__(self) -> None:
        check(self.max_tokens >= 2, "prepare.max_tokens", self.max_tokens, "at least 2")
        check(1 <= self.shard_rows <= 4096, "prepare.shard_rows", self.shard_rows, "from 1 to 4096")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """The reference fine-tune. Defaults: Stanford Alpaca's recipe, ours to choose; the paper does not state its own."""

    epochs: int = 3
    """Passes over the examples."""
    max_steps: int | None = None
    """Optimiser steps instead of epochs: as many passes as they take, the last one cut. None: epochs decides."""
    batch_size: int = 128
    """Examples in a global batch, over all workers; one optimiser step each."""
    learning_rate: float = 2e-5
    """Peak learning rate of AdamW."""
    warmup_ratio: float = 0.03
    """Share of the steps that warm up linearly; a cosine to 0 follows."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = 1.0
    """The gradient's norm is clipped to this."""
    seed: int = 0
    """Seeds the data order (with the epoch) and dropout (with the step)."""
    tokens_per_pack: int | None = None
    """Token budget of one forward and backward pass; gradients accumulate over a batch's packs. None: by device."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: a third more compute for a fraction of the memory."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic; auto is bfloat16 autocast over float32 weights where the device has it, else float32."""
    num_workers: int = 1
    """Data-parallel workers (Ray Train). The steps are the same for any number."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """ddp: each worker holds weights, gradients and AdamW's moments, 16 bytes a parameter. fsdp, where those do not fit
    one GPU: they are sharded over the workers (FSDP2). The steps are the same."""
    num_cpus: int = 1
    """CPUs of one worker, and its number of threads where it trains on them."""
    use_gpu: bool | None = None
    """One GPU to a worker. None: if the cluster has any."""
    checkpoint_every_steps: int = 200
    """Steps between checkpoints; a killed worker or driver continues from the last."""
    max_failures: int = 3
    """Times that Ray Train restarts lost workers before it gives up."""
    lora_rank: int | None = None
    """Train a LoRA adapter of this rank instead of all weights; wants about ten times the rate. None: all weights."""
    lora_alpha: int | None = None
    """The adapter's scale is this over its rank. None: twice the rank."""
    lora_dropout: float = 0.0
    """Dropout before the adapter."""
    lora_targets: str = "all-linear"
    """Modules with an adapter: every linear layer but the head, or a regular expression of their full names."""
    export_epochs: bool = False
    """Also write the model after each epoch, to reference_epochs/<epoch>/."""

    def __post_init__(self) -> None:
        for name in ("tokens_per_pack", "max_steps"):
            value = getattr(self, name)
            check(value is None or value >= 1, f"finetune.{name}", value, "at least 1")
        for name in ("epochs", "batch_size", "num_workers", "num_cpus", "checkpoint_every_steps"):
            check(getattr(self, name) >= 1, f"finetune.{name}", getattr(self, name), "at least 1")
        for name in ("learning_rate", "max_grad_norm"):
            check(getattr(self, name) > 0, f"finetune.{name}", getattr(self, name), "above 0")
        for name in ("lora_rank", "lora_alpha"):
            value = getattr(self, name)
            check(value is None or value >= 1, f"finetune.{name}", value, "at least 1")
        check(0 <= self.lora_dropout < 1, "finetune.lora_dropout", self.lora_dropout, "from 0 to below 1")
        check(0 <= self.warmup_ratio < 1, "finetune.warmup_ratio", self.warmup_ratio, "from 0 to below 1")
        check(self.weight_decay >= 0, "finetune.weight_decay", self.weight_decay, "0 or more")
        check(self.seed >= 0, "finetune.seed", self.seed, "0 or more")
        check(self.max_failures >= 0, "finetune.max_failures", self.max_failures, "0 or more")


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Scoring with a pool of actors, each holding base and reference."""

    num_actors: int | None = None
    """Actors in the pool. None: as many as the cluster holds, a CPU left for reading and writing."""
    autoscale: list[int] | None = None
    """[least, most] actors, instead of num_actors: the pool begins with as many as fit and grows as nodes join, which a
    cluster's autoscaler is asked for. Where none has a GPU yet, give num_gpus. None: a pool of fixed size."""
    num_cpus: float = 1.0
    """CPUs of one actor; on a CPU, also its number of threads (at least 1), which is part of the numerics."""
    num_gpus: float | None = None
    """GPUs of one actor, fractions allowed. None: 1 if the cluster has any, else 0."""
    precision: Precision = "auto"
    """Type of weights and activations; auto is bfloat16 on a GPU that has it, else float32. Losses are float32."""
    tokens_per_pack: int | None = None
    """Token budget of one forward pass; halved on its own when the device runs out of memory. None: by device."""
    base_cache: str | None = None
    """Folder (local or s3://…) of base losses that later runs share: a second reference on the same examples costs one
    pass. None: no cache."""
    no_progress_timeout_s: int = 1800
    """Seconds without any finished task after which the run fails instead of hanging."""

    def __post_init__(self) -> None:
        check(self.num_actors is None or self.num_actors >= 1, "score.num_actors", self.num_actors, "at least 1")
        if self.autoscale is not None:
            ascending = len(self.autoscale) == 2 and 1 <= self.autoscale[0] <= self.autoscale[1]
            check(ascending, "score.autoscale", self.autoscale, "[least, most], two ascending numbers from 1")
            if self.num_actors is not None:
                raise ConfigError("both score.num_actors and score.autoscale are given; give one of the two")
        check(self.num_cpus > 0, "score.num_cpus", self.num_cpus, "above 0")
        check(self.num_gpus is None or self.num_gpus >= 0, "score.num_gpus", self.num_gpus, "0 or more")
        packed = self.tokens_per_pack
        check(packed is None or packed >= 1, "score.tokens_per_pack", packed, "at least 1")
        check(self.no_progress_timeout_s >= 1, "score.no_progress_timeout_s", self.no_progress_timeout_s, "at least 1")


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Greedy generation with a pool of actors, whose size and precision are those of scoring."""

    max_new_tokens: int = 512
    """Limit of a generated text in tokens; one that reaches it is not finished."""
    tokens_per_batch: int | None = None
    """Token budget of one batch, prompts and all new tokens; halved on its own when the device runs out of memory.
    None: by device."""
    sources: list[str] = field(default_factory=list)
    """Generate for the examples of these sources only. Empty: all."""

    def __post_init__(self) -> None:
        check(self.max_new_tokens >= 1, "generate.max_new_tokens", self.max_new_tokens, "at least 1")
        batch = self.tokens_per_batch
        check(batch is None or batch >= 1, "generate.tokens_per_batch", batch, "at least 1")


@dataclass(frozen=True, kw_only=True)
class RankConfig:
    """The order of the ranking; every baseline of the paper is one option away."""

    order: Order = "davir"
    """Column to rank by (length = num_response_tokens), or random."""
    lowest: bool = False
    """Rank the lowest value first."""
    seed: int = 0
    """Seed of the random order."""
    most: int | None = None
    """Write only the first N ranks, the rest of a large corpus is never moved. None: every rank."""

    def __post_init__(self) -> None:
        check(self.most is None or self.most >= 1, "rank.most", self.most, "at least 1")


@dataclass(frozen=True, kw_only=True)
class Part:
    """One source's part of a mixture: the best of it by exactly one rule, each row `repeat` times."""

    source: str
    """Name of the source."""
    all: bool = False
    """Every row that may be selected."""
    top_k: int | None = None
    """The source's first N rows by rank."""
    top_fraction: float | None = None
    """This share of the source's rows that may be selected, rounded as select.top_fraction is."""
    top_tokens: int | None = None
    """The source's longest prefix whose scored tokens fit."""
    repeat: int = 1
    """Times that each row stands in the mixture."""

    def __post_init__(self) -> None:
        where = f"select.mixture of {self.source!r}:"
        rules = ["all"] * self.all + [name for name in PART_RULES if getattr(self, name) is not None]
        check(len(rules) == 1, f"{where} the rules", rules, f"exactly one of all, {', '.join(PART_RULES)}")
        _check_rules(f"{where} ", self)
        check(self.repeat >= 1, f"{where} repeat", self.repeat, "at least 1")


PART_RULES = ("top_k", "top_fraction", "top_tokens")


@dataclass(frozen=True, kw_only=True)
class SelectConfig:
    """Where the ranking is cut: exactly one of top_k, top_fraction, top_tokens, min_score, quotas, mixture.

    Rows that a filter leaves out may not be selected, and count for no rule. Every count is in the manifest and the
    report.
    """

    top_k: int | None = None
    """The first N rows."""
    top_fraction: float | None = None
    """This share of the rows that may be selected: floor of the exact decimal times the rows, at least 1 (the paper:
    0.06)."""
    top_tokens: int | None = None
    """The longest prefix whose scored tokens fit."""
    min_score: float | None = None
    """Every row whose ordering key is at least this (at most, with rank.lowest)."""
    min_response_tokens: int | None = None
    """Filter: scored tokens of a response, at least."""
    max_response_tokens: int | None = None
    """Filter: scored tokens of a response, at most."""
    drop_duplicates: bool = False
    """Filter: of rows with the same prompt and response only the highest-ranked may be selected."""
    balance: list[Literal["source", "length"]] = field(default_factory=list)
    """Give each source, each range of response lengths, or each pair of both the share of the selection that it has of
    the rows that may be selected; the best of each group are taken."""
    quotas: dict[str, int] = field(default_factory=dict)
    """Instead of shares, rows for each group of balance, such as {alpaca: 3000}, {32-63: 500} or {alpaca/32-63: 500};
    groups without a quota give none."""
    length_edges: list[int] = field(default_factory=lambda: [32, 64, 128, 256, 512])
    """Where ranges of response lengths begin, in scored tokens; the first begins at 0."""
    mixture: list[Part] = field(default_factory=list)
    """A training mixture of several sources: written to mixture/, repeated and shuffled, beside selected/."""
    shuffle_seed: int = 0
    """Seed of the mixture's order."""
    jsonl: bool = False
    """Also write the source records of what is selected (of the mixture, if there is one) as JSON lines to jsonl/."""

    def __post_init__(self) -> None:
        _check_rules("select.", self)
        check(self.min_score is None or not math.isnan(self.min_score), "select.min_score", self.min_score, "a number")
        if len(self.rules) > 1:
            raise ConfigError(f"select has {' and '.join(self.rules)}; give exactly one rule")
        least, most = self.min_response_tokens, self.max_response_tokens
        check(least is None or most is None or least <= most, "select.min_response_tokens", least, f"at most {most}")
        edges = self.length_edges
        ascending = all(a < b for a, b in pairwise([0, *edges]))
        check(bool(edges) and ascending, "select.length_edges", edges, "ascending numbers above 0")
        check(len(set(self.balance)) == len(self.balance), "select.balance", self.balance, "without repetition")
        if self.quotas and not self.balance:
            raise ConfigError("select.quotas needs select.balance: [source], [length] or [source, length]")
        if self.mixture and self.balance:
            raise ConfigError("select.mixture has a rule for each source; leave select.balance out")
        for group, rows in self.quotas.items():
            check(isinstance(group, str), "a group of select.quotas", group, f"text: '{group}', in quotes")
            check(rows >= 1, f"select.quotas of {group!r}", rows, "at least 1")
        names = [part.source for part in self.mixture]
        for name in names:
            check(names.count(name) == 1, "source in select.mixture", name, "given once")

    @property
    def rules(self) -> list[str]:
        """Names of the rules that are set."""
        return [name for name in SELECT_RULES if getattr(self, name) not in (None, {}, [])]

    @property
    def length_ranges(self) -> list[str]:
        """Names of the ranges of response lengths, in scored tokens, the shortest first."""
        edges = self.length_edges
        return [f"{a}-{b - 1}" for a, b in zip([0, *edges], edges, strict=False)] + [f"{edges[-1]}-"]

    def parts_of(self, group: str) -> dict[str, str]:
        """The source and the range of lengths that a group of balance is named after; a source's name may have a /."""
        if len(self.balance) < 2:
            return dict(zip(self.balance, [group], strict=False))
        source_first = self.balance[0] == "source"
        before, _, after = group.rpartition("/") if source_first else group.partition("/")
        return dict(zip(self.balance, (before, after), strict=True))


SELECT_RULES = ("top_k", "top_fraction", "top_tokens", "min_score", "quotas", "mixture")


def count_from_fraction(fraction: float, num_rows: int) -> int:
    """Rows that a fraction means: floor of the exact decimal times the rows, at least 1."""
    return max(1, int(Decimal(str(fraction)) * num_rows))


def _check_rules(where: str, config: Part | SelectConfig) -> None:
    check(config.top_k is None or config.top_k >= 1, f"{where}top_k", config.top_k, "at least 1")
    check(config.top_tokens is None or config.top_tokens >= 1, f"{where}top_tokens", config.top_tokens, "at least 1")
    fraction = config.top_fraction
    check(fraction is None or 0 < fraction <= 1, f"{where}top_fraction", fraction, "above 0 and at most 1")


@dataclass(frozen=True, kw_only=True)
class EstimateConfig:
    """What --dry_run reckons with; a run does not depend on it."""

    device_tflops: float | None = None
    """TFLOP/s that one device sustains. None: a share of the peak of the cluster's GPUs, or of a measured CPU's."""
    price_per_device_hour: float | None = None
    """Price of a device for an hour, in your currency. None: no cost is told."""

    def __post_init__(self) -> None:
        for name in ("device_tflops", "price_per_device_hour"):
            value = getattr(self, name)
            check(value is None or value > 0, f"estimate.{name}", value, "above 0")


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """Where a job writes."""

    output: str | None = None
    """Folder of the run: a local path or s3://…; made if absent, continued if it holds the same run."""
    output_is_shared: bool = False
    """A local output lies on a file system that every node sees; needed where the cluster has several nodes."""
    overwrite: bool = False
    """Redo the stages in the output whose settings or inputs differ, and all that follow them."""

    def __post_init__(self) -> None:
        check_no_secret("output", self.output)

    def require_output(self) -> None:
        """Raise ConfigError where no output is given."""
        if not self.output:
            raise ConfigError("no output is given; add --output DIR (a local path or s3://…)")

    def without_effect(self) -> dict[str, str]:
        """Settings that change nothing as the others stand, by dotted name: why."""
        return {}


@dataclass(frozen=True, kw_only=True)
class InputConfig(OutputConfig):
    """What a job begins with: a base and the data for it."""

    base: str | None = None
    """The pre-trained causal language model: a folder or a hub name."""
    data: str | list[str] | None = None
    """The data when there is one source: a file, a folder, a glob, a list of these, or a hub name. Needs --format."""
    format: Format | None = None
    """Format of --data."""
    sources: list[Source] = field(default_factory=list)
    """Several named sources, instead of --data."""
    chat_template: str | None = None
    """Jinja file with a chat template for messages. None: the base's own."""
    keep_record: bool = True
    """Keep the source row as JSON in examples and selected."""
    max_bad_fraction: float = 0.01
    """Largest share of rejected rows; above it the run stops with the reasons counted."""
    limit: int | None = None
    """Read at most this many records from each source, for a trial. None: all."""
    trust_remote_code: bool = False
    """Run Python code that comes with a hub checkpoint."""
    prepare: PrepareConfig = PrepareConfig()
    """From raw records to tokenised examples."""
    finetune: FinetuneConfig = FinetuneConfig()
    """The reference fine-tune."""
    score: ScoreConfig = ScoreConfig()
    """The scoring pool."""
    dry_run: bool = False
    """Check everything that can be checked without a model's weights, show three rendered examples, and stop."""
    estimate: EstimateConfig = EstimateConfig()
    """What --dry_run reckons with."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 <= self.max_bad_fraction <= 1, "max_bad_fraction", self.max_bad_fraction, "from 0 to 1")
        check(self.limit is None or self.limit >= 1, "limit", self.limit, "at least 1")
        if self.data is not None and self.sources:
            raise ConfigError("both data and sources are given; give exactly one of the two")
        if (self.data is None) != (self.format is None):
            given, absent = ("format", "data") if self.data is None else ("data", "format")
            raise ConfigError(f"{given} is given without {absent}; a single source needs --data and --format")
        places = {"base": self.base, "chat_template": self.chat_template, "score.base_cache": self.score.base_cache}
        for name, uri in places.items():
            check_no_secret(name, uri)
        for path in [self.data] if isinstance(self.data, str) else self.data or []:
            check_no_secret("data", path)
        names = [source.name for source in self.sources]
        for name in names:
            check(names.count(name) == 1, "source name", name, "unique: example_id is made of it")

    def all_sources(self) -> list[Source]:
        """The sources, with --data and --format as one source named after its format."""
        if self.data is None or self.format is None:
            return self.sources
        return [Source(name=self.format, path=self.data, format=self.format)]

    def require_input(self) -> None:
        """Raise ConfigError for the first of output, base and data that is not given, or is for another format."""
        self.require_output()
        if not self.base:
            raise ConfigError("no base is given; add --base MODEL (a folder or a hub name)")
        if not self.all_sources():
            raise ConfigError("no data is given; add --data PATH --format FORMAT, or sources in the configuration file")
        for source in self.all_sources():
            source.check_columns()
        if self.finetune.lora_rank is None:
            for name in not_default("finetune", self.finetune):
                if name.startswith("finetune.lora_"):
                    raise ConfigError(f"{name} is given, but finetune.lora_rank is not; give it, or leave {name} out")

    def without_effect(self) -> dict[str, str]:
        """Settings that change nothing as the others stand, by dotted name: why."""
        unused = {}
        if self.finetune.max_steps is not None and self.finetune.epochs != type(self)().finetune.epochs:
            unused["finetune.epochs"] = "finetune.max_steps is given"
        if not self.dry_run:
            unused |= dict.fromkeys(not_default("estimate", self.estimate), "only --dry_run reckons with it")
        return unused


@dataclass(frozen=True, kw_only=True)
class RunConfig(InputConfig):
    """Score instruction data by DavIR and select the best part of it."""

    reference: str | None = None
    """A fine-tune of the base to score against: a checkpoint, or a folder with a peft adapter. None: fine-tune one on
    the whole set."""
    keep_token_nll: Literal["sample", "all", "none"] = "sample"
    """Whose token losses are kept in scores: about 200 rows or more chosen by hash, all, or none."""
    rank: RankConfig = RankConfig()
    """The order of the ranking."""
    select: SelectConfig = SelectConfig()
    """Where the ranking is cut."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_no_secret("reference", self.reference)
        for source in self.all_sources():
            if source.format == "preference":
                raise ConfigError(f"source {source.name!r} has the format preference; jobs/align.py trains on pairs")
        if self.select.min_score is not None and self.rank.order == "random":
            raise ConfigError("select.min_score has no meaning with rank.order random; choose top_k or top_fraction")
        self._check_most()
        self._check_source_names()
        if self.select.jsonl and not self.keep_record:
            raise ConfigError("select.jsonl writes the source records, which keep_record false leaves out")

    def _check_source_names(self) -> None:
        """A selection may name only sources that there are; known before hours are spent on a fine-tune."""
        names = [source.name for source in self.all_sources()]
        asked = [part.source for part in self.select.mixture]
        asked += [parts["source"] for parts in map(self.select.parts_of, self.select.quotas) if "source" in parts]
        for name in asked:
            if names and name not in names:
                raise ConfigError(f"select names the source {name!r}; the sources are {', '.join(names)}")

    def _check_most(self) -> None:
        """A ranking of the first ranks only cannot tell what lies beyond."""
        select, most = self.select, self.rank.most
        if most is None:
            return
        only_counts = (select.top_k is not None and not select.balance) or bool(select.quotas)
        if select.rules and not only_counts:
            raise ConfigError(
                f"rank.most is {most}, but select.{select.rules[0]} may need every rank; leave rank.most out (null)"
            )
        if select.top_k is not None and select.top_k > most:
            raise ConfigError(f"select.top_k is {select.top_k}, but rank.most keeps only {most} ranks; raise rank.most")

    def require_select(self) -> None:
        """Raise ConfigError where no selection rule is given, or one names a range of lengths that there is not."""
        if not self.select.rules:
            rules = ", ".join(f"--select.{rule}" for rule in SELECT_RULES)
            raise ConfigError(
                f"no selection rule is given; add one of {rules} (the paper's Alpaca: --select.top_fraction 0.06)"
            )
        ranges = self.select.length_ranges
        for group in self.select.quotas:
            parts = self.select.parts_of(group)
            if "length" in parts and parts["length"] not in ranges:
                raise ConfigError(
                    f"select.quotas has {group!r}, whose range of lengths is {parts['length']!r}; the ranges are "
                    f"{', '.join(ranges)} (select.length_edges)"
                )

    def without_effect(self) -> dict[str, str]:
        """Settings that change nothing as the others stand, by dotted name: why."""
        unused: dict[str, str] = {}
        if self.reference is not None:
            unused |= dict.fromkeys(
                not_default("finetune", self.finetune), "a reference is given, so nothing is trained"
            )
        unused |= super().without_effect()
        if self.rank.order != "random" and self.rank.seed:
            unused["rank.seed"] = f"rank.order is {self.rank.order}, not random"
        if not self.select.mixture and self.select.shuffle_seed:
            unused["select.shuffle_seed"] = "there is no select.mixture"
        if "length" not in self.select.balance and self.select.length_edges != SelectConfig().length_edges:
            unused["select.length_edges"] = "select.balance has no length"
        return unused
