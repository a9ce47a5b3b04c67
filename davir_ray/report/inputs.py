"""What the report is made of, and the rows of it that have a score."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from davir_ray.schema import Status

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Manifests = dict[str, dict[str, Any]]

MEASURES = {
    "rho_sum": ("RHO, summed over the response", "nats"),
    "rho_mean": ("RHO, mean over the response", "nats per token"),
    "davir": ("DavIR", "share of the base loss"),
}


@dataclass(frozen=True, kw_only=True)
class ReportInputs:
    """What the report is made of.

    Counts that are read from the manifests (an absent one is shown as not recorded):
    prepare: read, prepared, rejected, and each reject reason under its own name; score: scored, and each status under
    its own name; rank: ranked; select: selected. Read from details: finetune loss_by_step, a list of (step, nats per
    token); score throughput, with cumulative tokens at seconds since the stage's start; select cut, the ordering key of
    the last selected row.
    """

    config: dict[str, Any]
    """The resolved configuration, without secrets."""
    manifests: Manifests
    """Stage → its manifest; finetune is absent with an outside reference."""
    scores: pa.Table
    """The columns of schema.SCORES without the token losses, plus bool `selected`: all rows, or a uniform sample."""
    num_scored: int
    """Rows that the table stands for."""
    top: list[dict[str, Any]]
    """The best-ranked examples: rank, example_id, source, losses, prompt, response, and tokens where kept."""
    bottom: list[dict[str, Any]]
    """The worst-ranked examples, same fields."""
    rejects: pa.Table
    """A sample of the rejects, with schema.REJECTS."""
    middle: list[dict[str, Any]] = field(default_factory=list)
    """Examples around the middle rank, same fields as the best-ranked."""
    with_tokens: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Of `best`, `middle` and `worst` rank: the nearest examples whose token losses were kept, same fields."""
    planted: dict[str, Any] | None = None
    """Truth planted by the demo: note, and classes with name, share_of_all, share_of_selected, share_of_random and
    mean_davir."""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """The rows that have a score, as columns of one length."""

    source: list[str]
    length: Ints
    values: dict[str, Floats]  # by measure
    base_nll: Floats
    reference_nll: Floats
    selected: Bools
    truncated: Bools
    content_hash: Ints


def scored_rows(table: pa.Table) -> Scored:
    """Rows of the score table whose status is ok and whose DavIR is a number."""
    is_scored = pc.and_(pc.equal(table["status"], Status.OK.value), pc.is_finite(table["davir"]))
    rows = table.filter(pc.fill_null(is_scored, False))
    return Scored(
        source=[name or "" for name in rows["source"].to_pylist()],
        length=rows["num_response_tokens"].to_numpy().astype(np.int64),
        values={name: rows[name].to_numpy().astype(np.float64) for name in MEASURES},
        base_nll=rows["base_nll"].to_numpy().astype(np.float64),
        reference_nll=rows["reference_nll"].to_numpy().astype(np.float64),
        selected=pc.fill_null(rows["selected"], False).to_numpy().astype(np.bool_),
        truncated=pc.fill_null(rows["truncated"], False).to_numpy().astype(np.bool_),
        content_hash=rows["content_hash"].to_numpy().astype(np.int64),
    )


def counts_of(manifests: Manifests, stage: str) -> dict[str, int]:
    """Counts of a stage's manifest; empty where there is none."""
    return (manifests.get(stage) or {}).get("counts") or {}


def details_of(manifests: Manifests, stage: str) -> dict[str, Any]:
    """Details of a stage's manifest; empty where there is none."""
    return (manifests.get(stage) or {}).get("details") or {}
