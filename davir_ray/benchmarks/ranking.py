"""The exact ranking compared with DuckDB, Polars and Ray Data's sort, on any number of generated scores."""

import logging
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import psutil
import pyarrow as pa
import ray.data

from davir_ray.benchmarks.measure import peak_since, start_peak
from davir_ray.config.checks import check
from davir_ray.config.selection import RankConfig
from davir_ray.engine.connect import connected
from davir_ray.run.files import FileEntry, in_folder, read_parquet, write_parquet
from davir_ray.run.folder import Run
from davir_ray.run.location import Location
from davir_ray.run.manifest import Manifest
from davir_ray.schema import SCORES
from davir_ray.stages.rank import rank

log = logging.getLogger(__name__)

_POLL_S = 0.2


@dataclass(frozen=True, kw_only=True)
class RankingBenchmark:
    """Rank generated scores, the first 6 % and all, against DuckDB, Polars and Ray Data's sort().limit() and sort().

    All read the same files and write all columns and the rank as Parquet with zstd. Ray is started before.
    """

    json: str | None = None
    """File for the result."""
    rows: int = 1_000_000
    """Number of scores to rank."""
    shard_rows: int = 50_000
    """Number of rows in a file of scores."""
    fraction: float = 0.06
    """Share of the rows that the partial ranking keeps."""
    values: Literal["distinct", "tied"] = "distinct"
    """Values of the scores: normally distributed, or one of a hundred."""
    repeats: int = 5
    """Number of times that ours, DuckDB's and Polars' take turns; the medians count. Ray Data's sort, which takes
    minutes, runs once."""
    baselines: bool = True
    """Also run the others. If false, only our ranking runs, for sizes that they cannot handle."""
    folder: str | None = None
    """Folder in which the files are written; they are removed at the end. None: a temporary folder."""

    def __post_init__(self) -> None:
        for name in ("rows", "shard_rows", "repeats"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        check(0 < self.fraction <= 1, "fraction", self.fraction, "above 0 and at most 1")


def run(settings: RankingBenchmark) -> dict[str, Any]:
    """Generate scores, rank the first 6 % and all of them, let the others do it, and check every rank with NumPy."""
    with connected(), tempfile.TemporaryDirectory(dir=settings.folder) as folder:
        _warm_up()
        run_folder = Location.of(Path(folder) / "run")
        files = _generate(run_folder, settings)
        num_kept = max(1, int(settings.rows * settings.fraction))
        results: dict[str, Any] = {"settings": asdict(settings), "rows": settings.rows, "kept": num_kept, "exact": True}
        expected = _oracle(run_folder, files)
        spent: dict[str, list[float]] = {}
        for turn in range(settings.repeats):
            for name, most in {"top": num_kept, "full": None}.items():
                with _watched() as peaks:
                    started = time.monotonic()
                    manifest = rank(Run(run_folder), RankConfig(most=most))
                    spent.setdefault(name, []).append(time.monotonic() - started)
                for process, found in {"driver_peak": peaks["driver"], "largest_worker": peaks["worker"]}.items():
                    for key in (f"{name}_{process}_mib", f"{process}_mib"):
                        results[key] = max(found, results.get(key, 0.0))
                if turn == 0:
                    results["exact"] &= _is_exact(run_folder, manifest, expected)
                bins = manifest.details["rows_by_bin"]
                rivals = {"duckdb": _by_duckdb, "polars": _by_polars} if settings.baselines else {}
                for rival, do in rivals.items():
                    started = time.monotonic()
                    do(f"{run_folder}/scores/*.parquet", f"{run_folder}/{rival}.parquet", most)
                    spent.setdefault(f"{rival}_{name}", []).append(time.monotonic() - started)
            log.info("benchmark: turn %d: %s", turn + 1, {name: round(taken[-1], 2) for name, taken in spent.items()})
        results |= {"largest_bin_ratio": max(bins) / (sum(bins) / len(bins)), "bins": len(bins)}
        seconds = {name: median(taken) for name, taken in spent.items()}
        if settings.baselines:
            seconds |= _sorts(run_folder, num_kept)
            results["speedup_vs_sort_limit"] = seconds["sort_limit"] / seconds["top"]
            results["speedup_vs_sort"] = seconds["sort"] / seconds["full"]
            for rival, name in product(("duckdb", "polars"), ("top", "full")):
                results[f"{name}_times_{rival}"] = seconds[name] / seconds[f"{rival}_{name}"]
        results["seconds"] = seconds
        results["rows_per_second"] = {name: settings.rows / taken for name, taken in seconds.items()}
        results["bytes_of_scores"] = sum(entry.bytes for entry in files)
    return results


def _by_duckdb(scores: str, target: str, most: int | None) -> None:
    import duckdb  # a package of the tests

    kept = f"(select * from '{scores}' order by davir desc, example_id limit {most})" if most else f"'{scores}'"
    ranked = f"select *, row_number() over (order by davir desc, example_id) as rank from {kept} order by rank"
    with duckdb.connect() as connection:
        connection.execute(f"copy ({ranked}) to '{target}' (format parquet, compression zstd)")


def _by_polars(scores: str, target: str, most: int | None) -> None:
    import polars  # a package of the tests

    rows = polars.scan_parquet(scores).sort(["davir", "example_id"], descending=[True, False])
    rows = rows if most is None else rows.head(most)
    rows.with_row_index("rank", offset=1).sink_parquet(target, compression="zstd")


def _warm_up() -> None:
    """Rank and sort a few rows, so that the workers are started and have loaded what they need."""
    with tempfile.TemporaryDirectory() as folder:
        run_folder = Location.of(folder)
        _generate(run_folder, RankingBenchmark(rows=4000, shard_rows=1000))
        rank(Run(run_folder), RankConfig())
        _sorts(run_folder, 100)


def _generate(run_folder: Location, settings: RankingBenchmark) -> list[FileEntry]:
    """Write shards of scores in parallel, and the manifest that ranking requires."""
    starts = range(0, settings.rows, settings.shard_rows)
    write = ray.remote(_write_shard)
    files: list[FileEntry] = ray.get(
        [
            write.remote(run_folder, number, min(settings.shard_rows, settings.rows - start), settings.values)
            for number, start in enumerate(starts)
        ]
    )
    counts = {"examples": settings.rows, "scored": settings.rows, "ok": settings.rows}
    Manifest(
        stage="score", fingerprint={"benchmark": asdict(settings)}, counts=counts, files=in_folder("scores", files)
    ).write(run_folder)
    log.info("benchmark: %d rows in %d files", settings.rows, len(files))
    return files


def _write_shard(run_folder: Location, number: int, rows: int, values: str) -> FileEntry:
    draw = np.random.default_rng(number)
    base_nll = draw.lognormal(4, 1, rows)
    davir = draw.normal(0.2, 0.2, rows) if values == "distinct" else draw.integers(0, 100, rows) / 100
    tokens = draw.integers(1, 500, rows)
    columns: dict[str, Any] = {field.name: pa.nulls(rows, field.type) for field in SCORES}
    columns |= {
        "example_id": _ids(draw, number, rows),
        "content_hash": draw.integers(0, 2**63 - 1, rows),
        "source": pa.array(["generated"] * rows),
        "num_prompt_tokens": draw.integers(1, 200, rows),
        "num_response_tokens": tokens,
        "truncated": pa.array([False] * rows),
        "base_nll": base_nll,
        "reference_nll": base_nll * (1 - davir),
        "davir": davir,
        "rho_sum": base_nll * davir,
        "rho_mean": base_nll * davir / tokens,
        "status": pa.array(["ok"] * rows),
    }
    return write_parquet(run_folder / "scores" / f"part-{number:05d}.parquet", pa.table(columns, schema=SCORES))


def _ids(draw: np.random.Generator, number: int, rows: int) -> npt.NDArray[np.int64]:
    """Distinct ids in random order: an offset for the shard, a stride for each row, and a random remainder."""
    stride = 2**42 // rows
    return draw.permutation(number * 2**42 + np.arange(rows) * stride + draw.integers(0, stride, rows))


def _oracle(run_folder: Location, files: list[FileEntry]) -> npt.NDArray[np.int64]:
    """The ids in rank order, by one lexsort."""
    tables = [read_parquet(run_folder / "scores" / entry.name, ["davir", "example_id"]) for entry in files]
    davir = np.concatenate([table["davir"].to_numpy() for table in tables])
    ids = np.concatenate([table["example_id"].to_numpy() for table in tables])
    return np.asarray(ids[np.lexsort((ids, -davir))])


def _is_exact(run_folder: Location, manifest: Manifest, expected: npt.NDArray[np.int64]) -> bool:
    """Whether every row has the rank that the oracle gives it, and none is missing."""
    start = 0
    for entry in manifest.files_in("ranked"):
        table = read_parquet(run_folder / "ranked" / entry.name, ["rank", "example_id"])
        end = start + table.num_rows
        ranks, ids = table["rank"].to_numpy(), table["example_id"].to_numpy()
        if not (np.array_equal(ranks, np.arange(start + 1, end + 1)) and np.array_equal(ids, expected[start:end])):
            return False
        start = end
    return start == manifest.counts["ranked"]


def _sorts(run_folder: Location, num_kept: int) -> dict[str, float]:
    """Seconds of Ray Data's sort of all rows by (davir descending, example_id ascending), written as Parquet."""
    taken = {}
    for name, limit in {"sort_limit": num_kept, "sort": None}.items():
        started = time.monotonic()
        dataset = ray.data.read_parquet(f"{run_folder}/scores").sort(["davir", "example_id"], descending=[True, False])
        (dataset if limit is None else dataset.limit(limit)).write_parquet(f"{run_folder}/{name}")
        taken[name] = time.monotonic() - started
        log.info("benchmark: %s in %.1f s", name, taken[name])
    return taken


@contextmanager
def _watched() -> Iterator[dict[str, float]]:
    """Measure peak memory in MiB: `driver`, above its memory at the start, and `worker`, of the largest worker."""
    peaks = {"driver": 0.0, "worker": 0.0}
    done = threading.Event()

    def poll() -> None:
        while not done.wait(_POLL_S):
            peaks["worker"] = max([peaks["worker"], *_worker_sizes()])

    thread = threading.Thread(target=poll, daemon=True)
    before = start_peak()
    thread.start()
    try:
        yield peaks
    finally:
        done.set()
        thread.join()
        peaks["driver"] = peak_since(before)


def _worker_sizes() -> Iterator[float]:
    """The MiB of each worker of this process' Ray, without the shared object store."""
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline()[0].startswith("ray::"):
                memory = process.memory_info()
                yield (memory.rss - memory.shared) / 2**20
        except (psutil.NoSuchProcess, IndexError):  # it has ended, or is about to
            continue
