"""Settings of the ranking and of the selection, and every check of the two that needs no data."""

import math
from collections.abc import Collection, Mapping, MutableMapping, Sequence
from dataclasses import asdict, dataclass, field
from decimal import Decimal
from itertools import pairwise
from typing import Any, Literal, get_args

from davir_ray.config.checks import check, check_fields, check_no_secret
from davir_ray.config.scoring import ExtraScore
from davir_ray.errors import ConfigError

Order = Literal[
    "davir",
    "rho_sum",
    "rho_mean",
    "base_nll",
    "reference_nll",
    "base_mean_nll",
    "reference_mean_nll",
    "length",
    "random",
    "ifd",
    "davir_aligned",
    "davir_repeated",
]
ALIGNED: Order = "davir_aligned"
REPEATED: Order = "davir_repeated"
_PLACES = {ALIGNED: "davir_aligned", REPEATED: "repeats"}
"""Orders by a place of davir, and the folder in extra/ that has it."""
NOT_MEASURED = "Stability: not measured (one reference); score again with another seed and rank with --rank.repeats."
SELECT_RULES = ("top_k", "top_fraction", "top_tokens", "min_score", "quotas", "mixture")
PART_RULES = ("top_k", "top_fraction", "top_tokens")
_LATER_FILTERS = ("max_score", "skip_top")


@dataclass(frozen=True, kw_only=True)
class RankConfig:
    """The order of the ranking; every baseline of the paper is one option away."""

    order: Order | None = None
    """Column to rank by (length = num_response_tokens), random, a loss by response token (base_mean_nll,
    reference_mean_nll), whose order is that of the perplexity, or ifd, which needs score.also [ifd]. None: davir, and
    with folds davir_aligned, davir on one scale for all folds; with repeats davir_repeated."""
    lowest: bool = False
    """Rank the lowest value first."""
    seed: int = 0
    """Seed of the random order."""
    most: int | None = None
    """Number of ranks to write; the rest of a large corpus is never moved. None: every rank."""
    repeats: list[str] = field(default_factory=list)
    """Finished runs (folders or s3://…) of the same data, base and settings of prepare, but another finetune.seed or
    prepare.fold_seed. davir_repeated is the mean of a row's places in all runs, and the report says how stable the
    selection is. Empty: none."""

    def __post_init__(self) -> None:
        check_fields(self, "rank.", ["most"], lambda count: count >= 1, "at least 1")
        check_no_secret("rank.repeats", self.repeats)
        distinct = len(set(self.repeats)) == len(self.repeats) and all(place.strip() for place in self.repeats)
        check(distinct, "rank.repeats", self.repeats, "folders of different runs")

    @property
    def by(self) -> Order:
        """The order; davir where none is given."""
        return self.order or "davir"

    @property
    def extra(self) -> str | None:
        """The folder in extra/ with the score that the order is by; None if scores/ have all that it needs."""
        return self.by if self.by in get_args(ExtraScore) else _PLACES.get(self.by)

    @property
    def is_by_davir(self) -> bool:
        """Whether the order is by davir, as it is or as a place; the others take no account of repeats."""
        return self.by in ("davir", *_PLACES)

    def as_order(self) -> dict[str, Any]:
        """The settings for a fingerprint; the content of repeats counts, wherever they are."""
        return {name: value for name, value in asdict(self).items() if name != "repeats"}


@dataclass(frozen=True, kw_only=True)
class Part:
    """One source's part of a mixture: the best of it by exactly one rule, each row `repeat` times."""

    source: str
    """Name of the source."""
    all: bool = False
    """Every eligible row."""
    top_k: int | None = None
    """Number of the source's rows to take, best first."""
    top_fraction: float | None = None
    """This share of the source's eligible rows, rounded as select.top_fraction is."""
    top_tokens: int | None = None
    """The longest prefix of the source's ranking with at most this many scored tokens."""
    repeat: int = 1
    """Number of copies of each row in the mixture."""

    def __post_init__(self) -> None:
        where = f"select.mixture of {self.source!r}:"
        rules = ["all"] * self.all + [name for name in PART_RULES if getattr(self, name) is not None]
        check(len(rules) == 1, f"{where} the rules", rules, f"exactly one of all, {', '.join(PART_RULES)}")
        _check_sizes(f"{where} ", self)
        check(self.repeat >= 1, f"{where} repeat", self.repeat, "at least 1")


@dataclass(frozen=True, kw_only=True)
class SelectConfig:
    """Where the ranking is cut: exactly one of top_k, top_fraction, top_tokens, min_score, quotas, mixture.

    Rows that a filter excludes are not eligible, and no rule counts them. Every count is in the manifest and the
    report.
    """

    top_k: int | None = None
    """Number of rows to take, best first."""
    top_fraction: float | None = None
    """This share of the eligible rows, rounded down (from the exact product), but at least 1 row. The paper: 0.06."""
    top_tokens: int | None = None
    """The longest prefix of the ranking with at most this many scored tokens."""
    min_score: float | None = None
    """Every row whose value in rank.order is at least this (at most, with rank.lowest)."""
    max_score: float | None = None
    """Filter: a value in rank.order of at most this (at least, with rank.lowest): the other end of a window."""
    skip_top: float | None = None
    """Filter: without this share of the ranked rows, the first ones, rounded down; what a reference has learnt by heart
    may be there."""
    min_response_tokens: int | None = None
    """Filter: at least this many scored tokens in a response."""
    max_response_tokens: int | None = None
    """Filter: at most this many scored tokens in a response."""
    drop_duplicates: bool = False
    """Filter: of rows with the same prompt and response, only the highest-ranked is eligible."""
    balance: list[Literal["source", "length"]] = field(default_factory=list)
    """[source], [length] or [source, length]: each source, each range of response lengths, or each pair of both gets
    the share of the selection that it has of the eligible rows; the best rows of each group are taken. Empty: no
    groups."""
    quotas: dict[str, int] = field(default_factory=dict)
    """Instead of shares, the number of rows of each group of balance, such as {alpaca: 3000}, {32-63: 500} or
    {alpaca/32-63: 500}; groups without a quota give none."""
    length_edges: list[int] = field(default_factory=lambda: [32, 64, 128, 256, 512])
    """Where ranges of response lengths begin, in scored tokens; the first begins at 0."""
    mixture: list[Part] = field(default_factory=list)
    """A training mixture of several sources: written to mixture/, repeated and shuffled, in addition to selected/."""
    shuffle_seed: int = 0
    """Seed of the mixture's order."""
    jsonl: bool = False
    """Also write the source records of the selection (or the mixture, if there is one) as JSON lines to jsonl/."""

    def __post_init__(self) -> None:
        _check_sizes("select.", self)
        check_fields(self, "select.", ["min_score", "max_score"], lambda score: not math.isnan(score), "a number")
        check_fields(self, "select.", ["skip_top"], lambda share: 0 <= share < 1, "at least 0 and below 1")
        if len(self.rules) > 1:
            raise ConfigError(f"select has {' and '.join(self.rules)}; give exactly one rule")
        shortest, longest = self.min_response_tokens, self.max_response_tokens
        fits = shortest is None or longest is None or shortest <= longest
        check(fits, "select.min_response_tokens", shortest, f"at most {longest}")
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

    def check_fits(self, rank: RankConfig, sources: Sequence[str]) -> None:
        """Raise ConfigError if the rule contradicts the ranking or names a source not in `sources`, if known."""
        for name in ("min_score", "max_score"):
            if getattr(self, name) is not None and rank.by == "random":
                raise ConfigError(f"select.{name} has no meaning with rank.order random; choose top_k or top_fraction")
        if rank.most is not None and self.skip_top:
            raise ConfigError(
                f"rank.most is {rank.most}, but select.skip_top is a share of every ranked row; leave rank.most out "
                "(null)"
            )
        if rank.most is not None and self.rules:  # the rows beyond rank.most are unknown
            if not (self.quotas or (self.top_k is not None and not self.balance)):
                raise ConfigError(
                    f"rank.most is {rank.most}, but select.{self.rules[0]} may need every rank; leave rank.most out "
                    "(null)"
                )
            if self.top_k is not None and self.top_k > rank.most:
                raise ConfigError(
                    f"select.top_k is {self.top_k}, but rank.most keeps only {rank.most} ranks; raise rank.most"
                )
        named = [part.source for part in self.mixture]
        named += [parts["source"] for parts in map(self.parts_of, self.quotas) if "source" in parts]
        for name in named:
            if sources and name not in sources:
                raise ConfigError(f"select names the source {name!r}; the sources are {', '.join(sources)}")

    def require_rule(self) -> None:
        """Raise ConfigError if no rule is given, or one names a range of lengths that does not exist."""
        if not self.rules:
            rules = ", ".join(f"--select.{rule}" for rule in SELECT_RULES)
            raise ConfigError(
                f"no selection rule is given; add one of {rules} (the paper's Alpaca: --select.top_fraction 0.06)"
            )
        for group in self.quotas:
            parts = self.parts_of(group)
            if "length" in parts and parts["length"] not in self.length_ranges:
                raise ConfigError(
                    f"select.quotas has {group!r}, whose range of lengths is {parts['length']!r}; the ranges are "
                    f"{', '.join(self.length_ranges)} (select.length_edges)"
                )

    def as_rule(self) -> dict[str, Any]:
        """The settings for a fingerprint; filters that earlier versions did not have are there only if they are set."""
        settings = asdict(self)
        return {name: value for name, value in settings.items() if name not in _LATER_FILTERS or value is not None}

    @property
    def rules(self) -> list[str]:
        """Names of the rules that are set."""
        return rules_in(vars(self))

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


def rules_in(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Names of the selection rules that are set in `values`, whose keys begin with `prefix`."""
    return [rule for rule in SELECT_RULES if values.get(f"{prefix}{rule}") not in (None, {}, [])]


def keep_rules(select: MutableMapping[str, Any], rules: Collection[str]) -> None:
    """Reset the selection rules other than these to their defaults."""
    unset = SelectConfig()
    for rule in set(SELECT_RULES) - set(rules):
        select[rule] = getattr(unset, rule)


def count_from_fraction(fraction: float, num_rows: int) -> int:
    """Number of rows that a fraction means: floor of the exact decimal times the rows, at least 1."""
    return max(1, int(Decimal(str(fraction)) * num_rows))


def _check_sizes(where: str, config: Part | SelectConfig) -> None:
    check_fields(config, where, ["top_k", "top_tokens"], lambda count: count >= 1, "at least 1")
    check_fields(config, where, ["top_fraction"], lambda share: 0 < share <= 1, "above 0 and at most 1")
