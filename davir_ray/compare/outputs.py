"""outputs: a model's answers to a list of instructions, in the format that AlpacaEval reads. No judge is called.

    prepare_instructions ─► examples/ without responses ─generate─► generations/ ─write_outputs─► outputs.json

outputs.json is a JSON array of {"dataset", "instruction", "output", "generator"}, one object for each instruction, in
the order of the list, ready for `alpaca_eval --model_outputs outputs.json`. AlpacaEval 0.6 (README.md, main.py and
annotators/pairwise_evaluator.py of github.com/tatsu-lab/alpaca_eval) needs `instruction` and `output`, names the model
by `generator`, and pairs the outputs of two models by `instruction` and `input`; so an input is copied unchanged.
White space around an output is stripped, as AlpacaEval's own generation does.
"""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from davir_ray.compare.generation import generated_from
from davir_ray.config.sources import Source
from davir_ray.errors import DataError, IntegrityError
from davir_ray.run.files import FileEntry, read_parquet, write_file
from davir_ray.run.folder import Run
from davir_ray.run.location import Location, each
from davir_ray.run.manifest import Manifest
from davir_ray.schema import Status
from davir_ray.stages.prepare import Preparation, prepare

OUTPUTS = "outputs.json"
SOURCE = "instructions"
"""Name of the source, and `dataset` of an instruction that has none."""

_READ_AT_A_TIME = 64
"""Shards that are read in parallel, and held in memory together."""


def prepare_instructions(
    run: Run,
    path: str,
    preparation: Preparation,
    *,
    chat: bool = False,
    written: Sequence[Location] = (),
) -> Manifest:
    """Make prompts from a list of {instruction, input?, dataset?} (JSON, JSON lines or Parquet), outputs ignored.

    The prompt is Stanford Alpaca's, or with `chat` a user's turn in the chat template. DataError if any instruction is
    rejected: AlpacaEval needs an output for all of them.
    """
    source = Source(name=SOURCE, path=path, format="messages" if chat else "alpaca")
    preparation = replace(preparation, prompts_only=True, keep_record=True)
    return prepare(run, [source], preparation, max_bad_fraction=0, written=written)


def write_outputs(run: Run, generator: str, *, examples: Run | None = None) -> Manifest:
    """Write outputs.json from a run's generated texts; `generator` is the model's name on the leaderboard.

    `examples` is the run of `prepare_instructions` (None: this one). DataError if an instruction has no text.
    """
    started = time.monotonic()
    source = examples or run
    generated, prepared = generated_from(run, source)
    fingerprint = {"generations": generated.content, "generator": generator}
    if done := run.completed("outputs", fingerprint):
        return done
    counts = generated.counts
    if counts["generated"] != counts["examples"]:
        why = ", ".join(f"{status} {counts[status]}" for status in Status if status != Status.OK and status in counts)
        raise DataError(
            f"{counts['examples'] - counts['generated']} of {counts['examples']} instructions have no text ({why}); "
            "generate on a larger device, or leave these instructions out of the list"
        )
    run.clear("outputs")
    rows = [_output(row, generator) for row in _rows(run, source, generated.files_in("generations"))]
    if len(rows) != prepared.counts["prepared"]:
        raise IntegrityError(f"{prepared.counts['prepared']} instructions were prepared but {len(rows)} have an output")
    content = (json.dumps(rows, indent=2, ensure_ascii=False) + "\n").encode()
    entry = write_file(run / OUTPUTS, content, len(rows))
    seconds = time.monotonic() - started
    return run.commit(
        Manifest(
            stage="outputs", fingerprint=fingerprint, counts={"outputs": len(rows)}, files=[entry], seconds=seconds
        )
    )


def _rows(run: Run, source: Run, shards: list[FileEntry]) -> Iterator[dict[str, Any]]:
    """Text and record of each instruction, in the order of the list: that of the shards' names and the rows in them."""
    for start in range(0, len(shards), _READ_AT_A_TIME):
        names = [shard.name for shard in shards[start : start + _READ_AT_A_TIME]]
        for rows in each(partial(_shard_rows, run, source), names):
            yield from rows


def _shard_rows(run: Run, source: Run, name: str) -> list[dict[str, Any]]:
    texts = read_parquet(run / "generations" / name, ["example_id", "output"])
    records = read_parquet(source / "examples" / name, ["example_id", "record"])
    if not texts["example_id"].equals(records["example_id"]):
        raise IntegrityError(f"{name} has other rows in generations/ than in examples/")
    return list(texts.append_column("record", records["record"]).to_pylist())


def _output(row: dict[str, Any], generator: str) -> dict[str, str]:
    record = json.loads(row["record"])
    kept = {name: record[name] for name in ("instruction", "input") if record.get(name) is not None}
    return {"dataset": record.get("dataset") or SOURCE, **kept, "output": row["output"].strip(), "generator": generator}
