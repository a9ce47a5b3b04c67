"""Connected components of rows that copy each other: which rows are compared, what joins them, where a chain is cut.

Rows are named by their 63-bit ids. An edge joins two rows and has a strength. The label of a component is its smallest
id. Shape letters: N rows or keys, E edges, V rows that have an edge, C components.
"""

from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
Strengths = npt.NDArray[np.int8]
Mask = npt.NDArray[np.bool_]


class Strength(IntEnum):
    """What joins two rows; a component that is too large loses its weakest edges first."""

    NEAR = 0  # Jaccard similarity of at least 0.7
    NEARER = 1  # 0.8
    NEAREST = 2  # 0.9
    RESPONSE = 3  # the same response
    PROMPT = 4  # the same prompt
    COPY = 5  # the same n-grams


SIMILARITIES = (0.7, 0.8, 0.9)
"""The least Jaccard similarity of NEAR, NEARER and NEAREST."""

CUTS = (Strength.NEAR, Strength.NEARER, Strength.NEAREST, Strength.RESPONSE, Strength.PROMPT)
"""The least strength of the edges that are kept, first in all components, then in those that are still too large."""


class Edges(NamedTuple):
    """Pairs of rows, the smaller id first."""

    least_E: Ids
    other_E: Ids
    strength_E: Strengths

    def where(self, mask_E: Mask) -> "Edges":
        """The edges for which the mask holds."""
        return Edges(self.least_E[mask_E], self.other_E[mask_E], self.strength_E[mask_E])


class Labelled(NamedTuple):
    """Rows of components of several rows, each with its component's label; the smallest row is its own label."""

    ids_V: Ids
    labels_V: Ids


class Cut(NamedTuple):
    """Components after those that were too large have lost edges."""

    rows: Labelled
    num_cut: int
    """Number of components that were too large with all edges."""
    num_too_large: int
    """Number of components that still are with the strongest edges alone; they stay whole."""


def strength_of(jaccard_E: npt.NDArray[np.float64]) -> Strengths:
    """The strength of near copies by their similarity, which is at least that of NEAR."""
    return (np.searchsorted(SIMILARITIES, jaccard_E, side="right") - 1).astype(np.int8)


def stars(keys_N: Ids, ids_N: Ids) -> tuple[Ids, Ids, Ids]:
    """Join the smallest id of each key with each other id of the key, so that n rows make n - 1 edges.

    Returns the smallest id of each edge, the index of its other row, and the number of rows that have its key.
    """
    order = np.lexsort((ids_N, keys_N))
    starts = np.flatnonzero(_is_first(keys_N[order]))
    sizes = np.diff(np.append(starts, len(order)))
    is_other = np.ones(len(order), bool)
    is_other[starts] = False
    return np.repeat(ids_N[order][starts], sizes)[is_other], order[is_other], np.repeat(sizes, sizes)[is_other]


def pairs_to_compare(keys_N: Ids, ids_N: Ids, copies_N: Ids, window: int) -> tuple[Ids, Ids]:
    """Pairs of ids that share a key, each once, the smaller id first.

    Of rows that are copies of each other (with equal `copies_N`) only the smallest takes part. Among the rest of a key,
    sorted by id, each is paired with the `window` before it, so that the pairs of up to window + 1 rows are complete.
    """
    order = np.lexsort((ids_N, copies_N, keys_N))
    order = order[_is_first(keys_N[order], copies_N[order])]
    order = order[np.lexsort((ids_N[order], keys_N[order]))]
    keys, ids = keys_N[order], ids_N[order]
    found = [
        (ids[:-back][same], ids[back:][same])
        for back in range(1, min(window + 1, len(ids)))
        if (same := keys[back:] == keys[:-back]).any()
    ]
    least, other = (np.concatenate(parts) for parts in zip(*found, strict=True)) if found else (ids[:0], ids[:0])
    return distinct(least, other)


def distinct(first_E: Ids, second_E: Ids) -> tuple[Ids, Ids]:
    """The different pairs of ids, sorted."""
    order = np.lexsort((second_E, first_E))
    first, second = first_E[order], second_E[order]
    is_first = _is_first(first, second)
    return first[is_first], second[is_first]


def _is_first(*sorted_N: npt.NDArray[Any]) -> Mask:
    """Whether a row of sorted columns differs from the one before it."""
    found = np.ones(len(sorted_N[0]), bool)
    found[1:] = np.any([column[1:] != column[:-1] for column in sorted_N], axis=0)
    return found


def connected(edges: Edges) -> Labelled:
    """The connected components of all edges."""
    if not len(edges.least_E):
        return Labelled(edges.least_E, edges.other_E)
    from scipy.sparse import coo_array, csgraph  # imported late: it takes a driver a second, and tasks alone need it

    ids_V, ends = np.unique(np.concatenate([edges.least_E, edges.other_E]), return_inverse=True)
    least, other = ends[: len(edges.least_E)], ends[len(edges.least_E) :]
    graph = coo_array((np.ones(len(least), bool), (least, other)), shape=(len(ids_V), len(ids_V)))
    num_components, component_V = csgraph.connected_components(graph, directed=False)
    first_C = np.zeros(num_components, np.int64)
    first_C[component_V[::-1]] = np.arange(len(ids_V))[::-1]  # the last assignment wins, which is that of the smallest
    return Labelled(ids_V, ids_V[first_C[component_V]])


def cut_components(edges: Edges, max_rows: float) -> Cut:
    """The components of the edges, where each of more than `max_rows` rows keeps only its stronger edges.

    It loses one strength of CUTS after another until its parts are small enough; at the last they stay as they are.
    """
    done: list[Labelled] = []
    num_cut = num_too_large = 0
    for strength in CUTS:
        edges = edges.where(edges.strength_E >= strength)
        rows = connected(edges)
        is_large_V = in_large(rows.labels_V, max_rows)
        num_large = len(np.unique(rows.labels_V[is_large_V]))
        edges = edges.where(np.isin(edges.least_E, rows.ids_V[is_large_V]))
        if strength == CUTS[0]:
            num_cut = num_large
        if strength == CUTS[-1]:
            num_too_large, is_large_V = num_large, np.zeros_like(is_large_V)
        done.append(Labelled(rows.ids_V[~is_large_V], rows.labels_V[~is_large_V]))
        if not num_large:
            break
    ids_V, labels_V = (np.concatenate(parts) for parts in zip(*done, strict=True))
    return Cut(Labelled(ids_V, labels_V), num_cut, num_too_large)


def in_large(labels_V: Ids, max_rows: float) -> Mask:
    """Whether each row is in a component of more than `max_rows` rows."""
    _, component_V, sizes_C = np.unique(labels_V, return_inverse=True, return_counts=True)
    return np.asarray(sizes_C[component_V] > max_rows)


def large_star(nodes_E: Ids, neighbours_E: Ids) -> tuple[Ids, Ids]:
    """One half of a step towards stars; each node has all its neighbours here. Returns edges, the larger id first.

    Every neighbour that is larger than a node is joined with the smallest among the node and its neighbours (Kiveris
    et al., 2014, "Connected Components in MapReduce and Beyond"). Connections stay as they are.
    """
    order, starts, sizes = _by_node(nodes_E)
    nodes, neighbours = nodes_E[order], neighbours_E[order]
    least = np.repeat(np.minimum(np.minimum.reduceat(neighbours, starts), nodes[starts]), sizes)
    larger = neighbours > nodes
    return distinct(neighbours[larger], least[larger])


def small_star(nodes_E: Ids, neighbours_E: Ids) -> tuple[Ids, Ids]:
    """The other half: each node has all its smaller neighbours here. Returns edges, the larger id first.

    A node and its smaller neighbours are joined with the smallest of them. Where two such steps change nothing, every
    row is joined with the smallest of its component.
    """
    order, starts, sizes = _by_node(nodes_E)
    nodes, neighbours = nodes_E[order], neighbours_E[order]
    least = np.minimum.reduceat(neighbours, starts)
    members = np.concatenate([nodes[starts], neighbours])
    least = np.concatenate([least, np.repeat(least, sizes)])
    is_other = members != least
    return distinct(members[is_other], least[is_other])


def _by_node(nodes_E: Ids) -> tuple[Ids, Ids, Ids]:
    """The order of edges by node, where each node begins, and its number of edges."""
    order = np.argsort(nodes_E, kind="stable")
    starts = np.flatnonzero(_is_first(nodes_E[order]))
    return order, starts, np.diff(np.append(starts, len(order)))
