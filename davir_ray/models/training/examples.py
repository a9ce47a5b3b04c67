"""The training data of a fine-tune, one copy a node, and the objective that is minimised over it."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Protocol, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch

from davir_ray.errors import DataError
from davir_ray.models.kernel.likelihood import Pack
from davir_ray.models.training.arrays import ArrayFiles


class Objective(Protocol):
    """Rows to train on, and the loss: a sum over the rows of a batch, divided by the weight of the batch."""

    measures: ClassVar[tuple[str, ...]]
    """Names of the quantities that are summed over a batch; the first is the loss."""

    def __len__(self) -> int: ...

    @property
    def ids(self) -> npt.NDArray[np.int64]:
        """One number for each row, which orders rows of the same length."""

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Number of tokens of each row."""

    @property
    def longest(self) -> int:
        """Number of tokens of the longest sequence."""

    @property
    def details(self) -> dict[str, Any]:
        """Details of the objective for the manifest."""

    def weight(self, rows: npt.NDArray[np.int64]) -> int:
        """The number that sums over these rows are divided by."""

    def pack(self, rows: npt.NDArray[np.int64]) -> Pack:
        """These rows as one pack."""

    def sums(self, nll_R: torch.Tensor, rows: npt.NDArray[np.int64]) -> torch.Tensor:
        """The measures, [K], summed over these rows, whose pack has these NLLs; the first is differentiable."""


TRAINING_COLUMNS = ["example_id", "input_ids", "response_spans"]
"""Columns of examples that training reads."""

_KINDS: dict[str, type[np.generic]] = {
    "ids": np.int64,
    "tokens": np.int32,
    "token_edges": np.int64,
    "spans": np.int32,
    "span_edges": np.int64,
}


def write_examples(folder: Path, tables: Iterable[pa.Table]) -> None:
    """Write tables with TRAINING_COLUMNS as the files of a TrainingSet; one table is in memory at a time.

    Examples without a scored token are left out, and those whose first token is scored, which nothing predicts.
    DataError if none is left.
    """
    files = ArrayFiles(folder, _KINDS)
    ends = {"token_edges": 0, "span_edges": 0}
    for table in tables:
        table = table.filter(pc.greater(pc.list_value_length(table["response_spans"]), 0))
        table = table.filter(pc.greater(pc.list_element(table["response_spans"], 0), 0))
        if not table.num_rows:
            continue
        files.append("ids", table["example_id"])
        for edges, values, column in zip(ends, ("tokens", "spans"), TRAINING_COLUMNS[1:], strict=True):
            lists = table[column].combine_chunks()
            files.append(values, lists.flatten())
            edges_N1 = ends[edges] + np.cumsum([0, *np.asarray(lists.value_lengths())])
            files.append(edges, edges_N1 if ends[edges] == 0 else edges_N1[1:])
            ends[edges] = int(edges_N1[-1])
    if not ends["token_edges"]:
        raise DataError("no example can be trained on: none has a scored token that another token precedes")


@dataclass(frozen=True, kw_only=True)
class TrainingSet:
    """All examples of a run as flat arrays, mapped from files. The loss is that of the response tokens."""

    measures: ClassVar[tuple[str, ...]] = ("loss",)

    ids: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int32]
    token_edges: npt.NDArray[np.int64]
    spans: npt.NDArray[np.int32]
    span_edges: npt.NDArray[np.int64]

    @classmethod
    def mapped(cls, folder: Path) -> Self:
        """The examples that `write_examples` wrote; the folder may be removed at once."""
        return cls(**ArrayFiles(folder, _KINDS).mapped())

    @classmethod
    def of(cls, tables: Iterable[pa.Table]) -> Self:
        """The examples of tables with TRAINING_COLUMNS, in files that nobody else sees."""
        with TemporaryDirectory(prefix="davir-training-", ignore_cleanup_errors=True) as folder:
            write_examples(Path(folder), tables)
            return cls.mapped(Path(folder))

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Number of tokens of each example."""
        return np.diff(self.token_edges)

    @property
    def details(self) -> dict[str, Any]:
        """Empty: the settings describe this objective completely."""
        return {}

    @property
    def longest(self) -> int:
        """Number of tokens of the longest example."""
        return int(self.lengths.max())

    def pack(self, rows: npt.NDArray[np.int64]) -> Pack:
        """These examples as one pack."""
        return Pack.of([(self._tokens(row), self._spans(row)) for row in rows])

    def sums(self, nll_R: torch.Tensor, rows: npt.NDArray[np.int64]) -> torch.Tensor:
        """The loss in nats, summed over the pack's response tokens, [1]."""
        return nll_R.sum()[None]

    def weight(self, rows: npt.NDArray[np.int64]) -> int:
        """Number of scored tokens of these examples."""
        return sum(int(np.diff(self._spans(row).reshape(-1, 2)).sum()) for row in rows)

    def _tokens(self, row: int) -> npt.NDArray[np.int32]:
        return self.tokens[self.token_edges[row] : self.token_edges[row + 1]]

    def _spans(self, row: int) -> npt.NDArray[np.int32]:
        return self.spans[self.span_edges[row] : self.span_edges[row + 1]]
