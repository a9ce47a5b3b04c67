"""The job of an export: selected/, mixture/ or every ranked row → the files of a trainer, and what it loads them by.

<output>/
  data/          the rows, at most 50,000 in a file: JSON lines, or Parquet
  rejects/       rows that cannot be put into the trainer's form, with the reason of each, if there are any
  README.md      the data set card: what was selected, how, from what
  load.py, axolotl.yaml or dataset_info.json    what the trainer needs
  export.json    what was exported; complete at the end
"""

import json
import logging
from collections import Counter
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from davir_ray.config.export import ExportOptions
from davir_ray.config.run import RunConfig
from davir_ray.config.sources import Source
from davir_ray.data.exported import SCORE_COLUMNS, Form, exported_text, form_of, needs_record
from davir_ray.data.rendered import RowError
from davir_ray.engine.connect import connected_to
from davir_ray.engine.shards import Shards, read_columns
from davir_ray.engine.shuffle import Round, Written, assign_part, regroup, write_shards
from davir_ray.errors import ConfigError, DataError, IntegrityError, OutputError
from davir_ray.export.card import HISTOGRAM_EDGES, Exported, card, loader
from davir_ray.export.hub import create_repository, licence_of, upload
from davir_ray.formulas.hashing import random_keys, seed_from
from davir_ray.inputs import last_config
from davir_ray.run.access import check_readable, probe_output
from davir_ray.run.files import FileEntry, in_folder, read_parquet, total_rows, write_file, write_parquet
from davir_ray.run.folder import Run
from davir_ray.run.location import Location
from davir_ray.run.storage_errors import user_errors
from davir_ray.schema import REJECTS, SELECTED
from davir_ray.stages.rank import with_order
from davir_ray.stages.select.plan import rows_with_text

log = logging.getLogger(__name__)

EXPORT_FILE = "export.json"

BIN_ROWS = 50_000
"""Rows with their text that one task writes where rows are moved; about 100 MB."""

_TEXT_COLUMNS = ["prompt", "response", "record", "source_file", "source_row"]


@dataclass(frozen=True, kw_only=True)
class _Writer:
    """Writes the file of one shard or bin, and its rejects."""

    output: Location
    form: Form | None
    schema: pa.Schema
    """The columns of selected/ in this run."""
    sources: dict[str, Source]

    def write(self, number: int, rows: pa.Table) -> Written:
        """Write the rows in their order; those that have no place in the form go to rejects/."""
        name, rejects = f"part-{number:05d}", list[dict[str, Any]]()
        if self.form is None:
            kept = rows.select(self.schema.names).cast(self.schema)
            entry = write_parquet(self.output / "data" / f"{name}.parquet", kept)
        else:
            lines, places = [], []
            for place, row in enumerate(rows.select([*self._score_columns, *_TEXT_COLUMNS]).to_pylist()):
                try:
                    lines.append(f"{self._line(row, self.form)}\n")
                    places.append(place)
                except RowError as error:
                    origin = {key: row[key] for key in ("source", "source_file", "source_row")}
                    rejects.append(origin | {"reason": error.reason.value, "detail": error.detail})
            kept = rows.take(pa.array(places, pa.int64()))
            if rejects:
                table = pa.Table.from_pylist(rejects, REJECTS)
                entry = write_parquet(self.output / "rejects" / f"{name}.parquet", table)
            if lines:  # no reader takes a file without rows
                entry = write_file(self.output / "data" / f"{name}.jsonl", "".join(lines).encode(), len(lines))
        edges = [-np.inf, *HISTOGRAM_EDGES[1:-1], np.inf]
        facts = {
            "rows": kept.num_rows,
            "histogram": np.histogram(kept["davir"].drop_null(), edges)[0].tolist(),
            "rejects": dict(Counter(reject["reason"] for reject in rejects)),
        }
        return Written(entry, facts)

    @property
    def _score_columns(self) -> list[str]:
        """The score that the rows are ranked by is one of them, or comes last, from a folder of its own."""
        return [*SCORE_COLUMNS, *self.schema.names[len(SELECTED) :]]

    def _line(self, row: dict[str, Any], form: Form) -> str:
        record = {} if row["record"] is None else json.loads(row["record"])
        text = exported_text(form, row["prompt"], row["response"], record, self.sources[row["source"]])
        return json.dumps(text | {name: row[name] for name in self._score_columns}, ensure_ascii=False, allow_nan=False)


def export(options: ExportOptions) -> Location:
    """Write the rows and what the trainer needs, and upload them if asked to; returns the folder."""
    run, output = Run.at(options.run), Run.at(options.output).folder
    check_readable([(str(run), OutputError)])
    config = last_config(run)
    form = form_of(options.to, config.all_sources(), config.prepare)
    files = _files(run, options)
    _check(run, output, options, form, config)
    probe_output(output)
    if options.push_to_hub is not None:
        create_repository(options.push_to_hub, public=options.public)
    licence = options.license or (licence_of(config.all_sources()) if options.push_to_hub else None)
    with connected_to(Run(output), is_shared=options.output_is_shared):
        for name in (EXPORT_FILE, "data", "rejects"):
            (output / name).remove()
        (output / EXPORT_FILE).write_text(json.dumps({"unfinished": asdict(options)}))  # so that it may be repeated
        writer = _Writer(
            output=output,
            form=form,
            schema=with_order(SELECTED, config.rank),
            sources={source.name: source for source in config.all_sources()},
        )
        written = _write(run, files, options, writer)
        facts = _facts(run, config, options, form, written, licence)
        if facts.num_rows == 0:
            raise DataError(f"no row has a place in the form of {options.to}: {facts.rejected()}; see {output}/rejects")
        for name, text in {"README.md": card(facts), **loader(facts)}.items():
            (output / name).write_text(text)
        (output / EXPORT_FILE).write_text(json.dumps(asdict(facts), indent=1))
    if facts.rejects:
        log.warning("export: left out, because the form has no place for them: %s", facts.rejected())
    log.info("export: %d rows of %s", facts.num_rows, run)
    if options.push_to_hub is not None:
        upload(options.push_to_hub, output, f"{facts.num_rows} rows of {run.folder.name}")
    return output


def _check(run: Run, output: Location, options: ExportOptions, form: Form | None, config: RunConfig) -> None:
    """Refuse an output that holds something else, and a form that needs records which the run did not keep."""
    with user_errors(output, OutputError):
        if output.exists() and not (output / EXPORT_FILE).exists() and output.fs.ls(output.path):
            raise OutputError(f"{output} holds files but no export; choose an empty or a new --output")
    if needs_record(form) and not config.keep_record:
        raise ConfigError(
            f"to is {options.to}, which needs the records of the sources, but {run} was made with keep_record false; "
            "export to parquet (or plain text to trl), or prepare again with records"
        )


def _files(run: Run, options: ExportOptions) -> list[FileEntry]:
    """The files of the run that hold the rows, without their text where every row is exported."""
    if options.rows == "scored":
        return run.require("rank").files_in("ranked")
    files = run.require("select").files_in(options.rows)
    if not files:
        raise ConfigError(f"rows is {options.rows}, but {run} has no {options.rows}/; select with --select.mixture")
    return files


def _write(run: Run, files: list[FileEntry], options: ExportOptions, writer: _Writer) -> list[Written]:
    """Write every row, by rank or at random."""
    num_bins = max(1, -(-total_rows(files) // rows_with_text(run, BIN_ROWS)))
    if options.rows != "scored":
        shards = Shards(files, partial(read_columns, run / options.rows, None))
        if not options.shuffle:
            numbers = {entry.name: number for number, entry in enumerate(files)}
            return write_shards(shards, lambda name, table: writer.write(numbers[name], table))
        rounds = []
        assign = partial(_to_bin, num_bins=num_bins, seed=options.seed)
    else:
        seed = options.seed if options.shuffle else None
        texts = run.require("prepare").files_in("examples")
        both = [*in_folder("ranked", files), *in_folder("examples", texts)]
        shards = Shards(both, partial(_ranked_or_text, run, writer.schema))
        assign = partial(assign_part, column="example_id", num_parts=num_bins)
        rounds = [Round("part", num_bins, partial(_joined, num_rows=total_rows(files), num_bins=num_bins, seed=seed))]
    return regroup(shards, assign, *rounds, Round("bin", num_bins, partial(_write_bin, writer)))


def _ranked_or_text(run: Run, schema: pa.Schema, name: str) -> pa.Table:
    """A file of ranked/ or of examples/, with the columns of both; those that the other has are null."""
    folder = name.partition("/")[0]
    own = [column for column in schema.names if (column in _TEXT_COLUMNS) == (folder == "examples")]
    table = read_parquet(run.folder / name, list(dict.fromkeys(["example_id", *own])))
    absent = [field for field in schema if field.name not in table.column_names]
    for field in absent:
        table = table.append_column(field, pa.nulls(table.num_rows, field.type))
    return table.select(schema.names).cast(schema)


def _joined(table: pa.Table, num_rows: int, num_bins: int, seed: int | None) -> pa.Table:
    """The ranked rows of a part with their text, and the bin of each."""
    is_ranked = table["rank"].is_valid()
    ranked, texts = table.filter(is_ranked), table.filter(pc.invert(is_ranked))
    at = pc.index_in(ranked["example_id"], value_set=texts["example_id"].combine_chunks())
    if at.null_count:
        raise IntegrityError(f"{at.null_count} rows of ranked/ are not in examples/; rank again")
    for column in _TEXT_COLUMNS:
        ranked = ranked.set_column(
            SELECTED.get_field_index(column),
            SELECTED.field(column),
            texts[column].take(at).cast(SELECTED.field(column).type),
        )
    return _to_bin(ranked, num_bins, seed, num_rows)


def _to_bin(table: pa.Table, num_bins: int, seed: int | None, num_rows: int = 0) -> pa.Table:
    """Add the bin and the place in it: by rank of `num_rows`, or at random."""
    if seed is None:
        places = np.asarray(table["rank"]).astype(np.uint64)
        numbers = (places - np.uint64(1)) * np.uint64(num_bins) // np.uint64(num_rows)
    else:
        places = random_keys(np.asarray(table["example_id"]), seed_from("export", seed))
        numbers = np.minimum(places // np.uint64((2**64 - 1) // num_bins), np.uint64(num_bins - 1))
    table = table.append_column("place", pa.array(places, pa.uint64()))
    return table.append_column("bin", pa.array(numbers.astype(np.int64), pa.int64()))


def _write_bin(writer: _Writer, rows: pa.Table) -> Written:
    in_order = rows.sort_by([("place", "ascending"), ("example_id", "ascending")])
    return writer.write(int(rows["bin"][0].as_py()), in_order)


def _facts(
    run: Run, config: RunConfig, options: ExportOptions, form: Form | None, written: list[Written], licence: str | None
) -> Exported:
    """What the card says and the trainer's files name."""
    rejects: Counter[str] = Counter()
    for one in written:
        rejects.update(one.facts["rejects"])
    return Exported(
        options=asdict(options) | {"output": str(Run.at(options.output))},
        form=form,
        num_rows=sum(one.facts["rows"] for one in written),
        rejects=dict(rejects),
        histogram=[sum(counts) for counts in zip(*(one.facts["histogram"] for one in written), strict=True)],
        files=sorted(one.entry.name for one in written if one.facts["rows"]),
        counts={stage: run.require(stage).counts for stage in ("prepare", "score", "rank", "select")},
        base=config.base or "",
        reference=config.reference,
        num_folds=config.prepare.folds,
        sources=[asdict(source) for source in config.all_sources()],
        rank=config.rank.as_order(),
        select=asdict(config.select),
        licence=licence,
    )
