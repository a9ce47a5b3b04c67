"""stability: how much of the selection each single run of the repeats would have selected.

The best k rows of each run, and of their mean, are found exactly: a cut is the composite key (place, example_id) of the
last of them. No row is moved but those that are among the best of some run, to be joined with the selected ones.
"""

import logging
import math
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from davir_ray.config.selection import ALIGNED, RankConfig
from davir_ray.engine.shards import Shards, read_columns
from davir_ray.engine.shuffle import Change, Round, collect, regroup
from davir_ray.formulas import order as ranking
from davir_ray.formulas.stability import agreement, beyond_chance
from davir_ray.run.files import FileEntry, in_folder, read_parquet, total_rows
from davir_ray.run.folder import Run
from davir_ray.run.manifest import Manifest
from davir_ray.stages.joins import ROWS_PER_PART, kept_share, part_of
from davir_ray.stages.rank import BIN_ROWS, count_bins, find_bins, order_keys
from davir_ray.stages.repeats import FOLDER
from davir_ray.stages.repeats import STAGE as REPEATS

log = logging.getLogger(__name__)

STAGE = "stability"

_KEYS = pa.schema({"key": pa.uint64(), "example_id": pa.int64(), "place": pa.float64()})
_SUMS = pa.schema({"name": pa.string(), "value": pa.float64()})

_SELECTED = -1
"""Instead of the number of runs that a row is among the best of: the row is selected."""

_ROW_BYTES = 24
"""Bytes of a row on the way: its id, the number of runs and the part."""

Bools = npt.NDArray[np.bool_]


class _Cut(NamedTuple):
    """The last of the best rows."""

    key: int
    example_id: int
    place: float

    def reached_by(self, keys: npt.NDArray[np.uint64], ids: npt.NDArray[np.int64]) -> Bools:
        """Whether each row is among the best."""
        key = np.uint64(self.key)
        return np.asarray((keys < key) | ((keys == key) & (ids <= self.example_id)))


def measure_stability(run: Run, config: RankConfig) -> Manifest:
    """Compare the best rows of the runs in extra/repeats/, as many as are selected; the manifest has what was found."""
    started = time.monotonic()
    repeated, selected = run.require(REPEATS), run.require("select")
    fingerprint = {"repeats": repeated.content, "selected": selected.content, "lowest": config.lowest}
    if done := run.completed(STAGE, fingerprint):
        return done
    run.clear(STAGE)
    files, runs = repeated.files_in(FOLDER), repeated.details["runs"]
    num_selected, num_rows = selected.counts["selected"], repeated.counts["repeated"]
    by_place = RankConfig(order=ALIGNED, lowest=config.lowest)
    by_run: list[Change] = [partial(_places, number) for number in range(len(runs))]
    cuts = [_cut(run, files, places, num_selected, by_place) for places in [*by_run, _means]]
    best = partial(_best, cuts[:-1], by_place)

    def sums(table: pa.Table) -> pa.Table:
        best_NR = best(table)
        common_RR = (best_NR.T.astype(np.int64) @ best_NR).ravel()
        spread, num_runs = table["place_sd"].to_numpy(), np.asarray(table["num_repeats"])
        has_spread = ~np.isnan(spread)
        degrees = (num_runs[has_spread] - 1).astype(np.float64)
        found = {f"common {pair}": value for pair, value in enumerate(common_RR)}
        found |= {"squares": (degrees * spread[has_spread] ** 2).sum(), "degrees": degrees.sum()}
        return pa.table([list(found), list(found.values())], schema=_SUMS)

    shards = Shards(files, partial(read_columns, run / FOLDER, None))
    totals = _collected(shards, sums)
    common_RR = np.array([totals[f"common {pair}"] for pair in range(len(runs) ** 2)]).reshape(len(runs), len(runs))
    place_sd = math.sqrt(totals["squares"] / totals["degrees"]) if totals["degrees"] else None
    cut = cuts[-1].place
    num_near = 0
    if place_sd is not None:
        num_near = int(_collected(shards, partial(_num_near, cut, place_sd))["near"])
    manifest = Manifest(
        stage=STAGE,
        fingerprint=fingerprint,
        counts={"selected": num_selected, "rows": num_rows, "near_cut": num_near},
        files=[],
        details={
            "runs": runs,
            **_overlap(common_RR, num_selected, num_rows),
            "times_chosen": _times_chosen(run, selected, files, best, len(runs)),
            "place_sd": place_sd,
            "cut": cut,
        },
        seconds=time.monotonic() - started,
    )
    manifest = run.commit(manifest)
    log.info("stability: %s", in_words(manifest))
    return manifest


def in_words(manifest: Manifest) -> str:
    """The stability of a selection in one line."""
    found, num_runs = manifest.details, len(manifest.details["runs"])
    always = found["times_chosen"][-1] / manifest.counts["selected"]
    chosen = (
        f"{always:.0%} of the selected rows are among the best {manifest.counts['selected']} of all {num_runs} runs"
    )
    if found["overlap"] is None:
        return f"{chosen}; every row is selected, so there is no overlap to speak of"
    low, high = found["interval"]
    return (
        f"the selections of two references overlap by {found['overlap']:.2f} beyond chance (95 % interval over the "
        f"{found['interval_over']}: {low:.2f} to {high:.2f}); {chosen}"
    )


def _overlap(common_RR: npt.NDArray[np.float64], num_selected: int, num_rows: int) -> dict[str, Any]:
    """The mean overlap with its interval, and the overlap of each pair of runs."""
    found = agreement(common_RR.astype(np.int64), num_selected, num_rows)
    chance = num_selected / num_rows
    pairs = [
        {
            "first": first,
            "second": second,
            "common": int(common_RR[first, second]),
            "overlap": None if found is None else beyond_chance(common_RR[first, second] / num_selected, chance),
        }
        for first, second in combinations(range(len(common_RR)), 2)
    ]
    return {
        "overlap": None if found is None else found.mean,
        "interval": None if found is None else [found.low, found.high],
        "interval_over": None if found is None else found.over,
        "pairs": pairs,
    }


def _places(number: int, table: pa.Table) -> pa.Table:
    """The ids of rows, and their places in one run, as the column that an order by place reads."""
    values = table["places"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    places_NR = values.reshape(table.num_rows, -1) if table.num_rows else np.empty((0, number + 1))
    return pa.table({"example_id": table["example_id"], ALIGNED: places_NR[:, number]})


def _means(table: pa.Table) -> pa.Table:
    """The ids of rows, and the means of their places, as the column that an order by place reads."""
    return pa.table({"example_id": table["example_id"], ALIGNED: table["davir_repeated"]})


def _cut(run: Run, files: list[FileEntry], places: Change, num_best: int, config: RankConfig) -> _Cut:
    """The last of the best rows by a place."""
    columns = ["example_id", "davir_repeated", "places"]
    shards = Shards(files, lambda name: places(read_columns(run / FOLDER, columns, name)))
    collected = partial(collect, shards)
    bins = find_bins(collected, total_rows(files), config, BIN_ROWS)
    ends = np.cumsum(count_bins(collected, bins))
    last = min(num_best, int(ends[-1]))  # a run may have scored fewer rows
    number = int(np.searchsorted(ends, last))
    index = last - 1 - (int(ends[number - 1]) if number else 0)

    def of_bin(table: pa.Table) -> pa.Table:
        has_place, keys, ids = order_keys(table, config)
        there = bins.numbers(keys, ids) == number
        found = table[ALIGNED].to_numpy()[has_place]
        return pa.table([keys[there], ids[there], found[there]], schema=_KEYS)

    def pick(found: pa.Table) -> pa.Table:
        at = ranking.order(np.asarray(found["key"]), np.asarray(found["example_id"]))[index]
        return found.slice(int(at), 1)

    (row,) = collected(of_bin, _KEYS, finish=pick).to_pylist()
    return _Cut(**row)


def _best(cuts: list[_Cut], config: RankConfig, table: pa.Table) -> Bools:
    """Whether each row is among the best of each run, of shape NR."""
    best_NR = np.zeros((table.num_rows, len(cuts)), bool)
    for number, cut in enumerate(cuts):
        has_place, keys, ids = order_keys(_places(number, table), config)
        best_NR[has_place, number] = cut.reached_by(keys, ids)
    return best_NR


def _collected(shards: Shards, summarise: Change) -> dict[str, float]:
    """The sums over all shards, by name, each rounded once: the tasks that read them change nothing."""
    found = collect(shards, summarise, _SUMS, finish=_added)
    return dict(zip(*found.to_pydict().values(), strict=True))


def _added(sums: pa.Table) -> pa.Table:
    names, values = np.asarray(sums["name"].to_pylist()), sums["value"].to_numpy()
    found = {str(name): math.fsum(values[names == name]) for name in np.unique(names)}
    return pa.table([list(found), list(found.values())], schema=_SUMS)


def _num_near(cut: float, place_sd: float, table: pa.Table) -> pa.Table:
    """The number of rows whose mean place is within one standard deviation of the cut."""
    near = np.abs(table["davir_repeated"].to_numpy() - cut) <= place_sd  # false for NaN
    return pa.table([["near"], [float(near.sum())]], schema=_SUMS)


def _times_chosen(
    run: Run, selected: Manifest, files: list[FileEntry], best: Callable[[pa.Table], Bools], num_runs: int
) -> list[int]:
    """The number of selected rows that are among the best of no run, of one, and so on up to all."""
    both = [*in_folder("selected", selected.files_in("selected")), *in_folder(FOLDER, files)]
    num_selected = selected.counts["selected"]
    num_sent = (1 + num_runs) * num_selected  # at most
    num_parts = 1 + num_sent // ROWS_PER_PART

    def read(name: str) -> pa.Table:
        table = read_parquet(run / name, ["example_id"] if name.startswith("selected/") else None)
        ids, times = np.asarray(table["example_id"]), np.full(table.num_rows, _SELECTED)
        if not name.startswith("selected/"):
            times = best(table).sum(axis=1)
            ids, times = ids[times > 0], times[times > 0]
        return pa.table({"example_id": ids, "times": times, "part": part_of(ids, num_parts)})

    def count(part: pa.Table) -> Counter[int]:
        ids, times = np.asarray(part["example_id"]), np.asarray(part["times"])
        is_selected = np.isin(ids, ids[times == _SELECTED]) & (times != _SELECTED)
        return Counter(times[is_selected].tolist())

    shards = Shards(both, read)
    kept = kept_share(shards, _ROW_BYTES * num_sent)
    counted = Counter[int]()
    for found in regroup(shards, lambda table: table, Round("part", num_parts, count), kept=kept):
        counted.update(found)
    return [num_selected - counted.total(), *(counted[times] for times in range(1, num_runs + 1))]
