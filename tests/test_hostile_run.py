"""Three thousand hostile rows through the whole chain: each ends once, as a score, a status or a reject."""

from collections import Counter
from pathlib import Path

import hostile
import numpy as np
import pandas as pd
import pytest
from drivers import content_of

from davir_ray.config.prepare import PrepareConfig
from davir_ray.config.run import RunConfig
from davir_ray.config.scoring import ScoreConfig
from davir_ray.config.selection import SelectConfig
from davir_ray.config.sources import Source
from davir_ray.data.reader import stable_id
from davir_ray.pipeline import run_all
from davir_ray.run.folder import Run
from davir_ray.schema import RejectReason, Status

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session")]

NUM_LINES = 3_000


def test_every_row_of_a_hostile_corpus_ends_once(base_folder: Path, reference_folder: Path, tmp_path: Path) -> None:
    expected = hostile.write_corpus(tmp_path / "data", seed=7, num_lines=NUM_LINES)
    config = RunConfig(
        output=str(tmp_path / "run"),
        base=str(base_folder),
        reference=str(reference_folder),
        sources=[Source(name="s", path=str(tmp_path / "data"), format="alpaca")],
        max_bad_fraction=1,
        prepare=PrepareConfig(max_tokens=256, shard_rows=500),
        score=ScoreConfig(num_actors=1),
        select=SelectConfig(top_fraction=0.1, drop_duplicates=True, jsonl=True),
    )
    run = run_all(config)
    tables = content_of(run)
    scores, rejects, examples = tables["scores"], tables["rejects"], tables["examples"]
    assert len(scores) + len(rejects) == expected
    places = Counter(zip(examples["source_file"], examples["source_row"], strict=True))
    places.update(zip(rejects["source_file"], rejects["source_row"], strict=True))
    assert set(places.values()) == {1}
    ids = [stable_id("s", *place) for place in zip(examples["source_file"], examples["source_row"], strict=True)]
    assert scores["example_id"].tolist() == ids
    assert set(rejects["reason"]) <= set(RejectReason)
    assert rejects["detail"].str.len().min() > 0
    check_scores(scores)
    check_books(run, len(scores), len(rejects))
    written = {path.relative_to(tmp_path / "run").parts[0] for path in (tmp_path / "run").rglob("*")}
    assert written <= {"examples", "rejects", "scores", "ranked", "selected", "duplicates", "jsonl", "manifests"} | {
        "config.yaml", "progress.json", "report.html", "report.json",
    }  # fmt: skip


def check_scores(scores: pd.DataFrame) -> None:
    """A score is a finite number of an example that is ok, and there is no other."""
    ok = scores["status"] == Status.OK
    assert set(scores["status"]) <= set(Status)
    assert np.isfinite(scores.loc[ok, ["davir", "base_nll", "reference_nll"]].to_numpy()).all()
    assert scores.loc[~ok, "davir"].isna().all()
    assert ok.sum() > NUM_LINES / 5


def check_books(run: Run, num_scores: int, num_rejects: int) -> None:
    prepared = run.manifest("prepare")
    assert prepared is not None
    assert (prepared.counts["read"], prepared.counts["rejected"]) == (num_scores + num_rejects, num_rejects)
