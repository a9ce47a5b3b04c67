"""Held-out data: whether rows are left to measure on, and the models' losses and answers on them."""

from collections import Counter
from functools import partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from davir_ray.compare.copies import MAX_SAME_PROMPT, LeftOut, Reason
from davir_ray.data.reader import stable_id
from davir_ray.engine.shards import Shards, read_columns
from davir_ray.engine.shuffle import gather
from davir_ray.errors import DataError, IntegrityError
from davir_ray.run.files import read_parquet
from davir_ray.run.folder import Run
from davir_ray.run.location import each

_SOURCES = pa.schema([("source", pa.string())])

_COLUMNS = ["example_id", "content_hash", "source", "num_response_tokens", "base_nll", "reference_nll"]

_MATCH_COLUMNS = ["example_id", "expected", "strict", "flexible"]


def check_left(heldout: Run, left_out: LeftOut) -> None:
    """DataError if a held-out source has no row left to measure on; called before anything is trained."""
    rows = gather(_examples(heldout, _SOURCES), _SOURCES)
    num_rows = Counter(rows["source"].to_pylist())
    reasons: dict[str, Counter[str]] = {}
    for row in left_out.rows.select(["source", "reason"]).to_pylist():
        reasons.setdefault(row["source"], Counter())[row["reason"]] += 1
    for source, counts in sorted(reasons.items()):
        if counts.total() == num_rows[source]:
            by_reason = ", ".join(f"{reason} {counts[reason]}" for reason in Reason)
            raise DataError(
                f"all {num_rows[source]} held-out rows of {source} are in the run's training pool ({by_reason}); give "
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
    """A hash of the prompt of each held-out example, in the order of the files; equal for those that are one question.

    An empty prompt, and one of more than MAX_SAME_PROMPT examples, is no question: their hashes are of the examples.
    """
    names = [entry.name for entry in heldout.require("prepare").files_in("examples")]
    tables = each(lambda name: read_parquet(heldout / "examples" / name, ["prompt", "example_id"]), names)
    rows = pa.concat_tables(tables)
    counts = Counter(prompts := rows["prompt"].to_pylist())
    no_question = {prompt for prompt, number in counts.items() if number > MAX_SAME_PROMPT} | {""}
    hashes = [
        stable_id("example", example_id) if prompt in no_question else stable_id(prompt)
        for prompt, example_id in zip(prompts, rows["example_id"].to_pylist(), strict=True)
    ]
    return np.array(hashes, dtype=np.int64)


def read_matches(trial: Run) -> pa.Table:
    """Whether one fine-tune answers right, strictly and flexibly read, where an example has an expected answer.

    Null where nothing could be generated.
    """
    names = [entry.name for entry in trial.require("match").files_in("matches")]
    table = pa.concat_tables(each(lambda name: read_parquet(trial / "matches" / name, _MATCH_COLUMNS), names))
    return table.filter(table["expected"].is_valid())
