"""Which rows of a finished run each arm of a comparison trains on, written as examples that a fine-tune reads.

The driver holds ids, keys and lengths of little more than the wanted rows, never a text. A first scan samples the keys
of the order and gives a cut before which there are almost surely enough rows; a second scan collects the rows up to it.
"""

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import ray

from davir_ray.config.selection import RankConfig, SelectConfig
from davir_ray.engine.shards import Shards, read_columns
from davir_ray.engine.shuffle import Written, collect, write_shards
from davir_ray.errors import ConfigError, IntegrityError
from davir_ray.formulas.hashing import sample_rows, seed_from
from davir_ray.formulas.length_matching import length_bins, matched_draw
from davir_ray.formulas.shares import proportional
from davir_ray.run.files import in_folder, read_parquet, total_rows, write_parquet
from davir_ray.run.folder import Run
from davir_ray.run.location import Location
from davir_ray.run.manifest import Manifest
from davir_ray.schema import EXAMPLES
from davir_ray.stages.rank import key_columns, order_keys
from davir_ray.stages.select.candidates import Candidates, Choice
from davir_ray.stages.select.duplicates import files_with_duplicates
from davir_ray.stages.select.limits import limits_by_file

log = logging.getLogger(__name__)

Ints = npt.NDArray[np.int64]

_SAMPLED_KEYS = 20_000
"""Number of rows in the sample: enough to know the place of a cut to within a hundredth of the rows."""

_MAX_KEY = 2**64 - 1

_MATCHING_POOL = 2
_MATCHING_ROWS = 500
"""In each range of lengths, matching draws from a pool of _MATCHING_POOL rows for each wanted row, plus
_MATCHING_ROWS."""

_ROWS = pa.schema([("group", pa.string()), ("example_id", pa.int64()), ("tokens", pa.int64())])
_KEYS = pa.schema([("group", pa.string()), ("key", pa.uint64())])
_FOUND = pa.schema([*_KEYS, ("example_id", pa.int64()), ("tokens", pa.int64())])


@dataclass(frozen=True)
class FinishedRun:
    """The ranked and selected run whose rows a comparison trains on."""

    run: Run
    rank: RankConfig
    select: SelectConfig

    @property
    def repeats(self) -> dict[str, int]:
        """How often the mixture repeats the rows of each source; empty without a mixture."""
        return {part.source: part.repeat for part in self.select.mixture}

    @property
    def taken_whole(self) -> set[str]:
        """Sources of which the mixture takes every row."""
        return {part.source for part in self.select.mixture if part.all}

    def selection(self, size: int | None) -> pa.Table:
        """Group, example_id and scored tokens of the rows that the run's rule selects at a size; None: at its own.

        Every arm takes the same number of rows from a group: a group is a source if there is a mixture, else all rows
        are one group. At another size, the filters and the balance stay, and quotas and the parts of a mixture that do
        not take a whole source are scaled in proportion. ConfigError if there are too few rows.
        """
        config = self.select if size is None else self._resized(size)
        files = self.run.require("rank").files_in("ranked")
        duplicates = files_with_duplicates(self.run, self.run.require("select"))
        candidates = Candidates(run=self.run, rank_config=self.rank, config=config, duplicates=duplicates)
        pools, _ = candidates.count(files)
        choice = Choice(candidates, limits_by_file(pools, config))
        return collect(choice.shards(files), partial(_rows, by_source=bool(config.mixture)), _ROWS)

    def _resized(self, size: int) -> SelectConfig:
        """The rule for another number of rows."""
        config = self.select
        if config.mixture:
            own = Counter(self.selection(None)["group"].to_pylist())
            rows = {source: count for source, count in own.items() if source not in self.taken_whole}
            if not rows:
                raise ConfigError(f"sizes is [{size}, …], but the run's mixture takes every source whole; leave it out")
            shares = _in_proportion(size, rows)
            parts = [
                part if part.all else replace(part, top_fraction=None, top_tokens=None, top_k=shares[part.source])
                for part in config.mixture
            ]
            return replace(config, mixture=parts)
        if config.quotas:
            shares = {group: rows for group, rows in _in_proportion(size, config.quotas).items() if rows}
            return replace(config, quotas=shares)
        return replace(config, top_fraction=None, top_tokens=None, min_score=None, top_k=size)

    def size_of(self, selection: pa.Table) -> int:
        """Number of rows of a selection as `sizes` counts them: without the sources that a mixture takes whole."""
        cut = [group for group in selection["group"].to_pylist() if group not in self.taken_whole]
        return len(cut) or selection.num_rows

    def rows_of(self, arm: str, selection: pa.Table, seed: int) -> Ints:
        """Ids of the rows that an arm trains on: from each group, as many as the selection has."""
        whole = pc.is_in(selection["group"], value_set=pa.array(sorted(self.taken_whole), pa.string()))
        kept, cut = selection.filter(whole), selection.filter(pc.invert(whole))
        match arm:
            case "random_matched":
                cut = self._matched(cut, seed)
            case "random":
                cut = self._best(cut, RankConfig(order="random", seed=seed_from(arm, seed)))
            case "rho":
                cut = self._best(cut, RankConfig(order="rho_sum"))
            case "lowest":
                cut = self._best(cut, replace(self.rank, lowest=not self.rank.lowest, most=None))
        ids = np.concatenate([np.asarray(table["example_id"]).astype(np.int64) for table in (kept, cut)])
        if len(ids) != selection.num_rows or len(np.unique(ids)) != len(ids):
            raise IntegrityError(f"the arm {arm} has {len(ids)} rows, the selection {selection.num_rows}")
        return np.sort(ids)

    def _best(self, cut: pa.Table, order: RankConfig) -> pa.Table:
        """The first rows of each group in the order, as many as there are in `cut`."""
        wanted = Counter(cut["group"].to_pylist())
        found = self._first(order, wanted, None)
        tables = []
        for group, rows in wanted.items():
            there = found.filter(pc.equal(found["group"], group)).slice(0, rows)
            if there.num_rows < rows:
                named = f" of {group}" if group else ""
                raise ConfigError(f"{rows} rows{named} are selected, but only {there.num_rows} have {order.order}")
            tables.append(there)
        return pa.concat_tables([_FOUND.empty_table(), *tables])

    def _matched(self, cut: pa.Table, seed: int) -> pa.Table:
        """Rows drawn at random with the lengths of those in `cut`."""
        edges = self.select.length_edges
        tokens, groups = np.asarray(cut["tokens"]).astype(np.int64), cut["group"].to_pylist()
        labels = _labelled(groups, tokens, edges)
        pool = {label: _MATCHING_POOL * rows + _MATCHING_ROWS for label, rows in Counter(labels).items()}
        order = RankConfig(order="random", seed=seed_from("random_matched", seed))
        found = self._first(order, pool, edges)
        of_group = np.array([label.rpartition("/")[0] for label in found["group"].to_pylist()], dtype=np.str_)
        tables = [_FOUND.empty_table()]
        for group in sorted(set(groups)):
            there = found.filter(pa.array(of_group == group))
            lengths = np.asarray(there["tokens"]).astype(np.int64)
            wanted = tokens[np.array([name == group for name in groups])]
            try:
                rows = matched_draw(np.asarray(there["key"]), lengths, wanted, edges)
            except ValueError as error:
                raise ConfigError(f"the arm random_matched cannot be drawn: {error}") from error
            tables.append(there.take(pa.array(rows)))
        return pa.concat_tables(tables)

    def _first(self, order: RankConfig, wanted: Mapping[str, int], edges: list[int] | None) -> pa.Table:
        """At least the first `wanted` rows of each group in an order, sorted; all rows of a group that has fewer.

        With `edges`, each group is split into ranges of length.
        """
        files = self.run.require("score").files_in("scores")
        columns = sorted({"source", "num_response_tokens", "example_id", *key_columns(order)})
        scores = Shards(files, partial(read_columns, self.run / "scores", columns))
        keys = partial(_keys, order=order, by_source=bool(self.select.mixture), edges=edges)
        share = min(1.0, _SAMPLED_KEYS / total_rows(files))
        sample = collect(scores, lambda table: keys(sample_rows(table, share, "row sets")).select(_KEYS.names), _KEYS)
        last = _cuts(sample, wanted, share)
        found = collect(scores, lambda table: _up_to(last, keys(table)), _FOUND)
        there = Counter(found["group"].to_pylist())
        short = {group for group, rows in wanted.items() if there[group] < rows and last[group] < _MAX_KEY}
        if short:  # the sample put the cut too low
            last |= dict.fromkeys(short, _MAX_KEY)
            found = collect(scores, lambda table: _up_to(last, keys(table)), _FOUND)
        return found.sort_by([("group", "ascending"), ("key", "ascending"), ("example_id", "ascending")])


def _keys(table: pa.Table, *, order: RankConfig, by_source: bool, edges: list[int] | None) -> pa.Table:
    """Group, key in the order, example_id and tokens of the rows that can be ranked."""
    rankable, keys, ids = order_keys(table, order)
    table = table.filter(pa.array(rankable))
    groups = table["source"].to_pylist() if by_source else [""] * table.num_rows
    tokens = np.asarray(table["num_response_tokens"]).astype(np.int64)
    if edges is not None:
        groups = _labelled(groups, tokens, edges)
    return pa.table([pa.array(groups, pa.string()), keys, ids, tokens], schema=_FOUND)


def _labelled(groups: list[str], tokens: Ints, edges: list[int]) -> list[str]:
    return [f"{group}/{number}" for group, number in zip(groups, length_bins(tokens, edges), strict=True)]


def _in_proportion(total: int, pools: Mapping[str, int]) -> dict[str, int]:
    """Shares of a total in proportion to the pools, which may be smaller than the total."""
    times = -(-total // sum(pools.values()))
    return proportional(total, {name: pool * times for name, pool in pools.items()})


def _rows(selected: pa.Table, by_source: bool) -> pa.Table:
    groups = selected["source"] if by_source else pa.array([""] * selected.num_rows, pa.string())
    return pa.table([groups, selected["example_id"], selected["num_response_tokens"]], names=_ROWS.names)


def _cuts(sample: pa.Table, wanted: Mapping[str, int], share: float) -> dict[str, int]:
    """For each group a key that enough of its rows are at or before; the largest key where the sample is too small."""
    groups, keys = np.array(sample["group"].to_pylist(), dtype=np.str_), np.asarray(sample["key"])
    cuts = {}
    for group, rows in wanted.items():
        there, expected = np.sort(keys[groups == group]), rows * share
        # Five standard deviations above the expected number of sampled rows among the wanted ones.
        place = int(expected if share == 1 else expected + 5 * expected**0.5 + 25)
        cuts[group] = int(there[place]) if place < len(there) else _MAX_KEY
    return cuts


def _up_to(last: Mapping[str, int], found: pa.Table) -> pa.Table:
    """The rows that are at or before the cut of their group."""
    groups, keys = found["group"].combine_chunks(), np.asarray(found["key"])
    wanted = np.zeros(found.num_rows, dtype=bool)
    for group, limit in last.items():
        wanted |= np.asarray(pc.equal(groups, group)) & (keys <= np.uint64(limit))
    return found.filter(pa.array(wanted))


def write_set(run: Run, finished: FinishedRun, ids: Ints | None) -> Manifest:
    """Write the examples with these ids, each repeated as the mixture says, as a prepared run.

    If `ids` is None, these are all examples of the mixture's sources. `trainable` counts the rows whose first scored
    token has a token before it, as training requires.
    """
    fingerprint = {
        "scores": finished.run.require("score").content,
        "ids": "all" if ids is None else sha256(ids.tobytes()).hexdigest(),
        "repeats": finished.repeats,
    }
    if done := run.completed("prepare", fingerprint):
        return done
    run.clear("prepare")
    shards = Shards(
        finished.run.require("prepare").files_in("examples"),
        partial(_read_chosen, finished.run / "examples", list(finished.repeats), ray.put(ids)),
    )
    written = write_shards(shards, partial(_write_repeated, run / "examples", finished.repeats))
    entries, num_found = [one.entry for one in written], sum(one.facts["found"] for one in written)
    if ids is not None and num_found != len(ids):
        raise IntegrityError(f"{len(ids)} rows of {finished.run} were chosen, {num_found} were found; run it again")
    num_rows = total_rows(entries)
    counts = {"read": num_rows, "prepared": num_rows, "rejected": 0}
    counts |= {name: sum(one.facts[name] for one in written) for name in ("num_response_tokens", "trainable")}
    return run.commit(
        Manifest(stage="prepare", fingerprint=fingerprint, counts=counts, files=in_folder("examples", entries))
    )


def _read_chosen(folder: Location, sources: list[str], ids: ray.ObjectRef[Ints | None], name: str) -> pa.Table:
    """The examples of a shard with these ids or, without ids, of these sources; text is read only if there are any."""
    there, wanted = read_parquet(folder / name, ["example_id", "source"]), ray.get(ids)
    if wanted is None:
        chosen = pc.is_in(there["source"], value_set=pa.array(sources, pa.string()))
    else:
        chosen = pa.array(np.isin(np.asarray(there["example_id"]), wanted))
    return read_parquet(folder / name).filter(chosen) if pc.any(chosen).as_py() else EXAMPLES.empty_table()


def _write_repeated(folder: Location, repeats: dict[str, int], name: str, chosen: pa.Table) -> Written | None:
    if not chosen.num_rows:
        return None
    times = np.array([repeats.get(source, 1) for source in chosen["source"].to_pylist()], dtype=np.int64)
    table = chosen.take(pa.array(np.repeat(np.arange(chosen.num_rows), times))).cast(EXAMPLES)
    facts = {
        "found": chosen.num_rows,
        "num_response_tokens": int(pc.sum(table["num_response_tokens"]).as_py()),
        "trainable": int((np.asarray(pc.list_element(table["response_spans"], 0)) > 0).sum()),
    }
    return Written(write_parquet(folder / name, table), facts)
