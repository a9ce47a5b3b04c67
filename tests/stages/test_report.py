"""What the report reads of a run: rows around the best, middle and worst rank, of every reject reason, and copies."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from made_runs import MakeScores

from davir_ray.run.files import FileEntry, in_folder, write_parquet
from davir_ray.run.folder import Run
from davir_ray.run.manifest import Manifest
from davir_ray.schema import RANKED, REJECTS
from davir_ray.stages import report
from davir_ray.stages.report import _around, _copied_texts, _sampled_rejects

NUM_ROWS, FILE_ROWS = 1000, 64


def ranked_row(rank: int, kept: bool) -> dict[str, Any]:
    empty = dict.fromkeys(RANKED.names)
    losses = {"base_token_nll": [1.0], "reference_token_nll": [0.5]} if kept else {}
    return {**empty, "rank": rank, "example_id": rank, **losses}


def write_ranked(run: Run, kept: set[int]) -> list[FileEntry]:
    files = []
    for start in range(1, NUM_ROWS + 1, FILE_ROWS):
        ranks = range(start, min(start + FILE_ROWS, NUM_ROWS + 1))
        table = pa.Table.from_pylist([ranked_row(rank, rank in kept) for rank in ranks], schema=RANKED)
        name = f"part-{start // FILE_ROWS:05d}.parquet"
        files.append(write_parquet(run / "ranked" / name, table))
    return files


def ranks_of(rows: list[dict[str, Any]]) -> list[int]:
    return [row["rank"] for row in rows]


@pytest.mark.parametrize(
    ("rank", "shown", "with_tokens"),
    [
        (1, range(1, 21), [5, 70, 131, 300]),
        (500, range(490, 510), [300, 489, 520, 700]),
        (NUM_ROWS, range(981, 1001), [520, 700, 999]),  # 489 lies further than files are read
    ],
)
def test_the_nearest_rows_are_found_across_files(
    tmp_path: Path, rank: int, shown: range, with_tokens: list[int]
) -> None:
    run = Run.at(tmp_path)
    files = write_ranked(run, kept={5, 70, 131, 300, 489, 520, 700, 999})
    plain, kept = _around(run, files, rank, 4)
    assert ranks_of(plain) == list(shown)
    assert ranks_of(kept) == with_tokens


def test_no_row_is_sought_for_its_tokens_where_none_can_be_spelt(tmp_path: Path) -> None:
    run = Run.at(tmp_path)
    plain, kept = _around(run, write_ranked(run, kept={1, 2}), 1, 0)
    assert (len(plain), kept) == (20, [])


def test_every_reason_has_its_rows_though_one_fills_the_first_files(tmp_path: Path) -> None:
    run = Run.at(tmp_path)
    reasons = [["broken_json"] * 200, ["broken_json"] * 200, ["broken_json", "wrong_type", "wrong_type"]]
    files = []
    for number, names in enumerate(reasons):
        rows = [
            {"source": "s", "source_file": f"{number}.jsonl", "source_row": row, "reason": reason, "detail": ""}
            for row, reason in enumerate(names)
        ]
        entry = write_parquet(run / "rejects" / f"part-{number}.parquet", pa.Table.from_pylist(rows, schema=REJECTS))
        files.append(FileEntry(name=f"rejects/{entry.name}", rows=entry.rows, bytes=entry.bytes, sha256=entry.sha256))
    prepared = Manifest(
        stage="prepare", fingerprint={}, counts={"read": 500, "broken_json": 401, "wrong_type": 2}, files=files
    )
    found = _sampled_rejects(run, prepared).to_pandas()
    assert found["reason"].value_counts().to_dict() == {"broken_json": 50, "wrong_type": 2}
    assert found[found["reason"] == "broken_json"]["source_file"].tolist() == ["0.jsonl"] * 50


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("max_rows", [10**6, 700])
def test_the_copies_of_a_text_are_counted_across_shards(
    make_scores: MakeScores, monkeypatch: pytest.MonkeyPatch, max_rows: int
) -> None:
    """Against pandas; in a sample every text has all of its rows, and the rows are about as many as were asked for."""
    draw = np.random.default_rng(0)
    num_rows = 3000
    frame = pd.DataFrame({"content_hash": draw.integers(0, 2**62, 1200)[draw.integers(0, 1200, num_rows)]})
    frame["selected"] = draw.random(num_rows) < 0.1
    davir: list[float | None] = [0.5] * num_rows
    for row in range(0, num_rows, 50):
        davir[row] = None
    frame = frame.assign(scored=[value is not None for value in davir])
    run = make_scores(davir, num_shards=7, content_hash=frame["content_hash"].tolist())
    chosen = frame[frame["selected"] & frame["scored"]]
    rows = pa.table(
        {"content_hash": chosen["content_hash"], "status": ["ok"] * len(chosen), "davir": [0.5] * len(chosen)}
    )
    files = [write_parquet(run / "selected" / f"part-{at:05d}.parquet", rows.slice(at * 100, 100)) for at in range(3)]
    selected = Manifest(stage="select", fingerprint={}, counts={}, files=in_folder("selected", files))
    monkeypatch.setattr(report, "MAX_ROWS", max_rows)
    found = _copied_texts(run, run.require("score"), selected).to_pandas()
    by_text = frame[frame["scored"]].groupby("content_hash")["selected"].agg(["size", "sum"]).value_counts()
    assert not found.duplicated(["copies", "selected"]).any()
    texts = {(row.copies, row.selected): row.texts for row in found.itertuples()}
    if max_rows > num_rows:
        assert texts == by_text.to_dict()
    else:
        assert texts.keys() <= by_text.to_dict().keys(), "no text with a part of its rows"
        assert (found["copies"] * found["texts"]).sum() == pytest.approx(max_rows, rel=0.2)
