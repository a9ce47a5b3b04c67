"""report of preference training: margins and manifests → report.html and report.json."""

import dataclasses
import time
from collections.abc import Sequence
from functools import partial

import pyarrow as pa

from davir_ray.config.align import AlignRunConfig
from davir_ray.engine.shards import Shards, read_columns
from davir_ray.engine.shuffle import collect
from davir_ray.formulas.hashing import sample_rows
from davir_ray.report.alignment import alignment_facts, parts_of, render_alignment
from davir_ray.report.sweep import Trained, sweep_table
from davir_ray.run.folder import Run
from davir_ray.run.stages import leading_to
from davir_ray.schema import MARGINS
from davir_ray.stages.report import write_report

_MOST_PAIRS = 200_000
"""That the figures of a run are computed from; of more a sample by hash, and the page says so."""


def report_margins(run: Run, config: AlignRunConfig, others: Sequence[Run]) -> None:
    """Write the page and the same facts as JSON; always redone, it takes seconds.

    `others` are finished trainings that are told beside this one.
    """
    started = time.monotonic()
    manifests = {stage: found for stage in leading_to("report") if (found := run.manifest(stage))}
    pairs = _sample(run)
    trained = [_trained(run, pairs), *(_trained(other, _sample(other)) for other in others)]
    facts = alignment_facts(
        pairs,
        run.require("margins").counts["pairs"],
        {stage: dataclasses.asdict(found) for stage, found in manifests.items()},
        dataclasses.asdict(config),
        sweep_table(trained) if others else (),
    )
    write_report(run, facts, render_alignment(facts), manifests, started)


def _trained(run: Run, pairs: pa.Table) -> Trained:
    align = run.require("align")
    return Trained(str(run), align.fingerprint, align.details, parts_of(pairs))


def _sample(run: Run) -> pa.Table:
    """MARGINS of the run, all rows or a sample by hash, in an order that is always the same, as their sums then are."""
    margins = run.require("margins")
    share = min(1.0, _MOST_PAIRS / margins.counts["pairs"])
    draw = partial(sample_rows, share=share, purpose="report", id_column="pair_id")
    shards = Shards(margins.files_in("margins"), partial(read_columns, run / "margins", None))
    return collect(shards, draw, MARGINS).sort_by("pair_id")
