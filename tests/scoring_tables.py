"""Tables that a scorer takes, from the tokens and the scored spans of each example."""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from davir_ray.models.scorer import INPUT_COLUMNS
from davir_ray.schema import EXAMPLES


def scoring_table(examples: Sequence[tuple[Any, Sequence[int]]], first_id: int = 0) -> pa.Table:
    """One row for each (input_ids, response_spans); the ids of the rows are not in order."""
    counts = [sum(spans[1::2]) - sum(spans[::2]) for _, spans in examples]
    rows = [
        {
            "example_id": (first_id + row) * 7919 % 10007,
            "content_hash": row,
            "source": "drawn",
            "num_prompt_tokens": len(ids) - count,
            "num_response_tokens": count,
            "truncated": row % 5 == 0,
            "input_ids": ids,
            "response_spans": spans,
        }
        for row, ((ids, spans), count) in enumerate(zip(examples, counts, strict=True))
    ]
    return pa.Table.from_pylist(rows, pa.schema([EXAMPLES.field(name) for name in INPUT_COLUMNS]))
