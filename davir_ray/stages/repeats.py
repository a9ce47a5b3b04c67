"""repeats: the scores of several runs of the same rows → extra/repeats/, the mean place of each row.

    scores/ of each run ─► places ─by id─► one row for all runs ─by shard─► extra/repeats/

A repeat is a finished run of its own with another reference (finetune.seed) or another deal (prepare.fold_seed). A
row's place in a run is davir_aligned where the run has folds, else the same for all of its rows: the share of the
scored rows below it, and half of the row itself. Where davir_aligned is linked by an anchor, and so no place, a row has
its place among all by that.
"""

import json
import logging
import time
from collections.abc import Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from davir_ray.config.selection import RankConfig
from davir_ray.engine.shards import Shards, read_columns, read_side_by_side
from davir_ray.engine.shuffle import Round, Written, collect, regroup
from davir_ray.errors import ConfigError, DataError, IntegrityError, OutputError
from davir_ray.formulas.hashing import random_keys
from davir_ray.formulas.stability import over_references
from davir_ray.run.access import check_readable
from davir_ray.run.files import in_folder, total_rows, write_parquet
from davir_ray.run.folder import Run
from davir_ray.run.location import Location
from davir_ray.run.manifest import Manifest, differences
from davir_ray.run.storage_errors import user_errors
from davir_ray.schema import REPEATS
from davir_ray.stages.aligned_scores import FOLDER as ALIGNED_FOLDER
from davir_ray.stages.aligned_scores import LINKED, PLACE, WAY, align_shards
from davir_ray.stages.aligned_scores import STAGE as ALIGNED
from davir_ray.stages.folds import Folds
from davir_ray.stages.joins import NONE, ROWS_PER_PART, kept_share, part_of

log = logging.getLogger(__name__)

STAGE = "repeats"
FOLDER = f"extra/{STAGE}"
PLACES = f"{FOLDER}_places"
"""Folder of the places in runs that have none, until they are joined."""

_ROW_BYTES = 56
"""Bytes of a row of _ROWS."""

_NOT_OF_ROWS = ("shard_rows", "keep_record", "deal_version")
"""What a fingerprint of prepare has, and the rows do not depend on."""

_SUM = pa.schema({"sum": pa.uint64()})

_ROWS = pa.schema(
    {
        "part": pa.int64(),
        "example_id": pa.int64(),
        "content_hash": pa.int64(),
        "place": pa.float64(),
        "run": pa.int64(),
        "shard": pa.int64(),  # number of the shard of this run; NONE: the row is another run's
        "row": pa.int64(),
    }
)


def open_repeats(run: Run, places: Sequence[str]) -> list[Run]:
    """The runs of rank.repeats, each complete; raises ConfigError or OutputError for what is no other finished run."""
    check_readable([(place, OutputError) for place in places])
    repeats = list[Run]()
    for place in places:
        with user_errors(f"rank.repeats {place}", OutputError):
            other = Run(Location.of(place if "://" in place else Path(place).expanduser().resolve()))
        if str(other) in map(str, [run, *repeats]):
            raise ConfigError(f"rank.repeats has {place}, which is the run itself or given twice; give other runs")
        for stage, manifest in _manifests(other).items():
            if damage := manifest.damage(other.folder):
                raise OutputError(f"rank.repeats: the {stage} stage of {other} has damaged files: {damage[0]}")
        repeats.append(other)
    return repeats


def check_prepared(run: Run, repeats: Sequence[Run]) -> None:
    """Raise OutputError unless each repeat was prepared as the run was; to be called before anything slow begins."""
    own = _rows_of(run)
    for other in repeats:
        _check_same(run, other, own, _rows_of(other))


def check_repeats(run: Run, repeats: Sequence[Run]) -> None:
    """Raise OutputError unless each repeat has scored the same rows under the same base, by a reference of its own."""
    check_prepared(run, repeats)
    own = {"base": run.require("score").fingerprint["base"]}
    for other in repeats:
        _check_same(run, other, own, {"base": other.require("score").fingerprint["base"]})
        if not other.require("score").counts["scored"]:
            raise OutputError(f"rank.repeats: no row of {other} has a score; leave it out")
    for one, other in combinations([run, *repeats], 2):
        weights = [each.require("score").fingerprint["reference"] for each in (one, other)]
        trained = _trained_by(one)
        if weights[0] == weights[1] or (trained is not None and trained == _trained_by(other)):
            raise _same_reference(one, other)


def check_recipe(run: Run, repeats: Sequence[Run], recipe: dict[str, Any]) -> None:
    """Raise OutputError if the reference that the run is about to train would be that of a repeat, or was for it."""
    for other in repeats:
        if _trained_by(other) == (json.loads(json.dumps(recipe)), _deal_of(run)):
            raise _same_reference(run, other)


def repeat_scores(run: Run, repeats: Sequence[Run]) -> Manifest:
    """Write extra/repeats/, whose rows are in the order of scores/.

    The mean is over the runs that have scored the row; where none has, it is null.
    """
    started = time.monotonic()
    check_repeats(run, repeats)
    runs = [run, *repeats]
    manifests = [_manifests(each) for each in runs]
    if len({found[ALIGNED].details.get(WAY, PLACE) for found in manifests if ALIGNED in found}) > 1:
        raise OutputError(
            f"rank.repeats: of {', '.join(map(str, runs))} some are linked by their anchor and some are not; give the "
            "commands of jobs/score.py of those that are not again"
        )
    fingerprint = {"runs": [{name: found.content for name, found in of_run.items()} for of_run in manifests]}
    if done := run.completed(STAGE, fingerprint):
        return done
    _check_rows(run, repeats)
    run.clear(STAGE)
    scored = run.require("score")
    own_shards = scored.files_in("scores")
    parts = _Parts(
        runs=runs,
        places=[_placed(each, run / PLACES / str(number)) for number, each in enumerate(runs)],
        shard_of={entry.name: number for number, entry in enumerate(own_shards)},
        num_parts=1 + len(runs) * total_rows(own_shards) // ROWS_PER_PART,
    )
    entries = [
        entry
        for number, each in enumerate(runs)
        for entry in in_folder(str(number), each.require("score").files_in("scores"))
    ]
    shards = Shards(entries, parts.read)
    back = Round("shard", len(own_shards), partial(_write_shard, run / FOLDER, [entry.name for entry in own_shards]))
    written: list[Written] = regroup(
        shards,
        lambda table: table,
        Round("part", parts.num_parts, partial(_joined, [str(each) for each in runs])),
        back,
        kept=kept_share(shards, _ROW_BYTES * total_rows(entries)),
    )
    (run / PLACES).remove()
    files = sorted((one.entry for one in written), key=lambda entry: entry.name)
    if total_rows(files) != scored.counts["examples"]:
        raise IntegrityError(f"{scored.counts['examples']} rows were scored but {total_rows(files)} have repeats")
    manifest = Manifest(
        stage=STAGE,
        fingerprint=fingerprint,
        counts={
            "examples": scored.counts["examples"],
            "runs": len(runs),
            **{name: sum(one.facts[name] for one in written) for name in ("repeated", "in_all_runs")},
        },
        files=in_folder(FOLDER, files),
        details={"runs": [str(each) for each in runs]},
        seconds=time.monotonic() - started,
    )
    manifest = run.commit(manifest)
    log.info("repeats: %s", manifest.counts)
    return manifest


def _trained_by(run: Run) -> tuple[Any, Any] | None:
    """What tells the references of runs with the same rows and base apart: recipe and deal; None: it trained none."""
    trained = run.manifest("finetune")
    return None if trained is None else (trained.fingerprint["recipe"], _deal_of(run))


def _deal_of(run: Run) -> Any:
    return run.require("prepare").fingerprint.get("folds")


def _same_reference(run: Run, other: Run) -> OutputError:
    return OutputError(
        f"rank.repeats: {other} was scored with the same reference as {run}, so it repeats nothing; score with another "
        "finetune.seed, or deal with another prepare.fold_seed"
    )


def _check_rows(run: Run, repeats: Sequence[Run]) -> None:
    """Raise DataError unless all runs have the same ids with the same texts: by sums of hashes, made in tasks."""
    own = _sum_of_rows(run)
    for other in repeats:
        if _sum_of_rows(other) != own:
            raise DataError(
                f"rank.repeats: {other} does not hold the rows of {run}: some have another id or another text; give "
                "runs of the same data"
            )


def _sum_of_rows(run: Run) -> int:
    """A sum over the rows that another row, or another text of a row, changes; modulo 2**64."""

    def summed(table: pa.Table) -> pa.Table:
        ids, texts = (np.asarray(table[name]) for name in ("example_id", "content_hash"))
        both = random_keys(ids, 0) ^ random_keys(texts, 1)
        return pa.table([[random_keys(both.view(np.int64), 2).sum(dtype=np.uint64)]], schema=_SUM)

    def added(sums: pa.Table) -> pa.Table:
        return pa.table([[np.asarray(sums["sum"]).sum(dtype=np.uint64)]], schema=_SUM)

    read = partial(read_columns, run / "scores", ["example_id", "content_hash"])
    found = collect(Shards(run.require("score").files_in("scores"), read), summed, _SUM, merge=added, finish=added)
    return int(found["sum"][0].as_py())


def _manifests(run: Run) -> dict[str, Manifest]:
    """The stages of a run that its places are from; raises OutputError if one is not complete."""
    found = {"score": run.require("score")}
    if Folds.of(run.require("prepare")) is None:
        return found
    aligned = run.manifest(ALIGNED)
    if aligned is None:
        raise OutputError(
            f"rank.repeats: {run} has no complete {ALIGNED_FOLDER} (its log says why); rank it again, or leave it out"
        )
    return {**found, ALIGNED: aligned}


def _check_same(run: Run, other: Run, own: dict[str, Any], found: dict[str, Any]) -> None:
    if changed := differences(own, found):
        raise OutputError(
            f"rank.repeats: {other} is no repeat of {run} ({'; '.join(changed[:3])}); give runs of the same data, "
            "base and settings of prepare (but prepare.fold_seed)"
        )


def _rows_of(run: Run) -> dict[str, Any]:
    """What the rows of a run are made of, and their number.

    The files of the data are not in it: they may lie elsewhere, and what the rows say is compared one by one.
    """
    prepared = run.require("prepare")
    made = {name: value for name, value in prepared.fingerprint.items() if name not in _NOT_OF_ROWS}
    made["sources"] = {
        name: {key: value for key, value in source.items() if key != "files"}
        for name, source in made.get("sources", {}).items()
    }
    if "folds" in made:
        made["folds"] = {name: value for name, value in made["folds"].items() if name != "seed"}
    return {"examples": prepared.counts["prepared"], "prepare": made}


def _placed(run: Run, scratch: Location) -> Location:
    """The folder with the places of a run's rows, written to `scratch` where it has none."""
    aligned = _manifests(run).get(ALIGNED)
    if aligned is not None and aligned.details.get(WAY) != LINKED:
        return run / ALIGNED_FOLDER
    order = RankConfig(order="davir" if aligned is None else "davir_aligned")
    align_shards(run, run.require("score").files_in("scores"), scratch, order)
    return scratch


class _Parts:
    """Reads the shards of all runs, as number of the run/name, with the part that each row is joined in."""

    def __init__(self, *, runs: list[Run], places: list[Location], shard_of: dict[str, int], num_parts: int) -> None:
        self.num_parts = num_parts
        self._runs, self._places, self._shard_of = runs, places, shard_of

    def read(self, name: str) -> pa.Table:
        """The _ROWS of a shard."""
        number, _, shard = name.partition("/")
        of_run = int(number)
        columns = ["example_id", "content_hash"]
        found = read_side_by_side(self._runs[of_run] / "scores", columns, self._places[of_run], [ALIGNED], shard)
        ids, num_rows = np.asarray(found["example_id"]), found.num_rows
        columns_of_rows = [
            part_of(ids, self.num_parts),
            ids,
            found["content_hash"],
            found[ALIGNED],
            np.full(num_rows, of_run),
            np.full(num_rows, NONE if of_run else self._shard_of[shard]),
            np.arange(num_rows),
        ]
        return pa.table(columns_of_rows, names=_ROWS.names).cast(_ROWS)


def _joined(names: list[str], part: pa.Table) -> pa.Table:
    """The rows of this run with the places of all; raises IntegrityError if a run does not have the same rows."""
    runs = np.asarray(part["run"])
    by_run = [part.filter(pa.array(runs == number)).sort_by("example_id") for number in range(len(names))]
    own, *others = (table.select(["example_id", "content_hash"]) for table in by_run)
    for name, other in zip(names[1:], others, strict=True):
        if not own.equals(other):
            raise IntegrityError(f"{name} and {names[0]} do not hold the same rows, although their sums are equal")
    places_NR = np.column_stack([table["place"].to_numpy() for table in by_run])
    found = over_references(places_NR)
    lists = pa.ListArray.from_arrays(
        np.arange(0, places_NR.size + 1, len(names), dtype=np.int32), pa.array(places_NR.ravel(), from_pandas=True)
    )
    columns = [
        by_run[0]["example_id"],
        pa.array(found.mean_N, from_pandas=True),
        pa.array(found.sd_N, from_pandas=True),
        found.num_N,
        lists,
    ]
    return pa.table([by_run[0]["shard"], by_run[0]["row"], *columns], names=["shard", "row", *REPEATS.names])


def _write_shard(folder: Location, names: list[str], rows: pa.Table) -> Written:
    """Write the file of one shard, its rows in the order of scores/."""
    table = rows.sort_by("row").select(REPEATS.names).cast(REPEATS)
    num_repeats = np.asarray(table["num_repeats"])
    num_runs = len(table["places"][0])
    facts = {"repeated": int((num_repeats > 0).sum()), "in_all_runs": int((num_repeats == num_runs).sum())}
    return Written(write_parquet(folder / names[int(rows["shard"][0].as_py())], table), facts)
