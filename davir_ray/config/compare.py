"""The configuration of jobs/compare.py: what is trained, on how much data, how often, and what is measured."""

from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple, get_args

from davir_ray.config.checks import check, check_fields, check_no_secret
from davir_ray.config.run import GenerateConfig, OutputConfig
from davir_ray.config.selection import Order
from davir_ray.config.sources import FormatOption, Source
from davir_ray.config.training import FinetuneConfig
from davir_ray.errors import ConfigError

ArmName = Literal["selection", "random", "random_matched", "lowest", "rho", "full"]
Reading = Literal["tokens", "epochs", "steps"]
DRAWN: tuple[ArmName, ...] = ("random", "random_matched")
"""Arms whose rows are drawn."""
FULL: ArmName = "full"
_RANKED: tuple[ArmName, ...] = ("selection", "lowest", "rho")
_ORDER = "order:"
MAX_PASSES = 20
"""Maximum number of passes over a set of rows in the schedule `steps`: with more, a model would be compared for how it
memorises."""
MeasureName = Literal["loss", "exact_match"]


def order_of(arm: str) -> Order | None:
    """The order whose highest rows an arm has, if it is named order:ORDER; else None."""
    return next((order for order in get_args(Order) if arm == f"{_ORDER}{order}" and order != "random"), None)


def is_ranked(arm: str) -> bool:
    """Whether the rows of an arm follow from the scores of a run."""
    return arm in _RANKED or order_of(arm) is not None


class TrialName(NamedTuple):
    """One fine-tune of a comparison."""

    arm: str
    rows: int
    """Rows of the selection that the arm is compared with; for the full set, its own rows."""
    reading: str
    seed: int

    def __str__(self) -> str:
        return f"{folder_name(self.arm)}-{self.rows}-{self.reading}-seed{self.seed}"


def folder_name(arm: str) -> str:
    """The name of an arm in names of folders, without the colon, which not every file system takes."""
    return arm.replace(":", "_")


_MARGIN = 0.02

_SET_BY_COMPARISON = ("seed", "max_steps", "export_epochs")
"""Settings of a fine-tune that the comparison sets itself."""


@dataclass(frozen=True, kw_only=True)
class CompareConfig(OutputConfig):
    """Fine-tune the base on a run's selection and on other sets of rows, and measure each on held-out data."""

    run: str | list[str] | None = None
    """Folder of a finished run of jobs/score.py, which is only read. A list of runs of the same data, each with a
    reference trained anew (another finetune.seed): model s of an arm has the rows that run s selected, counted modulo
    the number of runs, so that the models are replicates of the method and not of one selection."""
    heldout: str | list[str] | None = None
    """Data to measure on when there is one source: a file, a folder, a glob, a list of these, or a hub name."""
    heldout_format: FormatOption | None = "auto"
    """Format of --heldout. auto or None: found from the columns and the first records, and logged in one line."""
    heldout_sources: list[Source] = field(default_factory=list)
    """Several named sources to measure on, instead of --heldout."""
    heldout_limit: int | None = None
    """Read at most this many records from each held-out source. None: all."""
    trust_remote_code: bool = False
    """Run Python code that comes with the run's base, whatever the run's own configuration says."""
    max_bad_fraction: float = 0.01
    """Maximum share of rejected held-out rows; above it the job stops and reports the reasons with their counts."""
    arms: list[str] = field(default_factory=lambda: ["selection", "random", "random_matched", "lowest", "rho", "full"])
    """The sets of rows to train on. selection: the run's selection (its mixture, if there is one). random: as many
    rows, drawn by hash. random_matched: drawn rows with the same histogram of response lengths and as many response
    tokens. lowest: the lowest ranked. rho: the highest by rho_sum. order:ORDER: the highest by another order of
    rank.order, such as order:base_mean_nll. full: every prepared example. Rows are drawn and
    ranked among the scored rows that pass the selection's filters (min_response_tokens, max_response_tokens,
    drop_duplicates), without its min_score, balance and quotas. With a mixture, each arm takes as many rows of each
    source as the mixture; full takes all rows of these sources and repeats them as the mixture does."""
    sizes: list[int] = field(default_factory=list)
    """Sizes of the selection for the learning curve, in rows (with a mixture: rows of the sources that are not taken
    whole). Empty: the run's own size."""
    outside_selection: bool = False
    """Draw the rows of random and random_matched among those that no run selected."""
    match_prompts: bool = False
    """Match the histogram of prompt lengths in random_matched, too: the same number of rows in each range of response
    lengths and of prompt lengths (select.length_edges of the run)."""
    readings: list[Reading] = field(default_factory=lambda: ["tokens", "epochs"])
    """How long each arm is trained. tokens: for as many response tokens as random rows of that size have in the
    recipe's epochs, the same number in every arm. epochs: for the recipe's number of epochs. steps: for as many
    optimiser steps as every prepared example takes in that number of epochs; left out for sizes where that is more
    than 20 passes. full is trained for the recipe's epochs."""
    seeds: int | dict[str, int] = 3
    """Number of models to train for each arm, each with its own data order; by arm with a default for the others:
    '{random: 8, default: 4}'."""
    seeds_per_draw: int = 1
    """Number of models on each draw of random and random_matched. 1: each model has a draw of its own. With 2 or more,
    the variation between draws and the variation between models on the same rows can be told apart."""
    recipe: dict[str, Any] = field(default_factory=dict)
    """Fields of finetune that differ from the run's own, such as {epochs: 1}."""
    measures: list[MeasureName] = field(default_factory=lambda: ["loss"])
    """What is measured. loss: nats per response token. exact_match: the share of generated answers that end in the
    right number, on the held-out sources in generate.sources."""
    tests: list[str] = field(default_factory=list)
    """The differences that are tested, such as [selection vs random, lowest vs full]. The first is the primary test: on
    the first measure and reading, all sources together; all others are corrected for their number. Empty: the selection
    against random, then against each other arm, and each other arm against random."""
    margins: dict[str, float] = field(default_factory=dict)
    """Size of a difference that would not matter, by measure. Two arms are called level only where a test shows that
    they differ by less. A measure that is not given has 0.02: nats per response token, or a share of the questions."""
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    """How answers are generated for exact_match and for the instructions."""
    instructions: str | None = None
    """A list of instructions (JSON, JSON lines or Parquet with `instruction` and perhaps `input`) that each model
    answers into a file for alpaca_eval. No judge is called. None: no instructions."""
    instructions_chat: bool | None = None
    """Give each instruction as a user's turn in the chat template, not in Stanford Alpaca's prompt. None: true if all
    data of the run are messages."""
    arms_at_once: int | None = None
    """Maximum number of arms to train at the same time. None: as many as the cluster has room for."""
    keep_models: bool = False
    """Keep each arm's model in its folder after it has been measured."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("run", "instructions", "heldout"):
            check_no_secret(name, getattr(self, name))
        self._check_heldout()
        arms = get_args(ArmName)
        for arm in self.arms:
            need = f"one of {', '.join(arms)}, or order: and an order of rank.order that is not random"
            check(arm in arms or order_of(arm) is not None, "an arm", arm, need)
        self._check_models()
        check_fields(self, "", ["max_bad_fraction"], lambda share: 0 <= share <= 1, "from 0 to 1")
        check_fields(
            self, "", ["heldout_limit", "arms_at_once", "seeds_per_draw"], lambda count: count >= 1, "at least 1"
        )
        for rows in self.sizes:
            check(rows >= 1, "a size", rows, "at least 1")
        lists = ("arms", "readings", "measures")
        check_fields(self, "", lists, bool, "at least one")
        check_fields(self, "", [*lists, "sizes"], lambda values: len(set(values)) == len(values), "without repetition")
        self._check_recipe()
        known = get_args(MeasureName)
        for name, margin in self.margins.items():
            check(name in known, "a measure in margins", name, " or ".join(known))
            check(margin > 0, f"margins.{name}", margin, "above 0")
        self.contrasts()

    def all_margins(self) -> dict[str, float]:
        """The margin of every measure."""
        return {name: self.margins.get(name, _MARGIN) for name in get_args(MeasureName)}

    def contrasts(self) -> list[tuple[str, str]]:
        """The pairs of arms that are tested, the primary test first; ConfigError if `tests` has something else."""
        if self.tests:
            pairs = [self._pair(test) for test in self.tests]
            check(len(set(pairs)) == len(pairs), "tests", self.tests, "without repetition")
            return pairs
        first = "selection" if "selection" in self.arms else self.arms[0]
        others = sorted((arm for arm in self.arms if arm != first), key=lambda arm: arm != "random")
        against = [(arm, "random") for arm in others[1:]] if others[:1] == ["random"] else []
        return [*((first, arm) for arm in others), *against]

    def _pair(self, test: str) -> tuple[str, str]:
        arm, separator, against = test.partition(" vs ")
        named = arm in self.arms and against in self.arms and arm != against
        check(bool(separator) and named, "a test", test, f"ARM vs OTHER, two of the arms {', '.join(self.arms)}")
        return arm, against

    def _check_models(self) -> None:
        """Check the runs and the number of models of each arm."""
        for run in self.runs:
            check(self.runs.count(run) == 1, "a run", run, "given once")
        if isinstance(self.seeds, int):
            check(self.seeds >= 1, "seeds", self.seeds, "at least 1")
        else:
            known = [*get_args(ArmName), "default"]
            for name, number in self.seeds.items():
                check(
                    name in known or order_of(name) is not None, "an arm of seeds", name, f"one of {', '.join(known)}"
                )
                check(number >= 1, f"seeds of {name}", number, "at least 1")
                check(name in (*self.arms, "default"), "an arm of seeds", name, "one of the arms, or default")
            for arm in self.arms:
                if not {arm, "default"} & set(self.seeds):
                    raise ConfigError(f"seeds is {self.seeds!r}, with no number for {arm}; add it, or a default")
        for arm in DRAWN:
            if arm in self.arms and 1 < self.num_models(arm) <= self.seeds_per_draw:
                raise ConfigError(
                    f"seeds_per_draw is {self.seeds_per_draw}, so all {self.num_models(arm)} models of {arm} have one "
                    "draw, which says nothing of others; give it more seeds, or fewer on a draw"
                )
        for arm in self.arms:
            if is_ranked(arm) and self.num_models(arm) < len(self.runs):
                raise ConfigError(
                    f"seeds is {self.seeds!r}, so {arm} has fewer models than there are runs ({len(self.runs)}), and "
                    f"some selections would not be trained on; give {arm} {len(self.runs)} models, or fewer runs"
                )

    def _check_heldout(self) -> None:
        if self.heldout is not None and self.heldout_sources:
            raise ConfigError("both heldout and heldout_sources are given; give exactly one of the two")
        is_found = self.heldout_format in ("auto", None)
        if self.heldout is None and not is_found:
            raise ConfigError("heldout_format is given without heldout; give --heldout, or a format in heldout_sources")
        names = [source.name for source in self.all_heldout()]
        for name in names:
            check(names.count(name) == 1, "held-out source name", name, "given once")
        if self.heldout is not None and is_found:  # the source is named after its format
            return
        for name in self.generate.sources:
            if names and name not in names:
                raise ConfigError(f"generate.sources has {name!r}; the held-out sources are {', '.join(names)}")

    def _check_recipe(self) -> None:
        known = {field.name for field in fields(FinetuneConfig)}
        for name in self.recipe:
            if name not in known:
                raise ConfigError(
                    f"recipe has {name!r}, which is not a field of finetune; see --finetune of jobs/score.py"
                )
            if name in _SET_BY_COMPARISON:
                raise ConfigError(f"recipe has {name!r}, which the comparison sets itself; leave it out")
        try:
            FinetuneConfig(**self.recipe)
        except TypeError as error:
            raise ConfigError(f"recipe is {self.recipe!r}; its values must have the types of finetune's") from error

    @property
    def runs(self) -> list[str]:
        """The runs as a list, also where there is one."""
        return [self.run] if isinstance(self.run, str) else self.run or []

    def num_models(self, arm: str) -> int:
        """Number of models of an arm."""
        if isinstance(self.seeds, int):
            return self.seeds
        return self.seeds[arm] if arm in self.seeds else self.seeds["default"]

    def row_set(self, arm: str, model: int) -> int:
        """Number of the draw, or of the run, whose rows a model of an arm is trained on."""
        if arm in DRAWN:
            return model // self.seeds_per_draw
        return model % max(1, len(self.runs)) if is_ranked(arm) else 0

    def all_heldout(self) -> list[Source]:
        """The held-out sources, with --heldout as one source named after its format."""
        if self.heldout is None:
            return self.heldout_sources
        form = self.heldout_format or "auto"
        return [Source(name=form, path=self.heldout, format=form)]

    def require(self) -> None:
        """Raise ConfigError if output, run or held-out data is not given."""
        self.require_output()
        if not self.run:
            raise ConfigError("no run is given; add --run DIR, the output of a finished jobs/score.py")
        if not self.all_heldout():
            raise ConfigError(
                "there is nothing to measure on; add --heldout PATH, or heldout_sources in the configuration file"
            )

    def reasons_without_effect(self) -> dict[str, str | None]:
        """See OutputConfig."""
        no_match = None if "exact_match" in self.measures else "measures has no exact_match"
        no_draw = None if set(self.arms) & set(DRAWN) else "no arm is drawn"
        return {
            "seeds_per_draw": no_draw,
            "outside_selection": no_draw,
            "match_prompts": None if "random_matched" in self.arms else "random_matched is not among the arms",
            "generate": no_match if self.instructions is None else None,
            "generate.sources": no_match,
            "instructions_chat": "no instructions are given" if self.instructions is None else None,
        }
