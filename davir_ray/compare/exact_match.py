"""match: generations + examples → matches/: does a generated text give the same number as the response?

The stage takes seconds and is redone when the parsing of answers changes; the generations are kept.
"""

import json
import time
from functools import partial
from typing import Any

import pyarrow as pa

from davir_ray.compare.answers import ANSWERS_VERSION, as_text, flexible_answer, strict_answer
from davir_ray.compare.generation import generated_from
from davir_ray.engine.shards import Shards, read_columns
from davir_ray.engine.shuffle import Written, collect, write_shards
from davir_ray.errors import ConfigError, IntegrityError
from davir_ray.run.files import in_folder, read_parquet, write_parquet
from davir_ray.run.folder import Run
from davir_ray.run.location import Location
from davir_ray.run.manifest import Manifest
from davir_ray.schema import MATCHES, Status

_GOLD = ["example_id", "response", "record", "response_spans"]
_COUNTED = ("examples", "expected", "strict", "flexible")
_EXPECTED_COLUMNS = ["source", "response", "record", "response_spans"]
_EXPECTED = pa.schema([("expected", pa.int64())])


def match(run: Run, *, examples: Run | None = None) -> Manifest:
    """Compare the answers in generated texts with those in the responses, as numbers, strictly and flexibly parsed.

    `examples` is the run that holds the examples whose prompts were continued (None: this one). The manifest counts the
    rows that have an expected answer and those that match it; its details hold the same counts by source.
    """
    started = time.monotonic()
    source = examples or run
    generated, _ = generated_from(run, source)
    fingerprint = {"generations": generated.content, "version": ANSWERS_VERSION}
    if done := run.completed("match", fingerprint):
        return done
    run.clear("match")
    shards = Shards(
        generated.files_in("generations"),
        lambda name: matched(read_parquet(run / "generations" / name), read_parquet(source / "examples" / name, _GOLD)),
    )
    written = write_shards(shards, partial(_write, run / "matches"))
    by_source: dict[str, dict[str, int]] = {}
    for one in written:
        sums = by_source.setdefault(one.facts["source"], dict.fromkeys(_COUNTED, 0))
        for name in sums:
            sums[name] += one.facts[name]
    counts = {name: sum(sums[name] for sums in by_source.values()) for name in _COUNTED}
    files, seconds = in_folder("matches", [one.entry for one in written]), time.monotonic() - started
    return run.commit(
        Manifest(
            stage="match",
            fingerprint=fingerprint,
            counts=counts,
            files=files,
            details={"by_source": by_source},
            seconds=seconds,
        )
    )


def check_expected(heldout: Run, sources: list[str]) -> None:
    """ConfigError if no prepared response, of these sources or of all if none is named, has an expected answer."""
    files = heldout.require("prepare").files_in("examples")
    shards = Shards(files, partial(read_columns, heldout / "examples", _EXPECTED_COLUMNS))
    counted = collect(shards, partial(_count_expected, sources=sources), _EXPECTED)
    if not sum(counted["expected"].to_pylist()):
        raise ConfigError(
            "measures has exact_match, but no held-out response of "
            f"{', '.join(sources) or 'any source'} ends in an answer (#### or \\boxed, or a number in the record's "
            "column `answer`); leave it out, or name other sources in generate.sources"
        )


def _count_expected(table: pa.Table, sources: list[str]) -> pa.Table:
    rows = [row for row in table.to_pylist() if not sources or row["source"] in sources]
    return pa.table([[sum(_expected(row) is not None for row in rows)]], schema=_EXPECTED)


def matched(generations: pa.Table, gold: pa.Table) -> pa.Table:
    """The table MATCHES; `gold` has the examples' columns _GOLD, in the row order of `generations`."""
    rows = zip(generations.to_pylist(), gold.to_pylist(), strict=True)
    return pa.Table.from_pylist([_compare(generated, example) for generated, example in rows], MATCHES)


def _compare(generated: dict[str, Any], example: dict[str, Any]) -> dict[str, Any]:
    if generated["example_id"] != example["example_id"]:
        raise IntegrityError(
            f"the text of example {generated['example_id']} is in the row of example {example['example_id']}"
        )
    expected = _expected(example)
    row = {name: generated[name] for name in ("example_id", "source", "status")}
    row["expected"] = None if expected is None else as_text(expected)
    if generated["status"] != Status.OK:
        return row
    for name, read in (("strict", strict_answer), ("flexible", flexible_answer)):
        answer = read(generated["output"])
        row[f"{name}_answer"] = None if answer is None else as_text(answer)
        row[name] = None if expected is None else answer == expected
    return row


def _expected(example: dict[str, Any]) -> Any:
    """The answer that the response marks, else the number in the record's column `answer`, else None.

    None for a conversation with several scored turns: the generated text replies to the first turn, but the answer is
    in the last.
    """
    if len(example["response_spans"]) > 2:
        return None
    if (marked := strict_answer(example["response"])) is not None or not example["record"]:
        return marked
    answer = json.loads(example["record"]).get("answer")
    return None if answer is None else flexible_answer(str(answer))


def _write(folder: Location, name: str, table: pa.Table) -> Written:
    """Write the matches of a shard, which are of one source."""
    facts = {
        "source": table["source"][0].as_py(),
        "examples": table.num_rows,
        "expected": table.num_rows - table["expected"].null_count,
        "strict": sum(table["strict"].fill_null(False).to_pylist()),
        "flexible": sum(table["flexible"].fill_null(False).to_pylist()),
    }
    return Written(write_parquet(folder / name, table), facts)
