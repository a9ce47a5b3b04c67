"""report of preference training: margins and manifests → report.html and report.json."""

import dataclasses
import time
from collections.abc import Sequence
from functools import partial

import numpy as np
import pyarrow as pa

from davir_ray.config.align import AlignRunConfig
from davir_ray.engine.shards import Shards, read_columns
from davir_ray.engine.shuffle import collect
from davir_ray.formulas.hashing import drawn
from davir_ray.report.alignment import alignment_facts, parts_of, render_alignment
from davir_ray.report.sweep import Trained, sweep_table
from davir_ray.run.folder import Run
from davir_ray.run.stages import leading_to
from davir_ray.schema import MARGINS
from davir_ray.stages.report import write_report

_MAX_PAIRS = 200_000
"""Pairs that the numbers of a run are computed from; of more pairs a sample by hash is used, and the page says so."""


def report_margins(run: Run, config: AlignRunConfig, others: Sequence[Run]) -> None:
    """Write the page, and the same facts as JSON. The stage takes seconds and is always redone.

    `others` are finished trainings that this one is compared with.
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
    return Trained(place=str(run), fingerprint=align.fingerprint, details=align.details, parts=parts_of(pairs))


def _sample(run: Run) -> pa.Table:
    """All rows of the run's margins, or a sample by hash; sorted, so that sums over them are always the same."""
    margins = run.require("margins")
    draw = partial(_draw, share=min(1.0, _MAX_PAIRS / margins.counts["pairs"]))
    shards = Shards(margins.files_in("margins"), partial(read_columns, run / "margins", None))
    return collect(shards, draw, MARGINS).sort_by("pair_id")


def _draw(table: pa.Table, share: float) -> pa.Table:
    return table.filter(pa.array(drawn(np.asarray(table["pair_id"]), share, "report")))
