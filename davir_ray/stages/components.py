"""Connected components of rows, from files of edges: in one task where they are few, else by the shuffle.

Both give the same labels. By the shuffle, large-star and small-star (Kiveris et al., 2014) take turns until nothing
changes; each node's edges are together in one task, and the driver holds the entries of files.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pyarrow as pa

from davir_ray.engine.shards import Shards
from davir_ray.engine.shuffle import Round, Written, regroup
from davir_ray.engine.tasks import in_tasks
from davir_ray.formulas.components import (
    CUTS,
    Edges,
    Ids,
    Strength,
    Strengths,
    cut_components,
    in_large,
    large_star,
    small_star,
)
from davir_ray.formulas.hashing import random_keys
from davir_ray.run.files import FileEntry, read_parquet, total_rows, write_parquet
from davir_ray.run.location import Location
from davir_ray.stages.joins import EDGES, NONE, ROWS_PER_PART, kept_share, part_of

EDGES_OF_A_TASK = 5_000_000
"""Edges that one task takes at once; 85 MB, and a few times as many while it works."""

LABELS = pa.schema({"id": pa.int64(), "label": pa.int64()})
"""A row of a component of several rows, and its label; the row whose id is the label need not be there."""

_ENDS = pa.schema({"node": pa.int64(), "neighbour": pa.int64(), "strength": pa.int8(), "part": pa.int64()})
"""A row of a shuffle: an edge of `node`, or with the neighbour NONE that `node` is in a component that is too large."""

_END_BYTES = 25
"""Bytes of a row of _ENDS."""


@dataclass(frozen=True, kw_only=True)
class Components:
    """The components of several rows."""

    labels: list[FileEntry]
    """Files with the schema LABELS, named relative to the scratch folder."""
    num_cut: int
    """Number of components that were too large."""
    num_too_large: int
    """Number of components that still are, joined by the strongest edges alone."""


@dataclass(frozen=True, kw_only=True)
class Labeller:
    """Finds the components of the rows that edges of these strengths join, and writes the labels to a folder."""

    scratch: Location
    folder: str
    strengths: tuple[Strength, ...]
    max_rows: float
    """Rows of a component above which it is cut."""

    def label(self, edges: list[FileEntry]) -> Components:
        """The components of the edges in these files."""
        if total_rows(edges) > EDGES_OF_A_TASK:
            return self._by_shuffle(edges)
        ((_, found),) = in_tasks(self._in_a_task, [[entry.name for entry in edges]])
        return found

    def _in_a_task(self, names: list[str]) -> Components:
        table = pa.concat_tables([EDGES.empty_table(), *(self._edges(CUTS[0], name) for name in names)])
        found = cut_components(Edges(*(np.asarray(table[name]) for name in EDGES.names)), self.max_rows)
        entry = self._write("labels", 0, pa.table(list(found.rows), schema=LABELS))
        return Components(labels=[entry], num_cut=found.num_cut, num_too_large=found.num_too_large)

    def _by_shuffle(self, edges: list[FileEntry]) -> Components:
        labels, num_cut, num_too_large = list[FileEntry](), 0, 0
        for strength in CUTS:
            stars = self._stars(edges, strength)
            written = self._finished(stars, strength)
            labels += [one.entry for one in written]
            num_large = sum(one.facts["num_large"] for one in written)
            num_cut += num_large if strength == CUTS[0] else 0
            num_too_large = num_large if strength == CUTS[-1] else 0
            if not num_large or strength == CUTS[-1]:
                break
            edges = self._within(edges, [one.facts["open"] for one in written if one.facts["open"]], strength)
        return Components(labels=labels, num_cut=num_cut, num_too_large=num_too_large)

    def _stars(self, edges: list[FileEntry], strength: Strength) -> list[FileEntry]:
        """Files of rows and the labels that edges of at least this strength give them."""
        num_parts = 1 + 2 * total_rows(edges) // ROWS_PER_PART
        entries, before = edges, (-1, -1)
        read: Callable[[str], pa.Table] = partial(self._edges, strength)
        for turn in itertools.count():
            folder = f"{strength.name}-{turn}"

            def both_ends(table: pa.Table) -> pa.Table:
                ends = [np.asarray(column) for column in table.columns[:2]]
                return _ends(np.concatenate(ends), np.concatenate(ends[::-1]), num_parts)

            def large(part: pa.Table) -> pa.Table:
                return _ends(*large_star(np.asarray(part["node"]), np.asarray(part["neighbour"])), num_parts)

            def small(part: pa.Table, folder: str = folder) -> Written:
                ids, labels = small_star(np.asarray(part["node"]), np.asarray(part["neighbour"]))
                table = pa.table([ids, labels], schema=LABELS)
                entry = self._write(folder, int(part["part"][0].as_py()), table)
                mixed = random_keys(random_keys(ids, 0).astype(np.int64) ^ labels, 0)
                return Written(entry, {"checksum": int(mixed.sum())})

            rounds = (Round("part", num_parts, large), Round("part", num_parts, small))
            shards = Shards(entries, read)
            kept = kept_share(shards, 2 * _END_BYTES * total_rows(entries))
            written = regroup(shards, both_ends, *rounds, kept=kept)
            entries, read = [one.entry for one in written], self._labels
            now = (total_rows(entries), sum(one.facts["checksum"] for one in written) % 2**64)
            if now == before:
                break
            if turn:
                (self.scratch / self.folder / f"{strength.name}-{turn - 1}").remove()
            before = now
        return entries

    def _finished(self, stars: list[FileEntry], strength: Strength) -> list[Written]:
        """Write the labels of the components that need no cut, and apart from them those that do."""
        num_parts = 1 + total_rows(stars) // ROWS_PER_PART

        def by_label(table: pa.Table) -> pa.Table:
            return table.append_column("part", pa.array(part_of(np.asarray(table["label"]), num_parts)))

        def write(part: pa.Table) -> Written:
            number, table = int(part["part"][0].as_py()), part.select(LABELS.names)
            labels = np.asarray(table["label"])
            is_large = in_large(labels, self.max_rows - 1)  # the smallest row is not among them
            num_large = len(np.unique(labels[is_large]))
            if strength == CUTS[-1]:
                is_large = np.zeros_like(is_large)
            opened = self._write("open", number, table.filter(pa.array(is_large))) if is_large.any() else None
            kept = table.filter(pa.array(~is_large))
            entry = self._write(f"labels-{strength.name}", number, kept)
            return Written(entry, {"num_large": num_large, "open": opened})

        shards = Shards(stars, self._labels)
        kept = kept_share(shards, _END_BYTES * total_rows(stars))
        return regroup(shards, by_label, Round("part", num_parts, write), kept=kept)

    def _within(self, edges: list[FileEntry], opened: list[FileEntry], strength: Strength) -> list[FileEntry]:
        """Write the edges above this strength of the components that are too large."""
        num_parts = 1 + (total_rows(edges) + total_rows(opened)) // ROWS_PER_PART
        names = {entry.name for entry in opened}

        def read(name: str) -> pa.Table:
            if name in names:
                nodes = np.unique(np.concatenate([np.asarray(column) for column in self._labels(name).columns]))
                return _ends(nodes, np.full(len(nodes), NONE), num_parts)
            table = self._edges(Strength(strength + 1), name)
            columns = [np.asarray(column) for column in table.columns]
            return _ends(columns[0], columns[1], num_parts, columns[2])

        def write(part: pa.Table) -> FileEntry:
            nodes, neighbours = np.asarray(part["node"]), np.asarray(part["neighbour"])
            is_open = np.isin(nodes, nodes[neighbours == NONE]) & (neighbours != NONE)
            table = part.select(["node", "neighbour", "strength"]).filter(pa.array(is_open)).rename_columns(EDGES.names)
            return self._write(f"edges-{strength.name}", int(part["part"][0].as_py()), table)

        shards = Shards([*edges, *opened], read)
        kept = kept_share(shards, _END_BYTES * (total_rows(edges) + total_rows(opened)))
        return regroup(shards, lambda table: table, Round("part", num_parts, write), kept=kept)

    def _edges(self, least: Strength, name: str) -> pa.Table:
        """The edges of a file that have these strengths, and at least this one."""
        table = read_parquet(self.scratch / name)
        wanted = [strength for strength in self.strengths if strength >= least]
        return table.filter(pa.array(np.isin(np.asarray(table["strength"]), wanted)))

    def _labels(self, name: str) -> pa.Table:
        return read_parquet(self.scratch / name)

    def _write(self, folder: str, number: int, table: pa.Table) -> FileEntry:
        name = f"{self.folder}/{folder}/{number:05d}.parquet"
        return replace(write_parquet(self.scratch / name, table), name=name)


def _ends(nodes: Ids, neighbours: Ids, num_parts: int, strengths: Strengths | None = None) -> pa.Table:
    strengths = np.zeros(len(nodes), np.int8) if strengths is None else strengths
    return pa.table([nodes, neighbours, strengths, part_of(nodes, num_parts)], schema=_ENDS)
