"""report of preference training: margins and manifests → report.html and report.json."""

import dataclasses
import time
from collections.abc import Sequence
from functools import partial

import pyarrow as pa

from davir_ray.config.align import AlignRunConfig
from davir_ray.engine.shards import Shards, read_columns
from davir_ray.report.alignment import Trained, alignment_facts, measured_pairs, render_alignment, sweep_table
from davir_ray.run.folder import Run
from davir_ray.run.stages import leading_to
from davir_ray.schema import MARGINS
from davir_ray.stages.report import MAX_ROWS, sampled, write_report


def report_margins(run: Run, config: AlignRunConfig, others: Sequence[Run]) -> None:
    """Write the page and the same facts as JSON; always redone, as it takes seconds.

    `others` are finished trainings that the page compares with this one.
    """
    started = time.monotonic()
    manifests = run.manifests(leading_to("report"))
    pairs = _pairs(run)
    trained = [_trained(run, pairs), *(_trained(other, _pairs(other)) for other in others)]
    facts = alignment_facts(
        pairs,
        run.require("margins").counts["pairs"],
        {stage: dataclasses.asdict(found) for stage, found in manifests.items()},
        dataclasses.asdict(config),
        sweep_table(trained) if others else (),
    )
    made_of = {stage: found.content for stage, found in manifests.items()}
    write_report(run, facts, render_alignment(facts), made_of, started)


def _trained(run: Run, pairs: pa.Table) -> Trained:
    align = run.require("align")
    return Trained(place=str(run), fingerprint=align.fingerprint, details=align.details, pairs=measured_pairs(pairs))


def _pairs(run: Run) -> pa.Table:
    """MARGINS of the run, all rows or a sample of them, always in the same order: their sums depend on it."""
    margins = run.require("margins")
    shards = Shards(margins.files_in("margins"), partial(read_columns, run / "margins", None))
    return sampled(shards, MARGINS, min(1.0, MAX_ROWS / margins.counts["pairs"]))
