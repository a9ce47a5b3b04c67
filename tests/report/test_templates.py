"""Each page can be drawn whatever its job had to tell: no expression of any template ever meets an undefined name."""

import itertools
import json
import random
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from comparison_facts import comparison_inputs, distinct, trial_names
from jinja2 import nodes
from jinja2.runtime import Undefined
from margin_facts import CURVE, manifests, margin_table
from outline import Outline
from run_facts import evaluation_set, example, manifest, report_inputs, stability_manifest

from davir_ray import schema
from davir_ray.config.compare import TrialName
from davir_ray.report import ReportInputs, charts, render_page, summarise
from davir_ray.report.alignment import Trained, alignment_facts, measured_pairs, render_alignment, sweep_table
from davir_ray.report.comparison import summarise_comparison
from davir_ray.report.comparison_page import render_comparison
from davir_ray.report.measured import FLEXIBLE, STRICT, ComparisonInputs, Measured
from davir_ray.report.page import environment
from davir_ray.schema import Status

Change = Callable[[Any], Any]
Options = Mapping[str, Mapping[str, Change]]
"""Of each thing that a page may tell: what there can be of it, as changes of the inputs made one after the other."""

Place = tuple[str, int, str]
"""Template, line, and the name that is looked up there."""


def unchanged(inputs: Any) -> Any:
    return inputs


def combinations(options: Options) -> Iterator[dict[str, str]]:
    """Choices from the options in which every two of different things stand together at least once."""
    draw = random.Random(0)
    missing = {
        frozenset([(one, a), (other, b)])
        for one, other in itertools.combinations(options, 2) for a in options[one] for b in options[other]
    }  # fmt: skip
    while missing:
        wanted = dict(min(missing, key=sorted))
        drawn = [{name: draw.choice(list(there)) for name, there in options.items()} | wanted for _ in range(40)]
        best = max(drawn, key=lambda chosen: len(missing & pairs_of(chosen)))
        missing -= pairs_of(best)
        yield best


def pairs_of(chosen: dict[str, str]) -> set[frozenset[tuple[str, str]]]:
    return {frozenset(pair) for pair in itertools.combinations(chosen.items(), 2)}


def cases(options: Options, start: Callable[[], Any]) -> Iterator[tuple[str, Any]]:
    """Inputs of a page, each with its name."""
    for chosen in combinations(options):
        inputs = start()
        for thing, option in chosen.items():
            inputs = options[thing][option](inputs)
        yield ", ".join(f"{thing}: {option}" for thing, option in chosen.items()), inputs


# --- a run -----------------------------------------------------------------------------------------------------------


def with_manifest(stage: str, **changes: Any) -> Change:
    """The stage's manifest changed, where there is one: `counts` and `details` are added to."""

    def change(inputs: ReportInputs) -> ReportInputs:
        found = inputs.manifests.get(stage)
        if found is None:
            return inputs
        merged = {
            name: {**found[name], **value} if name in ("counts", "details") else value
            for name, value in changes.items()
        }
        return replace(inputs, manifests={**inputs.manifests, stage: {**found, **merged}})

    return change


def with_config(**changes: Any) -> Change:
    return lambda inputs: replace(inputs, config={**inputs.config, **changes})


def with_scores(**columns: Any) -> Change:
    """Columns of the scores replaced by one value each."""

    def change(inputs: ReportInputs) -> ReportInputs:
        table = inputs.scores
        for name, value in columns.items():
            at = table.schema.get_field_index(name)
            table = table.set_column(
                at, table.schema.field(name), pa.array([value] * table.num_rows, table.schema.types[at])
            )
        return replace(inputs, scores=table)

    return change


def with_rows(count: int) -> Change:
    return lambda inputs: replace(inputs, scores=inputs.scores.slice(inputs.scores.num_rows - count), num_scored=count)


def without_stage(*stages: str) -> Change:
    return lambda inputs: replace(
        inputs, manifests={stage: found for stage, found in inputs.manifests.items() if stage not in stages}
    )


def without_fields(inputs: ReportInputs) -> ReportInputs:
    """Manifests as an older version may have left them, which had but counts."""
    kept = {stage: {"counts": found["counts"]} for stage, found in inputs.manifests.items()}
    return replace(inputs, manifests=kept)


GROUPS = [
    {"group": name, "eligible": 20, "selected": rows, "tokens": 9} for name, rows in (("alpaca", 4), ("gsm8k", 0))
]
SOURCES = [{"source": name, "rows": 2, "tokens": 9, "repeat": repeat} for name, repeat in (("alpaca", 1), ("gsm8k", 2))]
LINES = [{"reference": k, "intercept": 0.1 - 0.2 * k, "slope": 1.1, "residual_sd": 0.05} for k in range(2)]
MIXTURE = [{"source": "alpaca", "top_fraction": 0.1}, {"source": "gsm8k", "all": True, "repeat": 2}]
PLANTED = {"name": "good", "share_of_all": 0.5, "share_of_selected": None, "share_of_random": 0.5, "mean_davir": None}
UNTOLD = example(tokens=None, base_token_nll=None, reference_token_nll=None, rank=None, davir=None, rho_mean=None)
EMPTY = example(tokens=[], prompt="", response=None, num_response_tokens=0, rank=40)
TORN = example(base_token_nll=[None, 2.0, 1.0], prompt="long " * 400, response="long " * 4000, rank=20)


def _folds(inputs: Any) -> list[int]:
    return [row % 3 - 1 for row in range(inputs.scores.num_rows)]


def with_stability(*options: Any, **changed: Any) -> Change:
    measured = stability_manifest(*options, **changed)
    return lambda inputs: replace(inputs, manifests={**inputs.manifests, "stability": measured})


RUN: Options = {
    "reference": {
        "trained": unchanged,
        "given": lambda inputs: without_stage("finetune")(with_config(reference="other/model")(inputs)),
        "trained in one step": with_manifest("finetune", details={"loss_by_step": [[1, 4.0]]}),
        "trained without a finite loss": with_manifest(
            "finetune", details={"loss_by_step": [[1, None], [2, float("nan")]]}
        ),
        "trained in many steps": with_manifest(
            "finetune", details={"loss_by_step": [[n, 4 / n] for n in range(1, 900)]}
        ),
    },
    "scores": {
        "many": unchanged,
        "a sample": lambda inputs: replace(inputs, num_scored=10**9),
        "one": with_rows(1),
        "none at all": with_rows(0),
        "none usable": with_scores(status=Status.NON_FINITE_NLL.value, davir=float("nan"), rho_sum=None, rho_mean=None),
        "all equal": with_scores(davir=0.25, base_nll=8.0, reference_nll=6.0, num_response_tokens=4),
        "nothing selected": with_scores(selected=False),
    },
    "folds": {
        "none": unchanged,
        "two and an anchor": lambda inputs: with_config(prepare={"folds": 2})(
            replace(inputs, scores=inputs.scores.append_column("fold", pa.array(_folds(inputs), pa.int8())))
        ),
        "two, linked": lambda inputs: replace(
            with_config(prepare={"folds": 2})(inputs),
            scores=inputs.scores.append_column("fold", pa.array(_folds(inputs), pa.int8())),
            manifests={**inputs.manifests, "davir_aligned": manifest({}, way="linked", linked_by=40, lines=LINES)},
        ),
        "two, by places": lambda inputs: replace(
            with_config(prepare={"folds": 2})(inputs),
            scores=inputs.scores.append_column("fold", pa.array(_folds(inputs), pa.int8())),
            manifests={**inputs.manifests, "davir_aligned": manifest({}, way="place")},
        ),
        "two, and what has seen the rows": lambda inputs: with_config(prepare={"folds": 2})(
            replace(inputs, scores=inputs.scores.append_column("davir_seen", inputs.scores["davir"]))
        ),
    },
    "stability": {
        "not measured": unchanged,
        "of two references": with_stability(0.2, "rows", 2),
        "of three": with_stability(0.9),
        "of three that overlap alike": with_stability(0.5, "rows"),
        "of every row": with_stability(None, place_sd=None),
    },
    "rule": {
        "top_fraction": unchanged,
        "top_k": with_config(select={"top_k": 4}),
        "top_tokens": with_config(select={"top_tokens": 400, "balance": ["source", "length"]}),
        "min_score": with_config(select={"min_score": 0.5}, rank={"order": "rho_sum", "lowest": True}),
        "quotas": with_config(select={"quotas": {"alpaca": 4}, "balance": ["source"]}),
        "mixture": with_config(select={"mixture": MIXTURE}),
        "random": with_config(rank={"order": "random"}),
        "none recorded": with_config(select=None, rank=None),
    },
    "selection": {
        "no details": unchanged,
        "groups": with_manifest("select", details={"cut": 0.5, "groups": GROUPS, "sources": SOURCES[:1]}),
        "one group without a name": with_manifest(
            "select", details={"cut": None, "groups": [{**GROUPS[0], "group": ""}]}
        ),
        "repeated sources": with_manifest("select", details={"cut": 9.0, "sources": SOURCES}),
        "rows left out": with_manifest(
            "select", counts={"duplicates": 3, "too_short": 0, "too_long": 1, "beyond_min_score": 2}
        ),
    },
    "rejects": {
        "shown": unchanged,
        "counted": lambda inputs: replace(inputs, rejects=schema.REJECTS.empty_table()),
        "none": lambda inputs: with_manifest("prepare", counts={"rejected": 0, "empty_response": 0, "read": 41})(
            replace(inputs, rejects=schema.REJECTS.empty_table())
        ),
        "of an unknown reason": with_manifest("prepare", counts={"empty_response": 0}),
    },
    "evaluation sets": {
        "none": unchanged,
        "two": with_manifest(
            "prepare", details={"evaluation_sets": {"a": evaluation_set(), "b": evaluation_set(rows=0)}}
        ),
    },
    "examples": {
        "with tokens": unchanged,
        "none": lambda inputs: replace(inputs, top=[], bottom=[]),
        "without what is shown": lambda inputs: replace(inputs, top=[UNTOLD], middle=[TORN], bottom=[EMPTY]),
        "many": lambda inputs: replace(
            inputs,
            top=[example(rank=n, example_id=n, tokens=None) for n in range(1, 8)],
            middle=[],
            with_tokens={"best": [example(rank=3, example_id=3)], "worst": [TORN]},
        ),
    },
    "throughput": {
        "recorded": unchanged,
        "one point": with_manifest("score", details={"throughput": {"seconds": [20.0], "tokens": [5000]}}),
        "two points at once": with_manifest("score", details={"throughput": {"seconds": [5.0, 5.0], "tokens": [1, 2]}}),
        "at its start": with_manifest("score", details={"throughput": {"seconds": [0.0], "tokens": [0]}}),
        "none": with_manifest("score", details={"throughput": None}),
    },
    "planted": {
        "none": unchanged,
        "a class": lambda inputs: replace(inputs, planted={"classes": [PLANTED], "note": "Note."}),
        "no class": lambda inputs: replace(inputs, planted={"classes": [], "note": ""}),
    },
    "manifests": {
        "whole": unchanged,
        "of an older version": without_fields,
        "none": lambda inputs: replace(inputs, manifests={}),
        "none of preparing": without_stage("prepare"),
        "none of ranking and selecting": without_stage("rank", "select"),
        "of other stages": lambda inputs: replace(inputs, manifests={**inputs.manifests, "extra": manifest({})}),
        "without counts": lambda inputs: replace(
            inputs, manifests={stage: {**found, "counts": {}} for stage, found in inputs.manifests.items()}
        ),
    },
    "settings": {
        "some": unchanged,
        "LoRA and sources": with_config(
            finetune={"lora_rank": 16}, sources=[{"name": "a", "path": ["x", "y"]}], limit=None
        ),
        "of an older version": lambda inputs: replace(inputs, config={"select": inputs.config["select"]}),
        "none": lambda inputs: replace(inputs, config={}),
    },
}


# --- a preference training -------------------------------------------------------------------------------------------

Alignment = dict[str, Any]
"""Arguments of `alignment_facts`."""


def alignment() -> Alignment:
    return {"margins": margin_table(), "num_pairs": 200, "manifests": manifests(), "settings": {"base": "tiny"}}


def pairs(kept: Callable[[pa.Table], pa.Table]) -> Change:
    """The margins changed, and stood for by themselves."""

    def change(inputs: Alignment) -> Alignment:
        table = kept(inputs["margins"])
        return {**inputs, "margins": table, "num_pairs": table.num_rows}

    return change


def filled(name: str, value: Any) -> Callable[[pa.Table], pa.Table]:
    def fill(table: pa.Table) -> pa.Table:
        at = table.schema.get_field_index(name)
        return table.set_column(
            at, table.schema.field(name), pa.array([value] * table.num_rows, table.schema.types[at])
        )

    return fill


def with_others(*changes: dict[str, Any]) -> Change:
    """A sweep of this training and others, each with another recipe or objective, or without some of the parts."""

    def change(inputs: Alignment) -> Alignment:
        measured = measured_pairs(inputs["margins"])
        of_part = {"held_out": measured["held_out"], "trained": pc.invert(measured["held_out"])}
        trained = []
        for seed, changed in enumerate([{}, *changes]):
            objective = {"loss": "dpo", "beta": None, "heldout_fraction": 0.0} | changed.get("objective", {})
            recipe = {"seed": seed, "learning_rate": 1e-6} | changed.get("recipe", {})
            kept = [of_part[name] for name in changed.get("parts", of_part)]
            pairs = measured.filter(reduce(pc.or_, kept)) if kept else measured.slice(0, 0)
            fingerprint = {"base": "b", "examples": "e", "frozen": f"{seed}", "objective": objective, "recipe": recipe}
            details = {"loss": objective["loss"], "beta": 0.1}
            trained.append(Trained(place=f"runs/{seed}", fingerprint=fingerprint, details=details, pairs=pairs))
        return {**inputs, "sweep": sweep_table(trained)}

    return change


def measured_by_step(curve: list[list[float]]) -> Change:
    def change(inputs: Alignment) -> Alignment:
        found = inputs["manifests"]["align"]
        details = {**found["details"], "loss_by_step": curve}
        details["measures_by_step"] = dict.fromkeys(details["measures_by_step"], curve)
        return {**inputs, "manifests": {**inputs["manifests"], "align": {**found, "details": details}}}

    return change


def with_loss(loss: str) -> Change:
    return lambda inputs: {**inputs, "manifests": manifests(loss)}


ALIGNMENT: Options = {
    "loss": {loss: with_loss(loss) for loss in ("davir_dpo", "dpo", "ipo", "dpo_norm")},
    "pairs": {
        "trained and held out": unchanged,
        "none held out": pairs(lambda table: table.filter(pc.invert(table["held_out"]))),
        "all held out": pairs(lambda table: table.filter(table["held_out"])),
        "none held out has a margin": pairs(
            lambda table: table.filter(pc.or_(pc.invert(table["held_out"]), pc.not_equal(table["status"], "ok")))
        ),
        "without margins": pairs(lambda table: table.filter(pc.not_equal(table["status"], "ok"))),
        "none": pairs(lambda table: table.slice(0, 0)),
        "one": pairs(lambda table: table.slice(7, 1)),
        "four": pairs(lambda table: table.slice(6, 4)),
    },
    "values": {
        "drawn": unchanged,
        "margins all equal": pairs(filled("margin", 0.0)),
        "lengths all equal": pairs(
            lambda table: filled("num_chosen_tokens", 9)(filled("num_rejected_tokens", 9)(table))
        ),
        "a loss that is infinite": pairs(filled("loss", float("inf"))),
    },
    "sample": {"all": unchanged, "a sample": lambda inputs: {**inputs, "num_pairs": 10**9}},
    "steps": {
        "many": measured_by_step(CURVE),
        "one": measured_by_step([[1, 0.7]]),
        "a loss that is not finite": measured_by_step([[1, 0.7], [2, float("nan")]]),
    },
    "sweep": {
        "none": unchanged,
        "another seed": with_others({}),
        "another loss": with_others({"objective": {"loss": "dpo_norm"}}),
        "another recipe without held-out pairs": with_others({"recipe": {"learning_rate": 1e-5}, "parts": ["trained"]}),
        "seeds without common pairs": with_others({"parts": ["trained"]}, {"parts": []}),
    },
}


# --- a comparison ----------------------------------------------------------------------------------------------------


def comparison() -> ComparisonInputs:
    return comparison_inputs(trial_names((50, 100)))


def answers(inputs: ComparisonInputs, measure: Any, sources: list[str]) -> Measured:
    draw = np.random.default_rng(1)
    values = {name: (draw.random(len(sources)) < 0.4).astype(float) for name in inputs.trials}
    num = len(sources)
    return Measured(
        measure=measure, sources=np.array(sources), prompts=distinct(num), lengths=np.arange(num), weights=np.ones(num),
        values=values,
    )  # fmt: skip


def kept_trials(kept: Callable[[TrialName], bool]) -> Change:
    def change(inputs: ComparisonInputs) -> ComparisonInputs:
        names = [name for name in inputs.trials if kept(name)]
        measures = [replace(m, values={name: m.values[name] for name in names}) for m in inputs.measures]
        return replace(inputs, trials={name: inputs.trials[name] for name in names}, measures=measures)

    return change


def of_arms(*arms: str) -> Change:
    return kept_trials(lambda name: name.arm in arms)


def one_seed(inputs: ComparisonInputs) -> ComparisonInputs:
    found: ComparisonInputs = kept_trials(lambda name: name.seed == 0)(inputs)
    return replace(found, settings={**found.settings, "seeds": 1})


def one_source(inputs: ComparisonInputs) -> ComparisonInputs:
    return replace(inputs, measures=[replace(m, sources=np.full(len(m.sources), "alpaca")) for m in inputs.measures])


def few_rows(inputs: ComparisonInputs) -> ComparisonInputs:
    """One held-out example of each measure, the first."""
    return replace(
        inputs,
        measures=[m.of(np.arange(len(m.weights)) < 1) for m in inputs.measures],
    )


def matched_without_steps(inputs: ComparisonInputs) -> ComparisonInputs:
    """Arms of which one is matched in prompts, too, and a schedule that was asked for and left out."""

    def renamed(values: Any) -> Any:
        return {name._replace(arm=name.arm.replace("lowest", "random_matched")): of for name, of in values.items()}

    found: ComparisonInputs = kept_trials(lambda name: name.reading != "steps")(inputs)
    return replace(
        found,
        trials=renamed(found.trials),
        measures=[replace(m, values=renamed(m.values)) for m in found.measures],
        settings={**found.settings, "readings": ["epochs", "steps"], "match_prompts": True},
    )


def hardly_different(inputs: ComparisonInputs) -> ComparisonInputs:
    """Losses of all models that are those of the base, give or take a thousandth of a nat."""
    draw, (measured,) = np.random.default_rng(2), inputs.measures
    weights = measured.weights
    values = {name: weights * (1 + draw.normal(0, 1e-3, len(weights))) for name in measured.values}
    return replace(inputs, measures=[replace(measured, values=values)])


def several_models_a_draw(inputs: ComparisonInputs) -> ComparisonInputs:
    return replace(
        inputs,
        trials={
            name: replace(facts, row_set=name.seed // 2 if name.arm == "random" else 0)
            for name, facts in inputs.trials.items()
        },
    )


COMPARISON: Options = {
    "measures": {
        "loss": unchanged,
        "loss and answers": lambda inputs: replace(
            inputs,
            measures=[
                *inputs.measures,
                answers(inputs, STRICT, ["alpaca"] * 20 + ["gsm8k"] * 20),
                answers(inputs, FLEXIBLE, ["gsm8k"] * 20),
            ],
        ),
        "losses that hardly differ": hardly_different,
        "answers": lambda inputs: replace(inputs, measures=[answers(inputs, STRICT, ["gsm8k"] * 20)]),
        "loss, and answers that nobody has": lambda inputs: replace(
            inputs, measures=[*inputs.measures, answers(inputs, STRICT, [])]
        ),
    },
    "arms": {
        "all": unchanged,
        "the selection": of_arms("selection"),
        "no selection": of_arms("random", "lowest"),
        "no random": of_arms("selection", "full"),
        "no full": of_arms("selection", "random"),
        "full": of_arms("full"),
    },
    "seeds": {"three": unchanged, "one": one_seed},
    "sizes": {"two": unchanged, "one": kept_trials(lambda name: name.rows != 50)},
    "readings": {"both": unchanged, "epochs": kept_trials(lambda name: name.reading == "epochs")},
    "sources": {"two": unchanged, "one": one_source},
    "examples": {"many": unchanged, "one": few_rows},
    "base": {
        "measured": unchanged,
        "not measured": lambda inputs: replace(inputs, measures=[replace(m, base=None) for m in inputs.measures]),
    },
    "left out": {
        "some": unchanged,
        "none": lambda inputs: replace(
            inputs,
            in_training_pool=0,
            in_pool_by_reason={},
            num_pool_rows_not_read=0,
            measures=[replace(m, without_value=0) for m in inputs.measures],
        ),
    },
    "training": {
        "finite": unchanged,
        "ended without a finite loss": lambda inputs: replace(
            inputs, trials={name: replace(facts, final_loss=float("nan")) for name, facts in inputs.trials.items()}
        ),
    },
    "settings": {
        "some": unchanged,
        "no recipe": lambda inputs: replace(inputs, recipe={}),
        "batches of all rows": lambda inputs: replace(inputs, recipe={**inputs.recipe, "batch_size": 10_000}),
    },
    "draws": {"of one model": unchanged, "of several": several_models_a_draw},
    "rows": {"one run's": unchanged, "matched, in schedules without steps": matched_without_steps},
}


# --- what the templates look up --------------------------------------------------------------------------------------


def draw_run(inputs: ReportInputs) -> str:
    return render_page(summarise(inputs))


def draw_alignment(inputs: Alignment) -> str:
    return render_alignment(alignment_facts(**inputs))


def draw_comparison(inputs: ComparisonInputs) -> str:
    return render_comparison(summarise_comparison(inputs)[0])


PAGES: dict[str, tuple[Options, Callable[[], Any], Callable[[Any], str]]] = {
    "run": (RUN, report_inputs, draw_run),
    "alignment": (ALIGNMENT, alignment, draw_alignment),
    "comparison": (COMPARISON, comparison, draw_comparison),
}


class Recorder:
    """Stands in the environment where templates look up attributes and items: notes each, and those that are undefined.

    Stricter than StrictUndefined, which lets a name pass that is looked up and not used.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.met: set[Place] = set()
        self.undefined: set[Place] = set()
        self._known: dict[tuple[str | None, int, str], Place] = {}
        for name in ("getattr", "getitem"):
            monkeypatch.setattr(environment(), name, self._recorded(getattr(environment(), name)))

    def _recorded(self, look_up: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        def recorded(of: Any, name: Any) -> Any:
            caller, found = sys._getframe(1), look_up(of, name)
            file, line = caller.f_globals.get("name"), caller.f_lineno  # a filter's module has no such global
            key = (file, line, str(name))
            if key not in self._known:
                at = environment().get_template(file).get_corresponding_lineno(line) if file else line
                self._known[key] = (file or "a filter", at, str(name))
            self.met.add(self._known[key])
            if isinstance(found, Undefined):
                self.undefined.add(self._known[key])
            return found

        return recorded


def written() -> set[Place]:
    """Every look-up by a fixed name that stands in a template."""
    places = set()
    for file in environment().list_templates(extensions=["j2"]):
        loader = environment().loader
        assert loader is not None
        parsed = environment().parse(loader.get_source(environment(), file)[0])
        # The lines that the compiler knows are those of statements; of ours only a loop's is longer than a line.
        starts = {
            id(found): loop.lineno for loop in parsed.find_all(nodes.For) for found in loop.iter.find_all(nodes.Expr)
        }
        for node in parsed.find_all((nodes.Getattr, nodes.Getitem)):
            line = starts.get(id(node), node.lineno)
            if isinstance(node, nodes.Getattr):
                places.add((file, line, node.attr))
            elif isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const):
                places.add((file, line, str(node.arg.value)))
    return places


CHARTS = (
    "step_curve", "margin_band", "score_histogram", "loss_histogram", "length_panel", "length_deciles", "comparison",
    "throughput",
)  # fmt: skip


def draw_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep each chart: they take most of a page's time, and most are those of another case."""
    for name in CHARTS:
        monkeypatch.setattr(charts, name, kept(getattr(charts, name)))


def kept(draw: Callable[..., Any]) -> Callable[..., Any]:
    drawn: dict[str, Any] = {}

    def draw_or_take(*facts: Any) -> Any:
        key = json.dumps(facts)
        if key not in drawn:
            drawn[key] = draw(*facts)
        return drawn[key]

    return draw_or_take


class Drawn(NamedTuple):
    pages: dict[str, str]
    """By the case."""
    errors: dict[str, str]
    recorder: Recorder


@pytest.fixture(scope="module")
def drawn() -> Iterator[Drawn]:
    """Every case of every page, what could not be drawn, and what the templates have looked up."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        found = Drawn({}, {}, Recorder(monkeypatch))
        draw_once(monkeypatch)
        for page, (options, start, draw) in PAGES.items():
            for name, inputs in cases(options, start):
                try:
                    found.pages[f"{page}: {name}"] = draw(inputs)
                except Exception as error:  # noqa: BLE001  # the test reports it with its case
                    found.errors[f"{page}: {name}"] = repr(error)
        yield found


def test_every_page_can_be_drawn_whatever_there_is_to_tell(drawn: Drawn) -> None:
    assert not drawn.errors
    assert not drawn.recorder.undefined
    assert len(drawn.pages) > 100


def test_no_page_has_loose_ends_in_any_case(drawn: Drawn) -> None:
    for case, page in drawn.pages.items():
        assert Outline(page).unclosed == [], case
        assert not re.search(r"\b(nan|inf|None|undefined)\b", re.sub(r"<[^>]*>", " ", page)), case


def test_the_cases_meet_every_look_up_of_every_template(drawn: Drawn) -> None:
    """So that the other tests say something of all of them."""
    assert len(written()) > 300
    assert written() <= drawn.recorder.met


def paths_of(mapping: Mapping[str, Any], *above: str) -> Iterator[tuple[str, ...]]:
    for name, value in mapping.items():
        yield (*above, name)
        if isinstance(value, dict):
            yield from paths_of(value, *above, name)


def without_path(mapping: Mapping[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    kept = {name: value for name, value in mapping.items() if name != path[0]}
    return kept if len(path) == 1 else {**mapping, path[0]: without_path(mapping[path[0]], path[1:])}


def test_a_page_can_be_drawn_without_any_one_thing_that_a_run_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    draw_once(monkeypatch)
    inputs = report_inputs()
    for change in (
        RUN["selection"]["repeated sources"],
        RUN["selection"]["rows left out"],
        RUN["settings"]["LoRA and sources"],
    ):
        inputs = change(inputs)
    recorded = {"config": inputs.config, "manifests": inputs.manifests}
    paths = [path for path in paths_of(recorded) if len(path) > 1]
    assert len(paths) > 60
    for path in paths:
        page = render_page(summarise(replace(inputs, **without_path(recorded, path))))
        assert not re.search(r"\b(nan|inf|None|undefined)\b", re.sub(r"<[^>]*>", " ", page)), path
