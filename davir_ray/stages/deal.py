"""deal: prepare's last step, where rows are dealt to folds or near duplicates are dropped.

    shards ─► keys/ ─► edges/ ─► components ─► by id: row, component ─► by component: fold ─► by shard ─► examples/

The shards that the tasks of prepare wrote lie in a folder of their own until the manifest is complete, so that the step
is done again as a whole after a crash. Every choice depends on ids, texts and lengths alone: the same rows get the same
folds for any number of workers and any cut of the shards.
"""

import logging
import math
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from operator import itemgetter
from typing import Any, NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from davir_ray.config.prepare import PrepareConfig
from davir_ray.config.sources import Source
from davir_ray.data.task_report import COUNTED
from davir_ray.engine.shards import Shards, grouped, read_columns
from davir_ray.engine.shuffle import Round, regroup
from davir_ray.engine.tasks import in_tasks
from davir_ray.errors import DataError, IntegrityError
from davir_ray.formulas.components import Ids, Strength
from davir_ray.formulas.dealing import Floats, by_stratum, deal, shares
from davir_ray.formulas.linking import MIN_ANCHOR_ROWS
from davir_ray.run.files import FileEntry, read_parquet, total_rows, write_parquet
from davir_ray.run.folder import Run
from davir_ray.run.location import Location
from davir_ray.schema import FOLDED_EXAMPLES
from davir_ray.stages.components import Components, Labeller
from davir_ray.stages.folds import ANCHOR, FOLDS
from davir_ray.stages.joins import (
    LENGTHS,
    NONE,
    ROWS_PER_PART,
    Texts,
    join_equal,
    join_near,
    kept_share,
    part_of,
    write_keys,
)
from davir_ray.versions import DEAL_VERSION

log = logging.getLogger(__name__)

NEAR_DUPLICATES = "near_duplicates"
"""Name of the count of dropped rows."""

_CUT_SHARE = 10
"""A component of more rows than this part of a fold is cut, unless it has at most _NEVER_CUT."""

_NEVER_CUT = 10

_LARGE_SHARE, _LARGE_ROWS = 1000, 1000
"""A component of more rows than a thousandth of a fold, and than a thousand, is dealt before all parts."""

_GROUP_BYTES = 128 * 2**20
"""Bytes on disk of several shards that one task writes again."""

_ROW_BYTES = 48
"""Bytes of a row of _ROWS."""

_DROPPED = -2
"""Instead of a fold: the row is dropped."""

_NEAR = (Strength.NEAR, Strength.NEARER, Strength.NEAREST, Strength.COPY)

_ROWS = pa.schema(
    {
        "id": pa.int64(),
        "place": pa.int64(),  # number of the group of shards; NONE: the row says a label
        "stratum": pa.int64(),
        "label": pa.int64(),
        "kept": pa.int64(),  # the row of its near duplicates that is kept
        "part": pa.int64(),
    }
)
_FOLDS = pa.schema({"id": pa.int64(), "fold": pa.int64(), "rows_of_component": pa.int64(), "place": pa.int64()})
_COUNTS = pa.schema({"label": pa.int64(), "stratum": pa.int64(), "rows": pa.int64()})


class Group(NamedTuple):
    """Neighbouring shards of one source, whose rows are written again together."""

    source: str
    shards: list[FileEntry]


@dataclass(frozen=True, kw_only=True)
class Dealt:
    """What the step wrote."""

    num_folds: int
    files: list[FileEntry]
    """Files of examples/, named relative to the run's folder."""
    of_file: dict[str, int]
    """The fold of each file, by name relative to examples/."""
    dropped: dict[str, Counter[str]]
    """By source, the `rows` that were dropped and the sums of their COUNTED columns."""
    counts: dict[str, int]
    """Numbers of components, for the manifest; see docs/selection.md."""

    @property
    def details(self) -> dict[str, Any]:
        """For prepare's manifest: what Folds reads, and the counts; nothing without folds."""
        if self.num_folds == 1:
            return {}
        found = {"num_folds": self.num_folds, "of_file": self.of_file, "rows": self.rows_by_fold, **self.counts}
        return {FOLDS: found}

    @property
    def rows_by_fold(self) -> dict[str, int]:
        """The number of rows of each fold, by its number as text."""
        rows: Counter[int] = Counter()
        for entry in self.files:
            rows[self.of_file[entry.name.removeprefix("examples/")]] += entry.rows
        return {str(fold): rows[fold] for fold in sorted(rows)}


def has_dealing(config: PrepareConfig) -> bool:
    """Whether the rows are dealt or near duplicates dropped, so that the step is needed."""
    return config.folds > 1 or config.near_duplicates == "drop"


def dealing_settings(config: PrepareConfig) -> dict[str, Any]:
    """What the dealing depends on, for prepare's fingerprint; nothing with the defaults."""
    found: dict[str, Any] = {}
    if config.folds > 1:
        by = {} if config.fold_by is None else {"by": config.fold_by}
        anchor = {"anchor": config.anchor} if config.anchor else {}
        seed = {"seed": config.fold_seed} if config.fold_seed else {}
        found["folds"] = {"number": config.folds, **by, **anchor, **seed}
    if config.near_duplicates == "drop":
        found["near_duplicates"] = "drop"
    return {**found, "deal_version": DEAL_VERSION} if found else {}


def in_groups(shards: dict[str, list[FileEntry]], config: PrepareConfig) -> list[Group]:
    """The shards of each source in groups, of which each becomes about a file a fold.

    A file has no more rows and bytes than the largest shard of its group, so a group has one shard less than there are
    folds.
    """
    max_shards = max(1, config.folds - 1)
    return [
        Group(source, group)
        for source, entries in shards.items()
        for group in grouped(entries, max_shards=max_shards, max_bytes=_GROUP_BYTES)
    ]


@dataclass(frozen=True, kw_only=True)
class Dealing:
    """The step for one run."""

    run: Run
    scratch: Location
    """Folder of intermediate files, removed before."""
    undealt: Location
    """Folder of the shards."""
    groups: list[Group]
    sources: list[Source]
    config: PrepareConfig

    def deal(self) -> Dealt:
        """Write examples/ anew from the shards."""
        self.scratch.remove()
        (self.run / "examples").remove()
        shards = [entry for group in self.groups for entry in group.shards]
        num_rows = total_rows(shards)
        texts = Texts(sources=self.sources, options=self.config, needs_text=self.config.fold_by is None or self._drops)
        log.info("prepare: dealing %d rows: reading what they say", num_rows)
        keys, found = write_keys(
            self.scratch, Shards(shards, partial(read_columns, self.undealt, texts.columns)), texts
        )
        self._check_column(found["grouped"], num_rows)
        if num_not_read := found["not_read"]:
            log.warning(
                "prepare: %d rows were rendered by a chat template, and no record is kept: their text is compared as "
                "it was rendered, with what the template adds",
                num_not_read,
            )
        counts, labels, kept = self._components(keys, num_rows)
        written = self._write(keys, labels, kept, num_rows)
        return self._summed(written, counts, num_rows)

    def _check_column(self, num_grouped: int, num_rows: int) -> None:
        """Raise DataError if no row has a value of prepare.fold_by; say how many have none."""
        if (column := self.config.fold_by) is None:
            return
        if not num_grouped:
            raise DataError(f"prepare.fold_by is {column!r}, but no row has a value in that column; correct the name")
        if num_grouped < num_rows:
            log.warning(
                "prepare: %d of %d rows have no value of %r, and are dealt on their own",
                num_rows - num_grouped,
                num_rows,
                column,
            )

    @property
    def _drops(self) -> bool:
        return self.config.near_duplicates == "drop"

    @property
    def _by_copies(self) -> bool:
        return self.config.folds > 1 and self.config.fold_by is None

    def _components(
        self, keys: list[FileEntry], num_rows: int
    ) -> tuple[dict[str, int], list[FileEntry], list[FileEntry]]:
        """Counts, the labels of the components that are dealt, and those of near duplicates."""
        if not (self._by_copies or self._drops):
            return {}, [], []
        max_rows = max(_NEVER_CUT, num_rows / (_CUT_SHARE * self.config.folds))
        names = ["prompt", "response", "copy"] if self._by_copies else ["copy"]
        log.info("prepare: dealing: looking for copies")
        joined = join_equal(self.scratch, keys, num_rows, names, max_rows)
        edges = [*joined.edges, *join_near(self.scratch, keys, num_rows)]
        counts, labels, kept = dict[str, int](), list[FileEntry](), list[FileEntry]()
        log.info("prepare: dealing: components of %d edges", total_rows(edges))
        if self._drops:
            kept = self._label("copies", _NEAR, max(_NEVER_CUT, num_rows / _CUT_SHARE), edges).labels
        if self._by_copies:
            found = self._label("components", tuple(Strength), max_rows, edges)
            labels = found.labels
            counts = {
                "cut": found.num_cut,
                "too_large": found.num_too_large,
                **{f"{name}s_not_joined": joined.num_split[name] for name in ("prompt", "response")},
            }
            for name in ("prompt", "response"):
                if number := counts[f"{name}s_not_joined"]:
                    log.warning(
                        "prepare: %d %ss are those of more than %d rows each, so their rows do not share a fold for it",
                        number, name, max_rows,
                    )  # fmt: skip
            if found.num_too_large:
                log.warning(
                    "prepare: %d components have more than %d rows and stay whole", found.num_too_large, max_rows
                )
        return counts, labels, kept

    def _label(
        self, folder: str, strengths: tuple[Strength, ...], max_rows: float, edges: list[FileEntry]
    ) -> Components:
        return Labeller(scratch=self.scratch, folder=folder, strengths=strengths, max_rows=max_rows).label(edges)

    def _write(
        self, keys: list[FileEntry], labels: list[FileEntry], kept: list[FileEntry], num_rows: int
    ) -> list["_Written"]:
        """Deal the rows and write the files of all parts."""
        place_of_shard = {
            f"keys/{entry.name}": place for place, group in enumerate(self.groups) for entry in group.shards
        }
        joins = _Joins(
            scratch=self.scratch,
            place_of_shard=place_of_shard,
            labels=frozenset(entry.name for entry in labels),
            num_parts=1 + num_rows // ROWS_PER_PART,
        )
        shards = Shards([*keys, *labels, *kept], joins.read)
        kept_bytes = kept_share(shards, _ROW_BYTES * (num_rows + total_rows(labels) + total_rows(kept)))
        join = Round("part", joins.num_parts, joins.join)
        dealer = _Dealer.of(self.config, len(self.sources) * LENGTHS)
        if joins.num_parts > 1:  # else all components are in one task
            max_rows = max(_LARGE_ROWS, num_rows / (_LARGE_SHARE * self.config.folds))
            large = Round("part", joins.num_parts, partial(_large_components, max_rows=max_rows))
            found = pa.concat_tables(
                [_COUNTS.empty_table(), *regroup(shards, _unchanged, join, large, kept=kept_bytes)]
            )
            dealer = dealer.with_large(found, joins.num_parts)
        log.info("prepare: dealing: writing examples/")
        deal_rows = Round("part", joins.num_parts, dealer.deal)
        save = Round("place", len(self.groups), partial(_save_folds, self.scratch / "folds"))
        places = regroup(shards, _unchanged, join, deal_rows, save, kept=kept_bytes)
        # In tasks of their own: those of the shuffle are as many as its few numbers need, and whole shards are read.
        return [one for _, one in sorted(in_tasks(partial(_write_group, self), sorted(places)), key=itemgetter(0))]

    def _summed(self, written: list["_Written"], counts: dict[str, int], num_rows: int) -> Dealt:
        dropped: dict[str, Counter[str]] = {}
        for one in written:
            dropped.setdefault(one.source, Counter()).update(one.dropped)
        num_dropped = sum(of_source["rows"] for of_source in dropped.values())
        dealt = Dealt(
            num_folds=self.config.folds,
            files=[replace(entry, name=f"examples/{entry.name}") for one in written for entry in one.entries],
            of_file={name: fold for one in written for name, fold in one.of_file.items()},
            dropped=dropped,
            counts={
                "components": sum(one.num_components for one in written),
                "components_of_several": sum(one.num_several for one in written),
                "largest_component": max(one.largest for one in written),
                **counts,
                **({NEAR_DUPLICATES: num_dropped} if self._drops else {}),
            },
        )
        num_written = total_rows(dealt.files)
        if num_written + num_dropped != num_rows:
            raise IntegrityError(
                f"rows were lost in the dealing: {num_rows} prepared, {num_written} written, {num_dropped} dropped"
            )
        if self.config.anchor and ANCHOR not in dealt.of_file.values():
            raise DataError(
                f"prepare.anchor is {self.config.anchor:g}, which is no row of {num_rows}; give more, or leave it out"
            )
        num_anchor = dealt.rows_by_fold.get(str(ANCHOR), 0)
        if self.config.anchor and self.config.fold_by and num_anchor < MIN_ANCHOR_ROWS:
            raise DataError(
                f"prepare.anchor is {self.config.anchor:g}, which is {num_anchor} of {num_rows} rows, too few to link "
                f"folds by (at least {MIN_ANCHOR_ROWS}, better hundreds); give more, or leave it out"
            )
        if empty := [fold for fold in range(self.config.folds) if fold not in dealt.of_file.values()]:
            by = self.config.fold_by
            raise DataError(
                f"fold {empty[0]} of {self.config.folds} has no rows: there are {dealt.counts['components']} "
                + (f"values of the column {by!r}" if by else "groups of rows that copy each other")
                + ", and each stays in one fold; take fewer folds (--prepare.folds)"
                + (", or another column" if by else "")
            )
        log.info("prepare: rows by fold %s; %s", dealt.rows_by_fold, dealt.counts)
        return dealt


def _unchanged(table: pa.Table) -> pa.Table:
    return table


@dataclass(frozen=True, kw_only=True)
class _Joins:
    """Brings rows and the labels of their components together, by id."""

    scratch: Location
    place_of_shard: dict[str, int]
    labels: frozenset[str]
    """The files of labels of components; other files that are not of keys/ have those of near duplicates."""
    num_parts: int

    def read(self, name: str) -> pa.Table:
        """A file as _ROWS."""
        if name in self.place_of_shard:
            table = read_parquet(self.scratch / name, ["example_id", "stratum", "group"])
            ids, strata, groups = (np.asarray(table[column]) for column in table.column_names)
            return self._rows(ids, place=self.place_of_shard[name], stratum=strata, label=groups)
        table = read_parquet(self.scratch / name)
        column = "label" if name in self.labels else "kept"
        return self._rows(np.asarray(table["id"]), **{column: np.asarray(table["label"])})

    def _rows(self, ids: Ids, **columns: Ids | int) -> pa.Table:
        given = {"id": ids, **columns, "part": part_of(ids, self.num_parts)}
        return pa.table([np.full(len(ids), given.get(name, NONE)) for name in _ROWS.names], schema=_ROWS)

    def join(self, part: pa.Table) -> pa.Table:
        """The rows with their labels, in the part of their component; its own id is the label of a row without one."""
        columns = {name: np.asarray(part[name]) for name in _ROWS.names}
        is_row = columns["place"] != NONE
        rows = {name: values[is_row] for name, values in columns.items()}
        order = np.argsort(rows["id"])
        rows = {name: values[order] for name, values in rows.items()}
        for name in ("label", "kept"):
            says = ~is_row & (columns[name] != NONE)
            rows[name][np.searchsorted(rows["id"], columns["id"][says])] = columns[name][says]
            rows[name] = np.where(rows[name] == NONE, rows["id"], rows[name])
        rows["part"] = part_of(rows["label"], self.num_parts)
        return pa.table([rows[name] for name in _ROWS.names], schema=_ROWS)


def _large_components(part: pa.Table, max_rows: float) -> pa.Table:
    """The rows in each stratum of the components of a part that have more than `max_rows` rows."""
    labels, strata = _kept(part)
    labels, strata, rows = by_stratum(labels, strata)
    _, component = np.unique(labels, return_inverse=True)
    is_large = np.bincount(component, weights=rows)[component] > max_rows
    return pa.table([labels[is_large], strata[is_large], rows[is_large]], schema=_COUNTS)


def _kept(part: pa.Table) -> tuple[Ids, Ids]:
    """The labels and strata of the rows that are kept."""
    is_kept = np.asarray(part["id"]) == np.asarray(part["kept"])
    return np.asarray(part["label"])[is_kept], np.asarray(part["stratum"])[is_kept]


@dataclass(frozen=True, kw_only=True)
class _Dealer:
    """Deals the components of a part, after the large ones."""

    num_folds: int
    shares_F: Floats
    labels_C: Ids
    """The large components, sorted, and their folds."""
    folds_C: Ids
    loads_FS: Floats
    """What a part begins with: its share of the rows of the large components."""
    seed: int

    @classmethod
    def of(cls, config: PrepareConfig, num_strata: int) -> Self:
        """The dealer before any component is dealt."""
        shares_F = shares(config.folds, config.anchor)
        nothing = np.empty(0, np.int64)
        loads_FS = np.zeros((len(shares_F), num_strata))
        return cls(
            num_folds=config.folds,
            shares_F=shares_F,
            labels_C=nothing,
            folds_C=nothing,
            loads_FS=loads_FS,
            seed=config.fold_seed,
        )

    def with_large(self, components: pa.Table, num_parts: int) -> Self:
        """The dealer when these components are dealt, whose rows all parts make up for."""
        labels, strata, rows = (np.asarray(components[name]) for name in _COUNTS.names)
        dealt = deal(labels, strata, rows, self.shares_F, self.loads_FS, seed=self.seed)
        return replace(self, labels_C=dealt.labels_C, folds_C=dealt.folds_C, loads_FS=dealt.loads_FS / num_parts)

    def deal(self, part: pa.Table) -> pa.Table:
        """The _FOLDS of the rows of a part, which has whole components."""
        labels, strata = _kept(part)
        is_large = np.isin(labels, self.labels_C)
        small = by_stratum(labels[~is_large], strata[~is_large])
        dealt = deal(*small, self.shares_F, self.loads_FS, seed=self.seed)
        folds = np.full(len(labels), NONE)
        folds[is_large] = self.folds_C[np.searchsorted(self.labels_C, labels[is_large])]
        folds[~is_large] = dealt.folds_C[np.searchsorted(dealt.labels_C, labels[~is_large])]
        _, firsts, sizes = np.unique(labels, return_index=True, return_counts=True)
        rows_of_component = np.zeros(len(labels), np.int64)
        rows_of_component[firsts] = sizes
        is_kept = np.asarray(part["id"]) == np.asarray(part["kept"])
        columns = {"fold": np.full(part.num_rows, _DROPPED), "rows_of_component": np.zeros(part.num_rows, np.int64)}
        columns["fold"][is_kept] = np.where(folds == self.num_folds, ANCHOR, folds)
        columns["rows_of_component"][is_kept] = rows_of_component
        return pa.table({"id": part["id"], **columns, "place": part["place"]}, schema=_FOLDS)


class _Written(NamedTuple):
    """What became of a group of shards."""

    source: str
    entries: list[FileEntry]
    of_file: dict[str, int]
    dropped: Counter[str]
    """The `rows` that were dropped and the sums of their COUNTED columns."""
    num_components: int
    """Number of components whose first row is here, of those with several rows, and the size of the largest."""
    num_several: int
    largest: int


def _save_folds(folder: Location, rows: pa.Table) -> int:
    """Write the _FOLDS of the rows of a group; returns the group's number."""
    place = int(rows["place"][0].as_py())
    write_parquet(folder / f"{place:05d}.parquet", rows)
    return place


def _write_group(dealing: Dealing, place: int) -> _Written:
    """Write the shards of a group again: a file for each fold, or several where it would be larger than a shard."""
    group, has_folds = dealing.groups[place], dealing.config.folds > 1
    rows = read_parquet(dealing.scratch / "folds" / f"{place:05d}.parquet")
    tables = [read_parquet(dealing.undealt / entry.name) for entry in group.shards]
    table, max_rows = pa.concat_tables(tables), max(one.num_rows for one in tables)
    max_bytes = max(one.nbytes for one in tables)
    order = np.argsort(np.asarray(rows["id"]))
    ids, folds = (np.asarray(rows[name])[order] for name in ("id", "fold"))
    found = np.asarray(table["example_id"])
    if not np.array_equal(np.sort(found), ids):
        raise IntegrityError(
            f"{len(ids)} of the {len(found)} rows of {group.shards[0].name} and its neighbours were dealt"
        )
    folds = folds[np.searchsorted(ids, found)]
    if has_folds:
        table = table.append_column("fold", pa.array(folds, pa.int8()))
        table = table.select([*FOLDED_EXAMPLES.names, *(name for name in table.column_names if name == "fold_key")])
    written, of_file = list[FileEntry](), dict[str, int]()
    for fold in np.unique(folds[folds != _DROPPED]).tolist():
        of_fold = table.filter(pa.array(folds == fold))
        num_files = math.ceil(max(of_fold.num_rows / max_rows, of_fold.nbytes / max_bytes))
        num_files = min(num_files, of_fold.num_rows)
        name = group.shards[0].name.removesuffix(".parquet")
        if has_folds:
            name += "-anchor" if fold == ANCHOR else f"-f{fold}"
        for number, (start, end) in enumerate(
            pairwise(of_fold.num_rows * at // num_files for at in range(num_files + 1))
        ):
            file = dealing.run / "examples" / f"{name}{f'-{number}' if number else ''}.parquet"
            written.append(write_parquet(file, of_fold.slice(start, end - start)))
            of_file[written[-1].name] = fold
    dropped = table.filter(pa.array(folds == _DROPPED))
    sums = {column: pc.sum(dropped[column]).as_py() or 0 for column in COUNTED}
    sizes = np.asarray(rows["rows_of_component"])
    return _Written(
        source=group.source,
        entries=written,
        of_file=of_file,
        dropped=Counter({"rows": dropped.num_rows, **sums}),
        num_components=int((sizes > 0).sum()),
        num_several=int((sizes > 1).sum()),
        largest=int(sizes.max()),
    )
