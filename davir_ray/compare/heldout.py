"""Held-out data: which rows may be used for measuring, and the models' losses and answers on them."""

from functools import partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from davir_ray.data.reader import stable_id
from davir_ray.engine.shards import Shards, read_columns
from davir_ray.engine.shuffle import collect, gather
from davir_ray.errors import DataError, IntegrityError
from davir_ray.run.files import read_parquet
from davir_ray.run.folder import Run
from davir_ray.run.location import each

_HASHES = pa.schema([("content_hash", pa.int64())])

_LEFT = pa.schema([*_HASHES, ("source", pa.string())])

_COLUMNS = ["example_id", "content_hash", "source", "num_response_tokens", "base_nll", "reference_nll"]

_MATCH_COLUMNS = ["example_id", "expected", "strict", "flexible"]


def in_training_pool(run: Run, heldout: Run) -> npt.NDArray[np.int64]:
    """Content hashes of held-out rows that are also rows of the run, so that they may have been trained on."""
    hashes = gather(_examples(heldout, _HASHES), _HASHES)["content_hash"].unique()
    found = collect(
        _examples(run, _HASHES), lambda table: table.filter(pc.is_in(table["content_hash"], value_set=hashes)), _HASHES
    )
    return np.unique(np.asarray(found["content_hash"]).astype(np.int64))


def check_left(heldout: Run, left_out: npt.NDArray[np.int64]) -> None:
    """DataError if a held-out source has no row left to measure on; called before anything is trained."""
    rows = gather(_examples(heldout, _LEFT), _LEFT)
    sources = np.asarray(rows["source"].to_pylist(), dtype=np.str_)
    leaked = np.isin(np.asarray(rows["content_hash"]), left_out)
    for source in np.unique(sources):
        if leaked[sources == source].all():
            raise DataError(
                f"all {int((sources == source).sum())} held-out rows of {source} are in the run's training pool; give "
                "data that the run has not seen (the folder or hub name of a data set is read from its split `train`; "
                "to read another, set `split` in heldout_sources)"
            )


def _examples(run: Run, columns: pa.Schema) -> Shards:
    files = run.require("prepare").files_in("examples")
    return Shards(files, partial(read_columns, run / "examples", columns.names))


def read_losses(trial: Run, heldout: Run) -> pa.Table:
    """Losses of one fine-tune on the held-out examples, in the order of the files, with those of the base.

    They are negative log-likelihoods of the response, in nats; null where there is no value.
    """
    prepared = heldout.require("prepare")
    names = [entry.name for entry in prepared.files_in("examples")]
    table = pa.concat_tables(each(lambda name: read_parquet(trial / "scores" / name, _COLUMNS), names))
    if table.num_rows != prepared.counts["prepared"]:
        raise IntegrityError(
            f"{trial / 'scores'} does not hold every held-out example; delete {trial} to train it again"
        )
    return table


def read_prompts(heldout: Run) -> npt.NDArray[np.int64]:
    """A hash of the prompt of each held-out example, in the order of the files."""
    names = [entry.name for entry in heldout.require("prepare").files_in("examples")]
    prompts = each(lambda name: read_parquet(heldout / "examples" / name, ["prompt"])["prompt"].to_pylist(), names)
    return np.array([stable_id(prompt) for of_shard in prompts for prompt in of_shard], dtype=np.int64)


def read_matches(trial: Run) -> pa.Table:
    """Whether one fine-tune answers right, strictly and flexibly read, where an example has an expected answer.

    Null where nothing could be generated.
    """
    names = [entry.name for entry in trial.require("match").files_in("matches")]
    table = pa.concat_tables(each(lambda name: read_parquet(trial / "matches" / name, _MATCH_COLUMNS), names))
    return table.filter(table["expected"].is_valid())
