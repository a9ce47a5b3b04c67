"""Rows that are grouped across shards are those that pandas groups, and come back whole after a death."""

import os
import signal
import subprocess
import sys
import textwrap
import time
import uuid
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import ray.data

from davir_ray.engine import shuffle, tasks
from davir_ray.engine.shards import Shards, grouped
from davir_ray.engine.shuffle import Round, Written, collect, exchange, gather, regroup, write_shards
from davir_ray.errors import DataError, IntegrityError
from davir_ray.run.files import FileEntry

pytestmark = pytest.mark.usefixtures("ray_session")

SCHEMA = pa.schema({"number": pa.int64(), "text": pa.string()})


def rows_of(name: str) -> pa.Table:
    """Rows of numbers -1 to 8, drawn by the shard's number; shard 3 has none."""
    shard = int(name)
    numbers = np.random.default_rng(shard).integers(-1, 9, 0 if shard == 3 else 20)
    return pa.table({"number": numbers, "text": [f"{shard}-{at}" for at in range(len(numbers))]}, schema=SCHEMA)


@pytest.fixture
def shards() -> Shards:
    sizes = [2**20 * (1 + number % 3) for number in range(7)]
    return Shards([FileEntry(name=str(n), rows=20, bytes=size, sha256="") for n, size in enumerate(sizes)], rows_of)


@pytest.fixture
def expected(shards: Shards) -> pd.DataFrame:
    return pd.concat([rows_of(entry.name).to_pandas() for entry in shards.entries])


def test_shards_are_grouped_in_order_by_number_and_bytes() -> None:
    entries = [FileEntry(name=str(n), rows=1, bytes=size, sha256="") for n, size in enumerate([5, 5, 90, 200, 1, 1, 1])]
    groups = grouped(entries, max_shards=2, max_bytes=100)
    assert [[entry.name for entry in group] for group in groups] == [["0", "1"], ["2"], ["3"], ["4", "5"], ["6"]]


def test_a_billion_rows_make_few_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    """68 GB of scores in 20,000 shards, on 100 nodes of 16 cores: 5,000 bins."""
    monkeypatch.setattr(shuffle, "num_cpus", lambda: 1600.0)
    entries = [FileEntry(name=str(n), rows=50_000, bytes=3_400_000, sha256="") for n in range(20_000)]
    shards = Shards(entries, rows_of)
    reading = shuffle._grouped_for_tasks(shards, max_bytes=shuffle._KEPT_BYTES)
    edges = shuffle._edges(5000, shards.num_bytes, len(reading))
    assert len(reading) <= 550
    assert len(reading) * (len(edges) - 1) < 150_000
    assert max(np.diff(edges)) <= 25
    assert (edges[0], edges[-1]) == (0, 5000)
    assert sum(len(group) for group in reading) == 20_000


def test_small_tables_come_back_in_order_or_merged(shards: Shards, expected: pd.DataFrame) -> None:
    assert gather(shards, SCHEMA).to_pandas().equals(expected.reset_index(drop=True))
    counted = pa.schema({"rows": pa.int64()})
    rows = collect(shards, lambda table: pa.table({"rows": [table.num_rows]}), counted)
    assert rows["rows"].to_pylist() == [20, 20, 20, 0, 20, 20, 20]

    def total(table: pa.Table) -> pa.Table:
        return pa.table({"rows": [sum(table["rows"].to_pylist())]})

    def doubled(table: pa.Table) -> pa.Table:
        return pa.table({"twice": pa.array(2 * np.asarray(table["rows"]))})

    count = partial(collect, shards, lambda table: pa.table({"rows": [table.num_rows]}), counted)
    assert count(merge=total).to_pylist() == [{"rows": 120}]
    assert count(merge=total, finish=doubled).to_pylist() == [{"twice": 240}]
    assert count(finish=doubled)["twice"].to_pylist() == [40, 40, 40, 0, 40, 40, 40]


@pytest.mark.parametrize("tasks_per_cpu", [0.01, 0.5, 4])
def test_a_group_has_all_its_rows(
    shards: Shards, expected: pd.DataFrame, tasks_per_cpu: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shuffle, "_TASKS_PER_CPU", tasks_per_cpu)
    found = regroup(shards, lambda table: table, Round("number", 9, lambda rows: sorted(rows["text"].to_pylist())))
    assert found == [sorted(texts) for number, texts in expected.groupby("number")["text"] if number >= 0]


def test_a_second_round_takes_what_the_first_made(shards: Shards, expected: pd.DataFrame) -> None:
    """First by number, where groups below 3 make no row, then by the number's parity."""

    def parity(rows: pa.Table) -> pa.Table:
        rows = rows.slice(0, 0) if rows["number"][0].as_py() < 3 else rows
        return rows.append_column("parity", pa.array(np.asarray(rows["number"]) % 2))

    found = regroup(
        shards, lambda table: table, Round("number", 9, parity), Round("parity", 2, lambda rows: rows.num_rows)
    )
    kept = expected["number"][expected["number"] >= 3] % 2
    assert found == kept.groupby(kept).size().tolist()


def test_nothing_to_group_is_nothing(shards: Shards) -> None:
    no_row = Round("number", 9, lambda rows: rows)
    assert regroup(shards, lambda table: table.slice(0, 0), no_row, no_row) == []
    assert regroup(Shards([], rows_of), lambda table: table, no_row) == []
    assert gather(Shards([], rows_of), SCHEMA).equals(SCHEMA.empty_table())


def test_files_are_written_where_shards_are_read(shards: Shards) -> None:
    def write(name: str, rows: pa.Table) -> Written | None:
        return Written(FileEntry(name=f"{name}.txt", rows=rows.num_rows, bytes=0, sha256="")) if rows.num_rows else None

    written = write_shards(shards, write)
    assert [one.entry.name for one in written] == ["0.txt", "1.txt", "2.txt", "4.txt", "5.txt", "6.txt"]


def test_text_beyond_32_bits_has_64_bit_offsets(shards: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shuffle, "_WIDE_BYTES", 300)  # in the driver; workers have their own
    wide = shuffle._as_one([rows_of("0"), rows_of("1")])
    assert wide.schema.field("text").type == pa.large_string()
    assert wide.cast(SCHEMA).equals(pa.concat_tables([rows_of("0"), rows_of("1")]).combine_chunks())
    mixed = shuffle._as_one([rows_of("0"), wide])
    assert mixed.num_rows == 60


def test_a_number_that_no_group_has_is_refused(shards: Shards) -> None:
    with pytest.raises(IntegrityError, match=r"the column number has 8, above its 8 groups"):
        regroup(shards, lambda table: table, Round("number", 8, lambda rows: rows))


def test_stages_that_go_on_are_not_stuck(shards: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver's clock counts the shards that were read: those that tasks have in hand are fewer than the limit."""
    monkeypatch.setattr(tasks, "time", SimpleNamespace(monotonic=lambda: float(len(list(tmp_path.iterdir())))))
    monkeypatch.setattr(tasks, "_LOOK_S", 0.01)
    context = ray.data.DataContext.get_current().copy()
    context.execution_no_progress_timeout_s = 12

    def slowly(table: pa.Table) -> pa.Table:
        (tmp_path / uuid.uuid4().hex).touch()
        time.sleep(0.1)
        return table

    with ray.data.DataContext.current(context):
        rows = regroup(
            Shards([entry for entry in shards.entries for _ in range(3)], rows_of),
            slowly,
            Round("number", 9, lambda rows: rows.num_rows),
        )
    assert len(rows) == 9
    assert len(list(tmp_path.iterdir())) == 21


def test_an_error_of_a_task_is_what_it_was(shards: Shards) -> None:
    def refuse(table: pa.Table) -> pa.Table:
        raise DataError("no such row")

    with pytest.raises(DataError, match=r"^no such row$"):
        regroup(shards, refuse, Round("number", 9, lambda rows: rows))


def write_once_killed(number: int, rows: pa.Table, mark: Path) -> FileEntry:
    """The first worker that gets here dies."""
    if number == 4 and not mark.exists():
        mark.write_text("here")
        os.kill(os.getpid(), signal.SIGKILL)
    return FileEntry(name=f"{number}", rows=rows.num_rows, bytes=0, sha256="")


def test_a_worker_that_dies_changes_nothing(shards: Shards, expected: pd.DataFrame, tmp_path: Path) -> None:
    entries = exchange(
        shards,
        lambda table: table.rename_columns(["bin", "text"]),
        9,
        partial(write_once_killed, mark=tmp_path / "mark"),
    )
    assert (tmp_path / "mark").exists()
    sizes = expected["number"][expected["number"] >= 0].value_counts().sort_index()
    assert {int(entry.name): entry.rows for entry in entries} == sizes.to_dict()


SPILLING = """
    import numpy as np, pyarrow as pa, ray
    from davir_ray.engine.shards import Shards
    from davir_ray.engine.shuffle import Round, regroup
    from davir_ray.run.files import FileEntry

    ray.init("local", num_cpus=3, object_store_memory=80 * 2**20, include_dashboard=False)
    num_rows = 2**16

    def read(name):
        values = np.random.default_rng(int(name)).integers(0, 2**62, (10, num_rows))
        return pa.table({"group": values[0] % 12, **{f"column {at}": row for at, row in enumerate(values)}})

    shards = Shards([FileEntry(name=str(n), rows=num_rows, bytes=4 * 2**20, sha256="") for n in range(60)], read)
    sums = regroup(shards, lambda table: table, Round("group", 12, lambda rows: (rows.num_rows, rows.nbytes)))
    assert sum(rows for rows, _ in sums) == 60 * num_rows, sums
    assert sum(size for _, size in sums) > 3 * 80 * 2**20
"""


@pytest.mark.slow
def test_rows_that_do_not_fit_the_object_store_are_spilled() -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SPILLING)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr


LOST_NODE = """
    import sys, threading, time, uuid
    from pathlib import Path
    import numpy as np, pyarrow as pa, ray
    from ray.cluster_utils import Cluster
    from davir_ray.engine.shards import Shards
    from davir_ray.engine.shuffle import exchange
    from davir_ray.run.files import FileEntry

    folder, num_shards, num_rows, num_bins = Path(sys.argv[1]), 40, 2**15, 6

    def read(name):
        time.sleep(0.3)
        (folder / f"read-{name}-{uuid.uuid4().hex}").write_text(ray.get_runtime_context().get_node_id())
        values = np.random.default_rng(int(name)).integers(0, 2**40, num_rows)
        return pa.table({"bin": values % num_bins, "value": values})

    def write(number, rows):
        (folder / f"bin-{number}").write_text(str(int(np.asarray(rows["value"]).sum())))
        return FileEntry(name=str(number), rows=rows.num_rows, bytes=0, sha256="")

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": 100 * 2**20})
    node = cluster.add_node(num_cpus=2, object_store_memory=100 * 2**20)

    def lose():
        while len(list(folder.glob("read-*"))) < num_shards // 2:
            time.sleep(0.02)
        assert not list(folder.glob("bin-*")), "all was read before the loss"
        node.kill_raylet()

    threading.Thread(target=lose).start()
    try:
        ray.init(cluster.address, log_to_driver=False)
        files = [FileEntry(name=str(n), rows=num_rows, bytes=2**19, sha256="") for n in range(num_shards)]
        entries = exchange(Shards(files, read), lambda table: table, num_bins, write)
    finally:
        ray.shutdown()
        cluster.shutdown()
    read_on = [file.read_text() for file in folder.glob("read-*")]
    assert len(set(read_on)) == 2 and len(read_on) > num_shards, (len(set(read_on)), len(read_on))
    values = np.concatenate([np.random.default_rng(n).integers(0, 2**40, num_rows) for n in range(num_shards)])
    for number in range(num_bins):
        assert int((folder / f"bin-{number}").read_text()) == int(values[values % num_bins == number].sum())
    assert [entry.rows for entry in entries] == [int((values % num_bins == n).sum()) for n in range(num_bins)]
"""


@pytest.mark.slow
def test_a_node_that_dies_changes_nothing(tmp_path: Path) -> None:
    """What it had read is read again on the other; the sums are NumPy's own."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(LOST_NODE), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
