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

from davir_ray.config.compare import order_of
from davir_ray.config.selection import RankConfig, SelectConfig
from davir_ray.config.training import FinetuneConfig
from davir_ray.engine.shards import Shards
from davir_ray.engine.shuffle import Written, collect, write_shards
from davir_ray.errors import ConfigError, IntegrityError
from davir_ray.formulas.hashing import sample_rows, seed_from
from davir_ray.formulas.length_matching import length_cells, matched_draw
from davir_ray.formulas.shares import proportional
from davir_ray.run.files import in_folder, read_parquet, total_rows, write_parquet
from davir_ray.run.folder import Run
from davir_ray.run.location import Location
from davir_ray.run.manifest import Manifest
from davir_ray.schema import EXAMPLES
from davir_ray.stages.rank import key_columns, order_keys, read_scores
from davir_ray.stages.select.candidates import Candidates, Choice, num_skipped
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

_OUTSIDE = "are outside the selection (outside_selection)"

_LENGTHS = {"tokens": "num_response_tokens", "prompt_tokens": "num_prompt_tokens"}
"""Names of the lengths here, and in the scores."""

_IDS = pa.schema([("example_id", pa.int64()), *((name, pa.int64()) for name in _LENGTHS)])
_ROWS = pa.schema([("group", pa.string()), *_IDS])
_KEYS = pa.schema([("group", pa.string()), ("key", pa.uint64())])
_FOUND = pa.schema([*_KEYS, *_IDS])
_IN_ORDER = [("group", "ascending"), ("key", "ascending"), ("example_id", "ascending")]


@dataclass(frozen=True, kw_only=True)
class _Matching:
    """The ranges of lengths in which random_matched has as many rows as the selection."""

    edges: list[int]
    with_prompts: bool

    def prompts(self, rows: pa.Table) -> Ints | None:
        """Prompt lengths; None where they are not matched."""
        return np.asarray(rows["prompt_tokens"]).astype(np.int64) if self.with_prompts else None

    def labels(self, rows: pa.Table) -> list[str]:
        """Group and range of each row."""
        cells = length_cells(_tokens(rows), self.prompts(rows), self.edges)
        return [f"{group}/{cell}" for group, cell in zip(rows["group"].to_pylist(), cells, strict=True)]


@dataclass(frozen=True, kw_only=True)
class RowSet:
    """A set of rows to train on."""

    number: int
    """Number of the draw, or of the run, that the rows come from."""
    examples: Run
    """Run with the rows as its prepared examples."""
    num_rows: int
    """Rows with their repeats in a mixture."""
    num_trainable: int
    """Of these, rows that can be trained on: a token precedes the first one that is scored."""
    num_response_tokens: int
    num_shared: int
    """Different rows that the first run also selected at this size."""

    def fits_batch(self, recipe: FinetuneConfig) -> bool:
        """Whether each step of a fine-tune of all weights is taken on all rows, whatever its seed.

        The seed then changes the base's dropout alone, if it has any: the packs of a batch do not depend on the order
        in which its rows were drawn.
        """
        return recipe.lora_rank is None and self.num_trainable <= recipe.batch_size


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
        """Group, example_id and lengths of the rows that the run's rule selects at a size; None: at its own.

        Every arm takes the same number of rows from a group: a group is a source if there is a mixture, else all rows
        are one group. At another size, the filters and the balance stay, and quotas and the parts of a mixture that do
        not take a whole source are scaled in proportion. ConfigError if there are too few rows.
        """
        config = self.select if size is None else self._resized(size)
        files = self.run.require("rank").files_in("ranked")
        candidates = self._candidates(config, "num_prompt_tokens")
        pools, _ = candidates.count(files, tokens=config.top_tokens is not None)
        choice = Choice(candidates, limits_by_file(pools, config))
        return collect(choice.shards(files), partial(_rows, by_source=bool(config.mixture)), _ROWS)

    def mean_tokens(self) -> dict[str, float] | None:
        """For each group the mean response tokens of the rows that an arm may take; None if not all ranks are known."""
        ranked = self.run.require("rank")
        if ranked.counts["ranked"] < ranked.counts["rankable"]:
            return None
        pools, _ = self._candidates(replace(self._filters, balance=[], quotas={})).count(ranked.files_in("ranked"))
        rows, tokens = Counter[str](), Counter[str]()
        for pool in pools:
            rows[pool.group] += pool.rows
            tokens[pool.group] += pool.tokens
        return {group: tokens[group] / number for group, number in rows.items()}

    @property
    def _filters(self) -> SelectConfig:
        """The selection's settings without what depends on the score."""
        return replace(self.select, min_score=None, max_score=None, skip_top=None)

    def _candidates(self, config: SelectConfig, *also: str) -> Candidates:
        duplicates = files_with_duplicates(self.run, self.run.require("select"))
        skipped = num_skipped(config, self.run.require("rank"))
        return Candidates(
            run=self.run,
            rank_config=self.rank,
            config=config,
            duplicates=duplicates,
            num_skipped=skipped,
            also=also,
        )

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

    def rows_of(
        self, arm: str, selection: pa.Table, draw: int, *, without: Ints | None = None, match_prompts: bool = False
    ) -> Ints:
        """Ids of the rows that an arm trains on: from each group, as many as the selection has.

        They are rows that pass the selection's filters. A drawn arm takes none of the ids in `without`, which are in
        ascending order; with `match_prompts`, random_matched has the selection's prompt lengths, too. ConfigError if
        there are too few rows.
        """
        whole = pc.is_in(selection["group"], value_set=pa.array(sorted(self.taken_whole), pa.string()))
        kept, cut = selection.filter(whole), selection.filter(pc.invert(whole))
        match arm:
            case "random_matched":
                matching = _Matching(edges=self.select.length_edges, with_prompts=match_prompts)
                cut = self._matched(cut, draw, matching, without)
            case "random":
                cut = self._best(arm, cut, RankConfig(order="random", seed=seed_from(arm, draw)), without)
            case "rho":
                cut = self._best(arm, cut, RankConfig(order="rho_sum"))
            case "lowest":
                cut = self._best(arm, cut, replace(self.rank, lowest=not self.rank.lowest, most=None))
            case _ if (order := order_of(arm)) is not None:
                cut = self._best(arm, cut, RankConfig(order=order))
        ids = np.concatenate([np.asarray(table["example_id"]).astype(np.int64) for table in (kept, cut)])
        if len(ids) != selection.num_rows or len(np.unique(ids)) != len(ids):
            raise IntegrityError(f"the arm {arm} has {len(ids)} rows, the selection {selection.num_rows}")
        return np.sort(ids)

    def _best(self, arm: str, cut: pa.Table, order: RankConfig, without: Ints | None = None) -> pa.Table:
        """The first rows of each group in the order, as many as there are in `cut`."""
        wanted = Counter(cut["group"].to_pylist())
        found = self._first(order, wanted, None, without)
        tables = []
        for group, rows in wanted.items():
            there = found.filter(pc.equal(found["group"], group)).slice(0, rows)
            if there.num_rows < rows:
                where = f" of {group}" if group else ""
                raise ConfigError(
                    f"the arm {arm} needs {rows} rows{where}, but only {there.num_rows} that pass the selection's "
                    f"filters {_OUTSIDE if without is not None else 'can be ranked by ' + order.by}; leave the arm "
                    "out, or select fewer rows"
                )
            tables.append(there)
        return pa.concat_tables([_FOUND.empty_table(), *tables])

    def _matched(self, cut: pa.Table, draw: int, matching: _Matching, without: Ints | None) -> pa.Table:
        """Rows drawn at random with the lengths of those in `cut`."""
        groups = cut["group"].to_pylist()
        pool = {label: _MATCHING_POOL * rows + _MATCHING_ROWS for label, rows in Counter(matching.labels(cut)).items()}
        order = RankConfig(order="random", seed=seed_from("random_matched", draw))
        found = self._first(order, pool, matching, without)
        of_group = np.array([label.rpartition("/")[0] for label in found["group"].to_pylist()], dtype=np.str_)
        tables = [_FOUND.empty_table()]
        for group in sorted(set(groups)):
            there = found.filter(pa.array(of_group == group))
            wanted = cut.filter(pa.array([name == group for name in groups]))
            try:
                rows = matched_draw(
                    np.asarray(there["key"]),
                    _tokens(there),
                    _tokens(wanted),
                    matching.edges,
                    prompts=matching.prompts(there),
                    wanted_prompts=matching.prompts(wanted),
                )
            except ValueError as error:
                where = f" that pass the selection's filters {_OUTSIDE}" if without is not None else ""
                raise ConfigError(f"the arm random_matched cannot be drawn: {error}{where}; leave it out") from error
            tables.append(there.take(pa.array(rows)))
        return pa.concat_tables(tables)

    def _first(
        self, order: RankConfig, wanted: Mapping[str, int], matching: _Matching | None, without: Ints | None
    ) -> pa.Table:
        """At least the first `wanted` rows of each group in an order, sorted; all rows of a group that has fewer.

        Only rows that pass the selection's filters and are not among `without` count. With `matching`, each group is
        split into ranges of length.
        """
        columns = sorted({"source", *_LENGTHS.values(), "example_id", *key_columns(order)})
        candidates = self._candidates(self._filters, *columns)
        scores = self._scores(candidates, columns, order)
        keys = partial(
            _keys,
            candidates=candidates,
            order=order,
            by_source=bool(self.select.mixture),
            matching=matching,
            without=None if without is None else ray.put(without),
        )
        share = min(1.0, _SAMPLED_KEYS / total_rows(scores.entries))
        sample = collect(scores, lambda table: keys(sample_rows(table, share, "row sets")).select(_KEYS.names), _KEYS)
        last = _cuts(sample, wanted, share)
        # Ranges of length may have so few sampled rows that their cut is far too high.
        fewest = None if matching is None else partial(_first_of, wanted)
        found = collect(scores, lambda table: _up_to(last, keys(table)), _FOUND, merge=fewest)
        there = Counter(found["group"].to_pylist())
        short = {group for group, rows in wanted.items() if there[group] < rows and last[group] < _MAX_KEY}
        if short:  # the sample put the cut too low
            last |= dict.fromkeys(short, _MAX_KEY)
            found = collect(scores, lambda table: _up_to(last, keys(table)), _FOUND, merge=fewest)
        return found.sort_by(_IN_ORDER)

    def _scores(self, candidates: Candidates, columns: list[str], order: RankConfig) -> Shards:
        """The scored rows: those of ranked/ where duplicates are dropped, which are known by their rank."""
        if not self.select.drop_duplicates:
            files = self.run.require("score").files_in("scores")
            return Shards(files, partial(read_scores, self.run, order, columns))
        if order.extra not in (None, self.rank.extra):
            raise ConfigError(
                f"{self.run} drops duplicates, which only ranked/ knows, and ranked/ has no {order.by}; give "
                f"jobs/rank.py --rank.order {order.by}, or leave the arm order:{order.by} out"
            )
        ranked = self.run.require("rank")
        if ranked.counts["ranked"] < ranked.counts["rankable"]:
            raise ConfigError(
                f"{self.run} has {ranked.counts['ranked']} of {ranked.counts['rankable']} ranks (rank.most), so which "
                "other rows are duplicates is not known; run jobs/rank.py with --rank.most null, or give --arms "
                "'[selection, full]'"
            )
        return Shards(ranked.files_in("ranked"), candidates.read)


def _keys(
    table: pa.Table,
    *,
    candidates: Candidates,
    order: RankConfig,
    by_source: bool,
    matching: _Matching | None,
    without: ray.ObjectRef[Ints] | None,
) -> pa.Table:
    """Group, key in the order, example_id and lengths of the rows that an arm may take."""
    if not table.num_rows:
        return _FOUND.empty_table()
    eligible = candidates.eligible(table)
    if without is not None:
        eligible &= ~_among(np.asarray(table["example_id"]), ray.get(without))
    table = table.filter(pa.array(eligible))
    rankable, keys, ids = order_keys(table, order)
    table = table.filter(pa.array(rankable))
    groups = table["source"] if by_source else pa.array([""] * table.num_rows, pa.string())
    lengths = [table[column] for column in _LENGTHS.values()]
    rows = pa.table([groups, pa.array(keys), pa.array(ids), *lengths], names=_FOUND.names).cast(_FOUND)
    return rows if matching is None else rows.set_column(0, "group", pa.array(matching.labels(rows), pa.string()))


def _tokens(rows: pa.Table) -> Ints:
    return np.asarray(rows["tokens"]).astype(np.int64)


def _among(ids: Ints, others: Ints) -> npt.NDArray[np.bool_]:
    """Whether each id is one of the others, which are in ascending order."""
    if not len(others):
        return np.zeros(len(ids), dtype=bool)
    places = np.minimum(np.searchsorted(others, ids), len(others) - 1)
    return np.asarray(others[places] == ids)


def _in_proportion(total: int, pools: Mapping[str, int]) -> dict[str, int]:
    """Shares of a total in proportion to the pools, which may be smaller than the total."""
    times = -(-total // sum(pools.values()))
    return proportional(total, {name: pool * times for name, pool in pools.items()})


def _rows(selected: pa.Table, by_source: bool) -> pa.Table:
    groups = selected["source"] if by_source else pa.array([""] * selected.num_rows, pa.string())
    lengths = [selected[column] for column in _LENGTHS.values()]
    return pa.table([groups, selected["example_id"], *lengths], names=_ROWS.names)


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


def _first_of(wanted: Mapping[str, int], found: pa.Table) -> pa.Table:
    """The first wanted rows of each group, sorted."""
    found = found.sort_by(_IN_ORDER).combine_chunks()
    if not found.num_rows:
        return found
    encoded = found["group"].chunk(0).dictionary_encode()
    codes, limits = np.asarray(encoded.indices), np.array([wanted[group] for group in encoded.dictionary.to_pylist()])
    starts = np.searchsorted(codes, np.arange(len(limits)))  # the codes ascend, as the groups do
    return found.filter(pa.array(np.arange(len(codes)) - starts[codes] < limits[codes]))


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
    if not pc.any(chosen).as_py():
        return EXAMPLES.empty_table()
    return read_parquet(folder / name, EXAMPLES.names).filter(chosen)  # a set of rows has no folds


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
