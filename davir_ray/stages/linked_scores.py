"""davir_aligned by the anchor: lines that put the scores of all references on one scale (formulas/linking.py).

The driver holds a few sums for each reference; each file of the anchor is read and summed up in a task.
"""

from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from davir_ray.engine.shards import Shards, read_columns
from davir_ray.engine.shuffle import Written, collect, write_shards
from davir_ray.errors import DataError, IntegrityError
from davir_ray.formulas import linking
from davir_ray.formulas.linking import Line, Moments
from davir_ray.formulas.scores import Floats
from davir_ray.run.files import total_rows, write_parquet
from davir_ray.run.folder import Run
from davir_ray.run.location import Location
from davir_ray.run.manifest import Manifest
from davir_ray.schema import ALIGNED, Status
from davir_ray.stages.folds import ANCHOR, ANCHORED_FOLDER, Folds, anchored_file

_MOMENTS = pa.schema([pa.field(name, pa.int64() if name == "rows" else pa.float64()) for name in Moments._fields])
_READ = ["example_id", "base_nll", "reference_nll", "status"]


def fit(run: Run, folds: Folds) -> tuple[list[Line], dict[str, Any]]:
    """The line of each reference, and the details for the manifest.

    Raises DataError if the anchor does not determine the lines: too few rows that all references have scored, or a
    reference that does not agree with the mean of all.
    """
    prepared, num_references = run.require("prepare"), folds.num_folds
    anchor = folds.files(prepared, ANCHOR)
    found = collect(
        Shards(anchor, partial(_moments_of_shard, run, num_references)),
        lambda table: table,
        _MOMENTS,
        merge=partial(_merged, num_references),
    )
    total = Moments(*map(np.asarray, found.columns))
    num_rows, num_used = total_rows(anchor), int(total.rows[0])
    instead = "rank by --rank.order davir, or prepare again with a larger --prepare.anchor (it needs --overwrite)"
    if num_used < linking.MIN_ANCHOR_ROWS:
        raise DataError(
            f"{num_used} of the anchor's {num_rows} rows were scored by all {num_references} references, too few to "
            f"link the folds by (at least {linking.MIN_ANCHOR_ROWS}); {instead}"
        )
    lines = linking.fit_lines(total)
    for fold, line in enumerate(lines):
        if not line.slope > 0:
            raise DataError(
                f"on the anchor the scores of reference {fold} do not rise with the mean of all references (slope "
                f"{line.slope:.3g} over {num_used} rows), so they cannot be linked; {instead}"
            )
    by_reference = [{"reference": fold, **line._asdict()} for fold, line in enumerate(lines)]
    return lines, {"anchor_rows": num_rows, "linked_by": num_used, "lines": by_reference}


def write_linked(run: Run, scored: Manifest, folds: Folds, lines: list[Line], folder: Location) -> list[Written]:
    """Write a file for each of scores/ with its rows in their order; each notes how many are `aligned`."""
    shards = Shards(scored.files_in("scores"), partial(_linked, run, folds, lines))
    return write_shards(shards, partial(_write_shard, folder))


def _linked(run: Run, folds: Folds, lines: list[Line], name: str) -> pa.Table:
    """The rows of a file of scores/ on the common scale; of the anchor, the mean of all references."""
    fold = folds.of_file[name]
    if fold == ANCHOR:
        ids, ratios_NK = _anchor_ratios(run, folds.num_folds, name)
        on_scale_N = ratios_NK.mean(axis=1)
    else:
        ids, ratios_N = _ratios(read_columns(run / "scores", _READ, name))
        on_scale_N = linking.on_common_scale(ratios_N, lines[fold])
    aligned = pa.array(linking.davir_of(on_scale_N), pa.float64(), from_pandas=True)  # NaN becomes null
    return pa.table([ids, aligned], schema=ALIGNED)


def _write_shard(folder: Location, name: str, rows: pa.Table) -> Written:
    num_aligned = rows.num_rows - rows["davir_aligned"].null_count
    return Written(write_parquet(folder / name, rows), {"aligned": num_aligned})


def _anchor_ratios(run: Run, num_references: int, name: str) -> tuple[pa.ChunkedArray, Floats]:
    """The ids of a file of the anchor, and the log ratios under all references; raises IntegrityError as side by side.

    NaN where a row has no score.
    """
    ids, first_N = _ratios(read_columns(run / "scores", _READ, name))
    ratios = [first_N]
    for fold in range(1, num_references):
        other = anchored_file(name, fold)
        other_ids, ratios_N = _ratios(read_columns(run / ANCHORED_FOLDER, _READ, other))
        if not other_ids.equals(ids):
            raise IntegrityError(
                f"{run / ANCHORED_FOLDER / other} and {run / 'scores' / name} do not hold the same rows; redo with "
                "--overwrite"
            )
        ratios.append(ratios_N)
    return ids, np.stack(ratios, axis=1)


def _ratios(table: pa.Table) -> tuple[pa.ChunkedArray, Floats]:
    """The ids and log ratios of rows of scores; NaN unless the status is ok."""
    ratios_N = linking.log_ratios(table["base_nll"].to_numpy(), table["reference_nll"].to_numpy())
    is_ok = table["status"].to_numpy() == Status.OK
    return table["example_id"], np.where(is_ok, ratios_N, np.nan)


def _moments_of_shard(run: Run, num_references: int, name: str) -> pa.Table:
    """The moments of the anchor's rows of a file that have a finite log ratio under all references."""
    _, ratios_NK = _anchor_ratios(run, num_references, name)
    found = linking.moments(ratios_NK[np.isfinite(ratios_NK).all(axis=1)])
    return pa.table(list(found), schema=_MOMENTS)


def _merged(num_references: int, parts: pa.Table) -> pa.Table:
    """The moments of several parts as those of one; each part has a row for each reference."""
    by_part = (np.asarray(column).reshape(-1, num_references) for column in parts.columns)
    return pa.table(list(linking.merged(Moments(*by_part))), schema=_MOMENTS)
