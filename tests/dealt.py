"""Runs whose shards are dealt to folds by hand, in place of prepare."""

from collections.abc import Sequence
from dataclasses import replace

import pyarrow as pa

from davir_ray.run.files import in_folder, read_parquet, write_parquet
from davir_ray.run.folder import Run
from davir_ray.stages.folds import FOLDS


def deal_shards(run: Run, folds: Sequence[int], num_folds: int) -> None:
    """Put the shards of examples/ into these folds, in the order of their names."""
    prepared = run.require("prepare")
    files, of_file = [], {}
    for entry, fold in zip(prepared.files_in("examples"), folds, strict=True):
        table = read_parquet(run / "examples" / entry.name)
        table = table.append_column("fold", pa.array([fold] * table.num_rows, pa.int8()))
        files.append(write_parquet(run / "examples" / entry.name, table))
        of_file[entry.name] = fold
    others = [entry for entry in prepared.files if not entry.name.startswith("examples/")]
    details = prepared.details | {FOLDS: {"num_folds": num_folds, "of_file": of_file}}
    replace(prepared, files=[*in_folder("examples", files), *others], details=details).commit(run.folder)
