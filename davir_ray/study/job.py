"""The study from start to end: pools, base, runs, tables; whatever is complete is not done again."""

import hashlib
import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from davir_ray.config.training import FinetuneConfig
from davir_ray.errors import OutputError
from davir_ray.run.manifest import differences
from davir_ray.study.detection import rows_of
from davir_ray.study.losses import loss_tables
from davir_ray.study.pools import PoolSize, make_pool, read_rows, write_rows
from davir_ray.study.results import detection_tables
from davir_ray.study.runs import ADAPTER_RECIPE, SMALL_RECIPE, Plan, make_base, make_runs, run_config

log = logging.getLogger(__name__)

NUM_FOR_BASE = 5000
NUM_HELD_OUT = 300


@dataclass(frozen=True, kw_only=True)
class Design:
    """What a study does; the tests do less."""

    pool: PoolSize
    plan: Plan
    num_replicates: int
    recipe: FinetuneConfig
    base: str | None


SMALL = Design(pool=PoolSize(), plan=Plan(), num_replicates=4, recipe=SMALL_RECIPE, base=None)


def design_of(base: str | None) -> Design:
    """The study of the small base that is made here, or that of a given base."""
    if base is None:
        return SMALL
    half = PoolSize(clean=600, clean_copies=25, rare=25, exchanged=50, exchanged_copies=25, exchanged_near=25)
    plan = Plan(epochs=(3,), four_folds=())
    return Design(pool=half, plan=plan, num_replicates=2, recipe=ADAPTER_RECIPE, base=base)


def _note_inputs(output: Path, data: Path, rare: Path, design: Design) -> None:
    """Note what a study is made of; raises OutputError if its folder holds another study."""
    inputs = {
        "data": hashlib.sha256(data.read_bytes()).hexdigest(),
        "rare": hashlib.sha256(rare.read_bytes()).hexdigest(),
        "design": asdict(design),
    }
    noted, inputs = output / "study.json", json.loads(json.dumps(inputs))
    if not noted.exists():
        noted.write_text(json.dumps(inputs, indent=1) + "\n", encoding="utf-8")
    elif changed := differences(json.loads(noted.read_text(encoding="utf-8")), inputs):
        raise OutputError(f"{output} holds another study ({changed[0]}); choose another --output")


def run_study(data: Path, rare: Path, output: Path, design: Design) -> str:
    """Run the whole study in a folder; returns the text to print, which is in results.txt as well."""
    output = output.expanduser().resolve()
    output.mkdir(parents=True, exist_ok=True)
    _note_inputs(output, data, rare, design)
    rows = read_rows(data, rare, NUM_FOR_BASE, NUM_HELD_OUT)
    base = design.base
    if base is None:
        base = str(output / "base")
        make_base(Path(base), rows.for_base)
    replicates = list[tuple[Path, pa.Table]]()
    for replicate in range(design.num_replicates):
        folder = output / f"replicate-{replicate}"
        folder.mkdir(exist_ok=True)
        pool = folder / "pool.jsonl"
        if not pool.exists():
            write_rows(pool, map(asdict, make_pool(rows, design.pool, replicate)))
        log.info("study: replicate %d of %d", replicate + 1, design.num_replicates)
        make_runs(
            [
                run_config(way, epochs, pool=pool, base=base, recipe=design.recipe, replicate=replicate, folder=folder)
                for way, epochs in design.plan.runs
            ]
        )
        table = rows_of(pool, folder, design.plan)
        pq.write_table(table, folder / "rows.parquet")
        replicates.append((pool, table))
    text = detection_tables([table for _, table in replicates], design.plan)
    if design.base is None:
        held_out = output / "held_out.jsonl"
        write_rows(held_out, [{"prompt": prompt, "response": response} for prompt, response in rows.held_out])
        text += "\n\n" + loss_tables(Path(base), replicates, held_out, design.recipe, output / "losses")
    (output / "results.txt").write_text(text + "\n", encoding="utf-8")
    return text
