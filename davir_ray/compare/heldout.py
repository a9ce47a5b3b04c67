"""Held-out data: which of its rows may be measured on, and what the models made of them."""

from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from davir_ray.engine.shards import Shards, read_columns
from davir_ray.engine.shuffle import collect
from davir_ray.errors import DataError, IntegrityError
from davir_ray.run.files import read_parquet
from davir_ray.run.folder import Run
from davir_ray.run.location import each

_HASHES = pa.schema([("content_hash", pa.int64())])

_LEFT = pa.schema([*_HASHES, ("source", pa.string())])

_COLUMNS = ["example_id", "content_hash", "source", "num_response_tokens", "base_nll", "reference_nll"]

_MATCH_COLUMNS = ["example_id", "expected", "strict", "flexible"]


class Losses(NamedTuple):
    """Held-out examples under one fine-tune, in the order of the files."""

    example_ids: npt.NDArray[np.int64]
    hashes: npt.NDArray[np.int64]
    """Of prompt and response."""
    sources: npt.NDArray[np.str_]
    num_tokens: npt.NDArray[np.int64]
    """Scored tokens."""
    base_nll: npt.NDArray[np.float64]
    """Nats over the response; NaN where there is no value."""
    nll: npt.NDArray[np.float64]
    """Of the fine-tuned model, likewise."""


def in_training_pool(run: Run, heldout: Run) -> npt.NDArray[np.int64]:
    """Content hashes of held-out rows that are rows of the run, too: they have been trained on."""
    own = _hashes(heldout, None)
    return np.unique(_hashes(run, np.unique(own)))


def check_left(heldout: Run, left_out: npt.NDArray[np.int64]) -> None:
    """DataError if of some held-out source nothing is left to measure on, before anything is trained."""
    files = heldout.require("prepare").files_in("examples")
    shards = Shards(files, partial(read_columns, heldout / "examples", _LEFT.names))
    rows = collect(shards, partial(_among, hashes=None), _LEFT)
    sources = np.asarray(rows["source"].to_pylist(), dtype=np.str_)
    leaked = np.isin(np.asarray(rows["content_hash"]), left_out)
    for source in np.unique(sources):
        if leaked[sources == source].all():
            raise DataError(
                f"all {int((sources == source).sum())} held-out rows of {source} are in the run's training pool; give "
                "data that the run has not seen (a data set's folder or hub name is read at its split `train`; another "
                "is chosen by `split` of heldout_sources)"
            )


def _hashes(run: Run, among: npt.NDArray[np.int64] | None) -> npt.NDArray[np.int64]:
    """Content hashes of a run's examples, or of those that are `among` some."""
    files = run.require("prepare").files_in("examples")
    shards = Shards(files, partial(read_columns, run / "examples", _HASHES.names))
    return np.asarray(collect(shards, partial(_among, hashes=among), _HASHES)["content_hash"]).astype(np.int64)


def _among(table: pa.Table, hashes: npt.NDArray[np.int64] | None) -> pa.Table:
    if hashes is None:
        return table
    return table.filter(pa.array(np.isin(np.asarray(table["content_hash"]), hashes)))


def read_losses(trial: Run, heldout: Run) -> Losses:
    """What a trial's scores/ say of the held-out examples."""
    names = [entry.name for entry in heldout.require("prepare").files_in("examples")]
    table = pa.concat_tables(each(lambda name: read_parquet(trial / "scores" / name, _COLUMNS), names))
    if table.num_rows != heldout.require("prepare").counts["prepared"]:
        raise IntegrityError(
            f"{trial / 'scores'} does not hold every held-out example; delete {trial} to train it again"
        )
    return Losses(
        example_ids=np.asarray(table["example_id"]).astype(np.int64),
        hashes=np.asarray(table["content_hash"]).astype(np.int64),
        sources=np.asarray(table["source"].to_pylist(), dtype=np.str_),
        num_tokens=np.asarray(table["num_response_tokens"]).astype(np.int64),
        base_nll=table["base_nll"].to_numpy().astype(np.float64),
        nll=table["reference_nll"].to_numpy().astype(np.float64),
    )


class Matches(NamedTuple):
    """Generated answers of one fine-tune, of the held-out examples that have an expected one."""

    example_ids: npt.NDArray[np.int64]
    strict: npt.NDArray[np.float64]
    """1 where the marked answer is the expected number, 0 where not; NaN where nothing could be generated."""
    flexible: npt.NDArray[np.float64]
    """The same of the last number."""


def read_matches(trial: Run) -> Matches:
    """What a trial's matches/ say."""
    names = [entry.name for entry in trial.require("match").files_in("matches")]
    table = pa.concat_tables(each(lambda name: read_parquet(trial / "matches" / name, _MATCH_COLUMNS), names))
    table = table.filter(table["expected"].is_valid())
    right = [table[name].cast(pa.int8()).to_numpy().astype(np.float64) for name in ("strict", "flexible")]
    return Matches(np.asarray(table["example_id"]).astype(np.int64), *right)
