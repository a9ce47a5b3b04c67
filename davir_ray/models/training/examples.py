"""The training data of a fine-tune, in the memory of each worker, and the objective that is minimised over it."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Protocol, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch

from davir_ray.errors import DataError
from davir_ray.models.kernel.likelihood import Pack


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

_TRAINING_SCHEMA = pa.schema(
    [
        pa.field("example_id", pa.int64()),
        # 64-bit offsets: a corpus may have more than 2**31 tokens.
        pa.field("input_ids", pa.large_list(pa.int32())),
        pa.field("response_spans", pa.large_list(pa.int32())),
    ]
)


@dataclass(frozen=True, kw_only=True)
class TrainingSet:
    """All examples of a run in memory, as flat arrays: 4 bytes per token. The loss is that of the response tokens."""

    measures: ClassVar[tuple[str, ...]] = ("loss",)

    ids: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int32]
    token_edges: npt.NDArray[np.int64]
    spans: npt.NDArray[np.int32]
    span_edges: npt.NDArray[np.int64]

    @classmethod
    def of(cls, tables: Iterable[pa.Table]) -> Self:
        """Read tables with TRAINING_COLUMNS; examples whose first scored token nothing predicts are left out."""
        table = pa.concat_tables([table.select(TRAINING_COLUMNS) for table in tables]).cast(_TRAINING_SCHEMA)
        table = table.filter(pc.greater(pc.list_value_length(table["response_spans"]), 0))
        table = table.filter(pc.greater(pc.list_element(table["response_spans"], 0), 0))
        if not table.num_rows:
            raise DataError("no example can be trained on: none has a scored token that another token precedes")
        tokens, spans = (table[name].combine_chunks() for name in TRAINING_COLUMNS[1:])
        return cls(
            ids=np.asarray(table["example_id"]),
            tokens=tokens.flatten().to_numpy(),
            token_edges=_edges(tokens),
            spans=spans.flatten().to_numpy(),
            span_edges=_edges(spans),
        )

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


def _edges(lists: pa.LargeListArray) -> npt.NDArray[np.int64]:
    lengths = np.asarray(lists.value_lengths()).astype(np.int64)
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
