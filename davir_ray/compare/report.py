"""report of a comparison: the measurements of its fine-tunes → tables in Parquet, facts in JSON, and the page."""

import dataclasses
import json
import time

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from davir_ray.compare.copies import LeftOut
from davir_ray.compare.heldout import read_losses, read_matches, read_prompts
from davir_ray.compare.trials import Trial
from davir_ray.config.compare import CompareConfig, TrialName
from davir_ray.config.training import FinetuneConfig
from davir_ray.errors import TrainingError
from davir_ray.formulas.statistics import Ints
from davir_ray.models.training.loop import rows_in
from davir_ray.report.comparison import contrasts_table, results_table, summarise_comparison
from davir_ray.report.comparison_page import render_comparison
from davir_ray.report.measured import FLEXIBLE, LOSS, LOSS_BY_EXAMPLE, STRICT, ComparisonInputs, Measured, TrialFacts
from davir_ray.run.files import committed_parquet, write_file, write_parquet
from davir_ray.run.folder import Run
from davir_ray.run.manifest import Manifest

LEFT_OUT = "left_out.parquet"
"""File of the held-out rows that are not measured on; see davir_ray.compare.copies."""


def report_comparison(
    config: CompareConfig, base: str, recipe: FinetuneConfig, output: Run, trials: list[Trial],
    left_out: LeftOut,
) -> None:  # fmt: skip
    """Write the tables, the facts and the page."""
    started, heldout = time.monotonic(), trials[0].settings.heldout
    prepared = heldout.require("prepare")
    losses = {trial.name: read_losses(trial.run, heldout) for trial in trials}
    first = losses[trials[0].name]
    leaked = np.isin(np.asarray(first["example_id"]), np.asarray(left_out.rows["example_id"]))
    prompts = read_prompts(heldout)
    measures = _losses_of(losses, first, prompts, leaked) if "loss" in config.measures else []
    if "exact_match" in config.measures:
        measures += _matches_of(trials, first, prompts, leaked)
    order = [measure for wanted in config.measures for measure in measures if measure.measure.margin_of == wanted]
    facts, table = summarise_comparison(
        ComparisonInputs(
            settings=dataclasses.asdict(config),
            run=", ".join(config.runs),
            base=base,
            recipe=dataclasses.asdict(recipe),
            heldout=prepared.counts,
            in_training_pool=int(leaked.sum()),
            in_pool_by_reason=left_out.counts,
            num_pool_rows_not_read=left_out.num_not_read,
            trials={trial.name: _facts_of(trial) for trial in trials},
            pairs=config.contrasts(),
            margins=config.all_margins(),
            measures=order,
        )
    )
    facts_json = json.dumps(facts, indent=1, ensure_ascii=False, allow_nan=False)
    files = [
        committed_parquet(output / LEFT_OUT)[0],
        write_parquet(output / "comparison.parquet", table),
        write_parquet(output / "results.parquet", results_table(facts)),
        write_parquet(output / "tests.parquet", contrasts_table(facts)),
        write_file(output / "comparison.json", facts_json.encode()),
        write_file(output / "comparison.html", render_comparison(facts).encode()),
    ]
    arms = {str(trial.name): trial.run.require("trial").content for trial in trials}
    fingerprint = {"heldout": prepared.content, "arms": arms}
    seconds = time.monotonic() - started
    output.commit(
        Manifest(stage="compare", fingerprint=fingerprint, counts={"arms": len(trials)}, files=files, seconds=seconds)
    )


def _losses_of(
    losses: dict[TrialName, pa.Table], first: pa.Table, prompts: Ints, leaked: npt.NDArray[np.bool_]
) -> list[Measured]:
    """The losses of the held-out examples that no model was trained on and for which every model has one.

    They are weighted by tokens, and then by example.
    """
    base = first["base_nll"].to_numpy()
    nll = {name: table["reference_nll"].to_numpy() for name, table in losses.items()}
    for name, values in nll.items():
        if not np.isfinite(values).any():
            raise TrainingError(
                f"{name} has no finite loss on any held-out row: it diverged; lower the learning rate with --recipe, "
                "or leave the arm out of --arms"
            )
    valued = np.isfinite(np.stack([base, *nll.values()])).all(axis=0)
    kept = ~leaked & valued
    num_tokens = first["num_response_tokens"].to_numpy()[kept].astype(np.int64)
    by_token = Measured(
        measure=LOSS,
        sources=_sources(first)[kept],
        prompts=prompts[kept],
        lengths=num_tokens,
        weights=num_tokens.astype(np.float64),
        values={name: values[kept] for name, values in nll.items()},
        base=base[kept],
        without_value=int((~leaked & ~valued).sum()),
    )
    by_example = dataclasses.replace(
        by_token,
        measure=LOSS_BY_EXAMPLE,
        weights=np.ones(len(num_tokens)),
        values={name: values / num_tokens for name, values in by_token.values.items()},
        base=base[kept] / num_tokens,
    )
    return [by_token, by_example]


def _matches_of(trials: list[Trial], first: pa.Table, prompts: Ints, leaked: npt.NDArray[np.bool_]) -> list[Measured]:
    """Exact match, strict and flexible, on the held-out examples that have an expected answer."""
    found = {trial.name: read_matches(trial.run) for trial in trials}
    ids = next(iter(found.values()))["example_id"]
    rows = pc.index_in(ids, value_set=first["example_id"].combine_chunks()).to_numpy()
    valued = np.stack([np.asarray(matches["strict"].is_valid()) for matches in found.values()]).all(axis=0)
    kept = ~leaked[rows] & valued
    return [
        Measured(
            measure=measure,
            sources=_sources(first)[rows][kept],
            prompts=prompts[rows][kept],
            lengths=first["num_response_tokens"].to_numpy()[rows][kept].astype(np.int64),
            weights=np.ones(int(kept.sum())),
            values={
                name: matches[column].filter(pa.array(kept)).to_numpy().astype(np.float64)
                for name, matches in found.items()
            },
            without_value=int((~leaked[rows] & ~valued).sum()),
        )
        for measure, column in ((STRICT, "strict"), (FLEXIBLE, "flexible"))
    ]


def _sources(table: pa.Table) -> npt.NDArray[np.str_]:
    return np.asarray(table["source"].to_pylist(), dtype=np.str_)


def _facts_of(trial: Trial) -> TrialFacts:
    measured, tokens = trial.run.require("trial"), trial.examples.require("prepare").counts["num_response_tokens"]
    num_rows, num_steps = measured.counts["examples"], measured.counts["steps"]
    return TrialFacts(
        row_set=trial.rows.number,
        num_examples=num_rows,
        num_shared=trial.rows.num_shared,
        num_response_tokens=tokens,
        num_trained_tokens=round(rows_in(num_steps, num_rows, trial.recipe.batch_size) * tokens / num_rows),
        num_steps=num_steps,
        final_loss=measured.details["final_loss"],
        seconds=measured.seconds,
    )
