"""Preference pairs for tests: as tables of examples/, and their losses under a frozen policy."""

from pathlib import Path
from typing import Any

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from davir_ray.config.sources import Source
from davir_ray.data.reader import ExampleReader
from davir_ray.data.records import Record, Reject
from davir_ray.data.tokens import Encoder
from davir_ray.models.checkpoint import Checkpoint
from davir_ray.models.scorer import INPUT_COLUMNS, Scorer, ScorerSettings
from davir_ray.schema import PAIRS

SOURCE = Source(name="s", path="x", format="preference")
RECORDS = [
    {"prompt": f"def {name}(self):", "chosen": " return self." + "value " * (2 + number), "rejected": f" pass {name}"}
    for number, name in enumerate(["parse", "format", "write", "read", "close", "open", "flush"])
]


def pair_table(tokenizer: PreTrainedTokenizerBase, records: list[dict[str, Any]] = RECORDS) -> pa.Table:
    """The records as prepare makes examples of them."""
    reader = ExampleReader(Encoder(tokenizer, 256), None, keep_record=False)
    found = [Record("f", number, fields) for number, fields in enumerate(records)]
    items = reader.convert(SOURCE, found)
    rows = [row for pair in items if not isinstance(pair, Reject) for row in pair]
    assert len(rows) == 2 * len(records)
    return pa.Table.from_pylist(rows, PAIRS)


def frozen_table(base: Path, examples: pa.Table) -> pa.Table:
    """Their losses under the base."""
    scorer = Scorer(Checkpoint.find(str(base)), None, ScorerSettings(precision="float32"))
    return scorer(examples.select(INPUT_COLUMNS))
