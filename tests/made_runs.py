"""Constructed runs: scores and examples with chosen values, committed as prepare and score would."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from davir_ray.run.files import in_folder, read_parquet, write_parquet
from davir_ray.run.folder import Run
from davir_ray.run.manifest import Manifest
from davir_ray.schema import EXAMPLES, IFD, SCORES

MakeScores = Callable[..., Run]
AddIfd = Callable[[Run, dict[int, float | None]], None]


def _column(values: Any, field: pa.Field) -> pa.Array:
    return pa.array(list(values), field.type, from_pandas=False)


def _table(rows: int, schema: pa.Schema, columns: dict[str, Any]) -> pa.Table:
    filled = {field.name: columns.get(field.name, [None] * rows) for field in schema}
    return pa.table({field.name: _column(filled[field.name], field) for field in schema}, schema=schema)


@pytest.fixture
def make_scores(tmp_path: Path) -> MakeScores:
    """Write scores/ and examples/ with the given columns, cut into shards, and the manifests of prepare and score."""

    def make(davir: Sequence[float | None], *, num_shards: int = 3, name: str = "run", **columns: Any) -> Run:
        run = Run.at(tmp_path / name)
        rows = len(davir)
        status = ["ok" if value is not None else "zero_base_nll" for value in davir]
        columns = {
            "example_id": range(rows),
            "num_response_tokens": [1] * rows,
            "status": status,
            **columns,
            "davir": davir,
        }
        text = {"prompt": [f"prompt {i}" for i in columns["example_id"]], "response": ["r"] * rows}
        scores = _table(rows, SCORES, columns)
        examples = _table(rows, EXAMPLES, {**columns, **text, "source_file": ["f"] * rows, "source_row": range(rows)})
        files, texts = [], []
        for number, part in enumerate(np.array_split(np.arange(rows), min(num_shards, rows))):
            place, (start, count) = f"part-{number:05d}.parquet", (int(part[0]), len(part))
            files.append(write_parquet(run / "scores" / place, scores.slice(start, count)))
            texts.append(write_parquet(run / "examples" / place, examples.slice(start, count)))
        ok = list(columns["status"]).count("ok")
        Manifest(
            stage="prepare",
            fingerprint={"made": name},
            counts={"prepared": rows, "rejected": 0},
            files=in_folder("examples", texts),
        ).write(run.folder)
        Manifest(
            stage="score",
            fingerprint={"made": name},
            counts={"examples": rows, "scored": ok, "ok": ok},
            files=in_folder("scores", files),
        ).write(run.folder)
        return run

    return make


@pytest.fixture
def add_ifd() -> AddIfd:
    """Write extra/ifd/ of a made run, with the rows of scores/ and the value of each id, and its manifest."""

    def add(run: Run, ifd: dict[int, float | None]) -> None:
        files = []
        for name in (run / "scores").names():
            ids = read_parquet(run / "scores" / name, ["example_id"])["example_id"].to_pylist()
            columns = {"example_id": ids, "ifd": [ifd[example_id] for example_id in ids]}
            files.append(write_parquet(run / "extra/ifd" / name, _table(len(ids), IFD, columns)))
        content = {"made": str(sorted(ifd.items()))}
        Manifest(stage="ifd", fingerprint=content, counts={}, files=in_folder("extra/ifd", files)).write(run.folder)

    return add
