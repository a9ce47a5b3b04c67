"""The ranking in many bins is the order of one plain sort, whatever the values, ties and shards."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray import cloudpickle

from davir_ray.config.selection import RankConfig
from davir_ray.engine.shards import Shards
from davir_ray.engine.shuffle import collect, exchange
from davir_ray.errors import DataError, IntegrityError, OutputError
from davir_ray.run.files import FileEntry, read_parquet
from davir_ray.run.folder import Run
from davir_ray.run.manifest import Manifest
from davir_ray.schema import RANKED
from davir_ray.stages import rank as ranking
from davir_ray.stages.rank import count_bins, find_bins, rank, write_bin
from davir_ray.stages.rank import read_scores as read_of_rank

pytestmark = pytest.mark.usefixtures("ray_session", "small_bins")

# By name a worker could not import it.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

MakeScores = Callable[..., Run]
Floats = npt.NDArray[np.float64]
BIN_ROWS = 40
ROWS = 300


@pytest.fixture
def small_bins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bins so small that a few hundred rows fall into many."""
    monkeypatch.setattr(ranking, "BIN_ROWS", BIN_ROWS)
    monkeypatch.setattr(ranking, "_SAMPLES_PER_BIN", 10)


def ids_of(rows: int, seed: int = 0) -> list[int]:
    """Distinct ids from the whole range of the column, in no order."""
    drawn = np.random.default_rng(seed).integers(0, 2**63 - 1, rows, dtype=np.int64)
    assert len(np.unique(drawn)) == rows
    return [int(example_id) for example_id in drawn]


def table_of(run: Run, folder: str = "ranked") -> pd.DataFrame:
    places = [run / folder / name for name in (run / folder).names(".parquet")]
    return pa.concat_tables([read_parquet(place) for place in places]).to_pandas()


def expected_ids(values: Floats, ids: list[int], *, lowest: bool = False) -> list[int]:
    """The order by one sort: value, then id; without a value there is no rank."""
    known = ~np.isnan(values)
    keys = values[known] if lowest else -values[known]
    known_ids = np.array(ids)[known]
    return [int(example_id) for example_id in known_ids[np.lexsort((known_ids, keys))]]


def check(run: Run, manifest: Manifest, expected: list[int]) -> None:
    table = table_of(run)
    assert table["example_id"].tolist() == expected
    assert table["rank"].tolist() == list(range(1, len(expected) + 1))
    assert manifest.counts["ranked"] == len(expected)
    assert manifest.counts["ranked"] + manifest.counts["unranked"] == manifest.counts["examples"]
    assert [entry.rows for entry in manifest.files] == [
        pq.read_metadata(f"{run}/{entry.name}").num_rows for entry in manifest.files
    ]


def _some_missing(rng: np.random.Generator) -> Floats:
    values = rng.normal(size=ROWS)
    values[rng.random(ROWS) < 0.3] = np.nan
    return values


VALUES: dict[str, Callable[[np.random.Generator], Floats]] = {
    "distinct": lambda rng: rng.normal(size=ROWS),
    "heavy ties": lambda rng: rng.integers(0, 3, ROWS).astype(float),
    "all equal": lambda rng: np.full(ROWS, 0.25),
    "infinities and signed zeros": lambda rng: rng.choice([np.inf, -np.inf, 0.0, -0.0, 1.0, -1.0], ROWS),
    "neighbouring doubles": lambda rng: 0.1 + rng.integers(0, 4, ROWS) * np.spacing(0.1),
    "some without a value": _some_missing,
    "a whole shard without a value": lambda rng: np.where(np.arange(ROWS) < ROWS // 2, np.nan, rng.normal(size=ROWS)),
    "one row": lambda rng: rng.normal(size=1),
}


@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("lowest", [False, True])
def test_ranks_equal_one_plain_sort(make_scores: MakeScores, kind: str, lowest: bool) -> None:
    values = VALUES[kind](np.random.default_rng(1))
    ids = ids_of(len(values))
    run = make_scores([None if np.isnan(value) else value for value in values], example_id=ids)
    manifest = rank(run, RankConfig(lowest=lowest))
    check(run, manifest, expected_ids(values, ids, lowest=lowest))


@pytest.mark.parametrize("kind", VALUES)
def test_the_first_ranks_equal_those_of_one_plain_sort(make_scores: MakeScores, kind: str) -> None:
    values = VALUES[kind](np.random.default_rng(1))
    ids = ids_of(len(values))
    run = make_scores([None if np.isnan(value) else value for value in values], example_id=ids, num_shards=11)
    expected = expected_ids(values, ids)
    manifest = rank(run, RankConfig(most=70))
    assert table_of(run)["example_id"].tolist() == expected[:70]
    assert manifest.counts["rankable"] == len(expected)
    assert sum(manifest.details["rows_by_bin"]) == len(expected)


def note_read(run: Run, config: RankConfig, columns: list[str] | None, name: str) -> pa.Table:
    """Read, and add what was read to a list beside the folder."""
    with open(f"{run}/scores.reads", "a", encoding="utf-8") as file:
        file.write(f"{name} {'all' if columns is None else 'keys'}\n")
    return read_of_rank(run, config, columns, name)


def reads_of(run: Run) -> dict[str, str]:
    """What was read of each shard, one reading after another."""
    lines = [line.split() for line in Path(f"{run}/scores.reads").read_text().splitlines()]
    return {name: " ".join(what for of, what in lines if of == name) for name, _ in lines}


@pytest.mark.parametrize(
    ("settings", "changes", "reads"),
    [
        ({}, {}, "keys all"),
        ({"most": 70}, {}, "keys all"),
        ({"order": "random"}, {}, "all"),
        ({"order": "random", "most": 70}, {}, "all"),
        ({}, {"BIN_ROWS": ROWS}, "all"),
        ({"most": 70}, {"BIN_ROWS": ROWS}, "all"),
    ],
    ids=lambda value: str(value),
)
def test_no_shard_is_read_more_often_than_it_must(
    make_scores: MakeScores,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    changes: dict[str, int],
    reads: str,
) -> None:
    """The keys for a sample where there are several bins, then all columns once."""
    for name, value in changes.items():
        monkeypatch.setattr(ranking, name, value)
    monkeypatch.setattr(ranking, "read_scores", note_read)
    run = make_scores(np.random.default_rng(1).normal(size=ROWS), example_id=ids_of(ROWS), num_shards=5)
    rank(run, RankConfig(**settings))
    assert reads_of(run) == dict.fromkeys((run / "scores").names(), reads)


def test_bins_that_hold_fewer_rows_than_was_thought_are_dealt_again(
    make_scores: MakeScores, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four of five rows are ok but have no value."""
    monkeypatch.setattr(ranking, "read_scores", note_read)
    values, ids = np.random.default_rng(1).normal(size=ROWS), ids_of(ROWS)
    values[np.arange(ROWS) % 5 > 0] = np.nan
    run = make_scores(values, example_id=ids, status=["ok"] * ROWS)
    manifest = rank(run, RankConfig(most=50))
    assert set(reads_of(run).values()) == {"keys all all"}
    assert table_of(run)["example_id"].tolist() == expected_ids(values, ids)[:50]
    assert (manifest.counts["rankable"], manifest.counts["ranked"]) == (ROWS // 5, 50)


def test_random_bins_are_about_equal(make_scores: MakeScores) -> None:
    run = make_scores(np.zeros(ROWS), example_id=range(ROWS))
    rows_by_bin = rank(run, RankConfig(order="random")).details["rows_by_bin"]
    assert len(rows_by_bin) == -(-ROWS // BIN_ROWS)
    assert max(rows_by_bin) <= 1.5 * BIN_ROWS


def test_many_rows_fall_into_many_bins(make_scores: MakeScores) -> None:
    for name, davir in {"distinct": np.random.default_rng(0).normal(size=ROWS), "equal": np.zeros(ROWS)}.items():
        run = make_scores(davir, example_id=ids_of(ROWS), name=name)
        counts = rank(run, RankConfig()).details["rows_by_bin"]
        assert len(counts) >= 6
        assert sum(counts) == ROWS
        assert max(counts) <= 4 * BIN_ROWS


def test_nan_is_unranked_and_stays_in_scores(make_scores: MakeScores) -> None:
    run = make_scores([0.5, float("nan"), None, 0.7])
    manifest = rank(run, RankConfig())
    check(run, manifest, [3, 0])
    assert len(table_of(run, "scores")) == 4


def test_nothing_to_rank_is_the_users_to_know(make_scores: MakeScores) -> None:
    run = make_scores([None] * 5)
    with pytest.raises(DataError, match="no example can be ranked by davir"):
        rank(run, RankConfig())


@pytest.mark.parametrize("order", ["rho_sum", "rho_mean", "base_nll", "reference_nll", "length"])
def test_every_order_ranks_by_its_column(make_scores: MakeScores, order: str) -> None:
    rng = np.random.default_rng(2)
    column = "num_response_tokens" if order == "length" else order
    values = rng.integers(1, 50, ROWS) if order == "length" else rng.normal(size=ROWS)
    ids = ids_of(ROWS)
    run = make_scores(rng.normal(size=ROWS), example_id=ids, **{column: values})
    manifest = rank(run, RankConfig(order=order))  # type: ignore[arg-type]
    check(run, manifest, expected_ids(values.astype(float), ids))


@pytest.mark.parametrize("lowest", [False, True])
def test_ifd_is_ranked_from_its_own_folder_and_comes_last(
    make_scores: MakeScores, add_ifd: Callable[..., None], lowest: bool
) -> None:
    values, ids = _some_missing(np.random.default_rng(3)), ids_of(ROWS)
    run, config = make_scores(np.zeros(ROWS), example_id=ids), RankConfig(order="ifd", lowest=lowest)
    with pytest.raises(OutputError, match=r"no complete extra/ifd, .*add --score\.also '\[ifd\]'"):
        rank(run, config)
    of_id = {
        example_id: None if np.isnan(value) else float(value) for example_id, value in zip(ids, values, strict=True)
    }
    add_ifd(run, of_id)
    manifest = rank(run, config)
    check(run, manifest, expected_ids(values, ids, lowest=lowest))
    assert len(manifest.files) > 3
    table = table_of(run)
    assert table["ifd"].tolist() == [of_id[example_id] for example_id in table["example_id"]]
    for entry in manifest.files:
        assert pq.read_schema(f"{run}/{entry.name}").names == [*RANKED.names, "ifd"]
    assert rank(run, config) == manifest, "complete, skipped"
    add_ifd(run, {example_id: 1 - (value or 0) for example_id, value in of_id.items()})
    assert rank(run, config).counts["ranked"] == ROWS, "other values are ranked again"
    rank(run, RankConfig())
    assert "ifd" not in table_of(run)


def test_ifd_of_other_rows_is_not_taken(make_scores: MakeScores, add_ifd: Callable[..., None]) -> None:
    run = make_scores(np.zeros(30), num_shards=2)
    add_ifd(run, dict.fromkeys(range(30), 1.0))
    first, second = (run / "extra/ifd").names()
    (run / "extra/ifd" / first).write_bytes((run / "extra/ifd" / second).read_bytes())
    with pytest.raises(IntegrityError, match="do not hold the same rows"):
        rank(run, RankConfig(order="ifd"))


@pytest.mark.parametrize("column", ["base_nll", "reference_nll"])
def test_a_loss_by_token_is_ranked_and_a_row_without_tokens_or_loss_is_not(
    make_scores: MakeScores, column: str
) -> None:
    rng = np.random.default_rng(4)
    nll, tokens, ids = rng.gamma(2.0, 30.0, ROWS), rng.integers(0, 9, ROWS), ids_of(ROWS)
    nll[::7] = np.nan
    run = make_scores(rng.normal(size=ROWS), example_id=ids, num_response_tokens=tokens, **{column: nll})
    manifest = rank(run, RankConfig(order=f"{column.removesuffix('nll')}mean_nll", lowest=True))  # type: ignore[arg-type]
    known = [(n / t, i) for n, t, i in zip(nll, tokens, ids, strict=True) if t and not np.isnan(n)]
    check(run, manifest, [i for _, i in sorted(known)])


def test_length_and_random_rank_scored_rows_only(make_scores: MakeScores) -> None:
    run = make_scores([0.1, None, 0.3, None], num_response_tokens=[1, 9, 2, 8])
    check(run, rank(run, RankConfig(order="length")), [2, 0])
    rank(run, RankConfig(order="random"))
    assert sorted(table_of(run)["example_id"]) == [0, 2]


def test_a_random_order_depends_on_ids_and_seed_only(make_scores: MakeScores) -> None:
    ids = ids_of(ROWS)
    orders = []
    for name, davir, seed in [
        ("a", np.zeros(ROWS), 1),
        ("b", np.arange(ROWS, dtype=float), 1),
        ("c", np.zeros(ROWS), 2),
    ]:
        shuffled = ids if name != "b" else ids[::-1]
        run = make_scores(davir, example_id=shuffled, num_shards=2 if name == "b" else 5, name=name)
        rank(run, RankConfig(order="random", seed=seed))
        orders.append(table_of(run)["example_id"].tolist())
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2]) == sorted(ids)
    assert abs(np.corrcoef(np.argsort(orders[0]), np.argsort(orders[2]))[0, 1]) < 0.2


def test_the_order_of_rows_and_shards_does_not_matter(make_scores: MakeScores) -> None:
    davir = np.random.default_rng(3).integers(0, 20, ROWS).astype(float)
    ids = np.array(ids_of(ROWS))
    shuffle = np.random.default_rng(4).permutation(ROWS)
    one = make_scores(davir, example_id=ids.tolist(), num_shards=1, name="one")
    other = make_scores(davir[shuffle], example_id=ids[shuffle].tolist(), num_shards=7, name="other")
    for run in (one, other):
        rank(run, RankConfig())
    pd.testing.assert_frame_equal(table_of(one), table_of(other))


def test_all_columns_of_a_row_stay_together(make_scores: MakeScores) -> None:
    ids = ids_of(ROWS)
    davir = np.random.default_rng(5).normal(size=ROWS)
    run = make_scores(davir, example_id=ids, base_nll=davir * 2, num_response_tokens=range(ROWS))
    rank(run, RankConfig())
    table = table_of(run)
    np.testing.assert_array_equal(table["base_nll"], table["davir"] * 2)
    assert [ids[tokens] for tokens in table["num_response_tokens"]] == table["example_id"].tolist()


def test_two_rows_with_the_same_id_and_value_are_found(make_scores: MakeScores) -> None:
    run = make_scores([0.5, 0.1, 0.5, 0.2], example_id=[7, 8, 7, 9])
    with pytest.raises(IntegrityError, match="the same example_id"):
        rank(run, RankConfig())
    assert run.manifest("rank") is None


@pytest.mark.parametrize("wrong", [-1, 1])
def test_a_bin_that_is_not_as_counted_is_found(make_scores: MakeScores, wrong: int) -> None:
    run = make_scores(np.arange(100, dtype=float))
    scored = run.manifest("score")
    assert scored is not None
    shards = scored.files_in("scores")
    collected = partial(collect, Shards(shards, partial(read_scores, run)))
    bins = find_bins(collected, 100, RankConfig(), BIN_ROWS)
    rows_by_bin = count_bins(collected, bins)
    assert len(rows_by_bin) == len(bins) > 1
    rows_by_bin[1] += wrong
    options = {"folder": run / "ranked", "config": RankConfig(), "last_rank": 100, "metadata": {}}
    with pytest.raises(IntegrityError, match="bin 1 was counted"):
        exchange(
            Shards(shards, partial(read_scores, run)),
            bins.assign,
            len(bins),
            partial(write_bin, rows_by_bin=rows_by_bin, **options),
        )


def write_once_killed(
    number: int, rows: pa.Table, *, write: Callable[..., FileEntry | None], mark: Path, **options: Any
) -> FileEntry | None:
    """The first process that gets here says who it is and waits to be killed."""
    if not mark.exists():
        mark.write_text(str(os.getpid()))
        time.sleep(600)
    return write(number, rows, **options)


def test_a_worker_killed_while_it_writes_changes_nothing(make_scores: MakeScores, tmp_path: Path) -> None:
    values, ids = np.random.default_rng(6).integers(0, 9, ROWS).astype(float), ids_of(ROWS)
    run = make_scores(values, example_id=ids)
    mark, killed = tmp_path / "pid", []

    def kill() -> None:
        while not mark.exists() or not mark.read_text():
            time.sleep(0.05)
        killed.append(int(mark.read_text()))
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "write_bin", partial(write_once_killed, write=write_bin, mark=mark))
        manifest = rank(run, RankConfig())
    killer.join()
    assert len(killed) == 1
    check(run, manifest, expected_ids(values, ids))


RANK_ALONE = """
import json
import sys
import ray
from davir_ray.config.selection import RankConfig, SelectConfig
from davir_ray.run.folder import Run
from davir_ray.run.location import Location
from davir_ray.stages import rank
from davir_ray.stages.select import plan, rule
ray.init(logging_level="ERROR", **json.loads(sys.argv[2]))
rank.BIN_ROWS = 40
plan.BIN_ROWS = 15
run = Run.at(sys.argv[1])
rank.rank(run, RankConfig())
rule.select(run, RankConfig(), SelectConfig(top_fraction=0.4, drop_duplicates=True, balance=["length"]))
"""


@pytest.mark.slow
def test_any_number_of_workers_writes_the_same_rows_in_the_same_files(
    make_scores: MakeScores, ray_address: str
) -> None:
    draw = np.random.default_rng(8)
    values, tokens = draw.integers(0, 9, ROWS) / 9, draw.integers(1, 600, ROWS)
    hashes = draw.integers(0, ROWS, ROWS)
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    found = []
    alone = {"address": "local", "include_dashboard": False}
    clusters = {"one": {**alone, "num_cpus": 1}, "a few": {"address": ray_address}, "eight": {**alone, "num_cpus": 8}}
    for workers, cluster in clusters.items():
        run = make_scores(
            values, example_id=ids_of(ROWS), num_shards=20, name=f"run-{workers}", num_response_tokens=tokens,
            content_hash=hashes, source=["a"] * ROWS,
        )  # fmt: skip
        command = [sys.executable, "-c", RANK_ALONE, str(run), json.dumps(cluster)]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
        assert ended.returncode == 0, ended.stderr[-3000:]
        places = [run / folder / name for folder in ("ranked", "selected") for name in (run / folder).names()]
        found.append({f"{place}".removeprefix(str(run)): read_parquet(place) for place in places})
    assert len(found[0]) > 10
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for name, table in found[0].items():
            assert table.equals(other[name]), name


def read_scores(run: Run, name: str) -> pa.Table:
    return read_parquet(run / "scores" / name)


def test_the_driver_gets_one_number_a_bin_whatever_the_number_of_shards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """5,000 shards of 1,000 bins each: every shard's own counts would be 80 MB."""
    from process_memory import anonymous_bytes  # here: workers that import this module do not find it

    monkeypatch.undo()
    num_shards, num_bins, rows = 5_000, 1_000, 1_200

    def read(name: str) -> pa.Table:
        values = np.random.default_rng(int(name)).random(rows)
        ids = np.arange(int(name) * rows, (int(name) + 1) * rows)
        return pa.table({"example_id": ids, "davir": values, "status": ["ok"] * rows})

    entries = [FileEntry(name=str(number), rows=rows, bytes=10 * rows, sha256="") for number in range(num_shards)]
    collected = partial(collect, Shards(entries, read))
    got: list[int] = []

    def watched(*given: Any, **options: Any) -> pa.Table:
        table = collected(*given, **options)
        got.append(table.nbytes)
        return table

    before = anonymous_bytes()
    bins = find_bins(watched, num_shards * rows, RankConfig(), num_shards * rows // num_bins)
    rows_by_bin = count_bins(watched, bins)
    assert len(bins) == num_bins
    assert rows_by_bin.sum() == num_shards * rows
    assert max(got) <= 16 * num_bins
    assert anonymous_bytes() - before < 30 * 2**20
