"""Files in real stores: whole or not there, created once, damage and leftovers found, refusals in plain words."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs
from object_store.conftest import make_bucket
from object_store.proxy import FaultyProxy
from object_store.stores import Store, make_user

from davir_ray.cli import parse_as
from davir_ray.config.run import RunConfig
from davir_ray.config.sources import Source
from davir_ray.data.files import Slice, list_files, plan_tasks
from davir_ray.data.records import Record, count_lines, read_records
from davir_ray.errors import ConfigError, DataError, IntegrityError, ModelError, OutputError
from davir_ray.models.checkpoint import Checkpoint
from davir_ray.run import lease as lease_module
from davir_ray.run.access import check_readable, probe_output
from davir_ray.run.files import file_digest, in_folder, put_folder, read_parquet, write_parquet
from davir_ray.run.lease import LEASE_FILE, Holder, Lease
from davir_ray.run.location import Location, remove_leftovers
from davir_ray.run.manifest import Manifest

TABLE = pa.table({"a": list(range(1000)), "b": ["ü"] * 1000})


def objects(place: Location) -> list[str]:
    place.fs.invalidate_cache()
    return sorted(path.removeprefix(f"{place.path}/") for path in place.fs.find(place.path))


def test_files_come_back_and_go(place: Location) -> None:
    assert not place.exists()
    assert place.names() == []
    (place / "below" / "a").write_bytes(b"\x00one")
    (place / "b.parquet").write_text("größer")
    assert place.names() == ["b.parquet"]
    assert (place / "below" / "a").read_bytes() == b"\x00one"
    assert place.exists()
    place.remove()
    assert objects(place) == []
    with pytest.raises(FileNotFoundError):
        (place / "b.parquet").read_bytes()


def test_only_one_of_many_creates_a_file(place: Location) -> None:
    with ThreadPoolExecutor(8) as pool:
        written = list(pool.map(lambda i: (place / "lease").create(b"%d" % i), range(8)))
    assert sum(written) == 1
    assert (place / "lease").read_bytes() == b"%d" % written.index(True)


@pytest.mark.slow
def test_a_folder_of_files_of_any_size_arrives_whole(place: Location, tmp_path: Path) -> None:
    source = tmp_path / "model"
    (source / "sub").mkdir(parents=True)
    contents = {"config.json": b"{}", "sub/empty": b"", "model.safetensors": bytes(range(256)) * 500_000}  # in parts
    for name, content in contents.items():
        (source / name).write_bytes(content)
    (place / "reference" / "old").write_bytes(b"x")
    put_folder(place / "reference", source)
    assert objects(place / "reference") == sorted(contents)
    for name, content in contents.items():
        assert (place / "reference" / name).read_bytes() == content


def test_a_digest_changes_with_the_content(place: Location) -> None:
    (place / "a").write_bytes(b"one")
    first = file_digest(place / "a")
    assert file_digest(place / "a") == first
    (place / "a").write_bytes(b"two")
    place.fs.invalidate_cache()
    assert file_digest(place / "a") != first


def test_damage_to_a_stage_is_named(place: Location) -> None:
    files = [write_parquet(place / "scores" / f"{name}.parquet", TABLE) for name in "ab"]
    manifest = Manifest(stage="score", fingerprint={}, counts={}, files=in_folder("scores", files)).commit(place)
    assert Manifest.read(place, "score") == manifest
    assert manifest.damage(place) == []
    content = bytearray((place / "scores" / "a.parquet").read_bytes())
    content[len(content) // 2] ^= 1
    (place / "scores" / "a.parquet").write_bytes(bytes(content))
    (line,) = manifest.damage(place)
    assert line.startswith("scores/a.parquet: sha256")
    with pytest.raises(IntegrityError, match=r"s3://.*a\.parquet is damaged"):
        read_parquet(place / "scores" / "a.parquet", ["a", "b"])


def test_an_upload_that_died_is_cleared_away(used: Store, place: Location) -> None:
    call = used.client().call_s3
    bucket, _, prefix = place.path.partition("/")
    for key in (f"{prefix}/reference/model.safetensors", "another-run/a"):
        upload = call("create_multipart_upload", Bucket=bucket, Key=key)["UploadId"]
        call("upload_part", Bucket=bucket, Key=key, UploadId=upload, PartNumber=1, Body=b"x" * 100)
    (place / "a").write_bytes(b"x")
    remove_leftovers(place)
    left = call("list_multipart_uploads", Bucket=bucket).get("Uploads", [])
    assert [upload["Key"] for upload in left] == ["another-run/a"]
    assert objects(place) == ["a"]


def test_a_lease_is_held_by_one_and_taken_from_the_dead(place: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "BEAT_S", 0.2)
    monkeypatch.setattr(lease_module, "MISSED_BEATS", 10)
    with Lease(place):
        with pytest.raises(OutputError, match="being written by process"), Lease(place):
            pass
        deadline = time.monotonic() + 300
        while (holder := Holder.read(place / LEASE_FILE)) is None or holder.beat < 1:
            assert time.monotonic() < deadline, "it has no heartbeat"
            time.sleep(0.05)
    assert not (place / LEASE_FILE).exists()
    (place / LEASE_FILE).write_text('{"machine": "elsewhere"}')
    with Lease(place):
        pass


@pytest.mark.slow
def test_of_two_drivers_one_goes_on_where_the_store_ignores_if_none_match(
    moto_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after the other, and at the same moment: then both have seen no lease before either writes its own."""
    at_once, num_waiting = threading.Barrier(2), 0

    def change(method: str, path: str, headers: dict[str, str], body: bytes) -> dict[str, str]:
        nonlocal num_waiting
        if "both" in path and method == "PUT" and num_waiting < 2:
            num_waiting += 1
            at_once.wait(30)
        return moto_store.unconditional(method, path, headers, body)

    def take(run: Location) -> bool:
        try:
            with Lease(run):
                refused.wait(30)
                return True
        except OutputError:
            refused.set()
            return False

    bucket, refused = make_bucket(moto_store), threading.Event()
    with FaultyProxy(moto_store.endpoint, share=0.0, change=change).serving() as proxy:
        for name, value in {**moto_store.environment, "AWS_ENDPOINT_URL": proxy.endpoint}.items():
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        run = Location.of(f"s3://{bucket}/run")
        assert [(run / "twice").create(b"one"), (run / "twice").create(b"two")] == [True, True]
        with Lease(run):
            first = Holder.read(run / LEASE_FILE)
            with pytest.raises(OutputError, match="being written by process"), Lease(run):
                pass
            assert Holder.read(run / LEASE_FILE) == first
        with ThreadPoolExecutor(2) as pool:
            held = list(pool.map(take, [Location.of(f"s3://{bucket}/both")] * 2))
        assert sorted(held) == [False, True]
    s3fs.S3FileSystem.clear_instance_cache()


def test_pyarrow_reads_what_was_written(used: Store, place: Location) -> None:
    write_parquet(place / "scores" / "a.parquet", TABLE)
    assert pq.read_table(str(place / "scores")).equals(TABLE)


def test_sources_are_found_and_read(place: Location) -> None:
    (place / "data" / "a.jsonl").write_text('{"instruction": "ü", "output": "x"}\n{\n')
    write_parquet(place / "data" / "b.parquet", pa.table({"instruction": ["q"], "output": ["a"]}))
    files = list_files(Source(name="s", path=str(place / "data"), format="alpaca"))
    assert [file.relative_path for file in files] == ["a.jsonl", "b.parquet"]
    assert [type(row).__name__ for file in files for row in read_records(Slice(file))] == ["Record", "Reject", "Record"]


def test_parts_of_a_file_of_lines_are_read_once(place: Location) -> None:
    (place / "a.jsonl").write_text("".join(f'{{"n": {n}, "text": "{"x" * (n % 50)}"}}\n' for n in range(3000)))
    target = 20_000
    (file,) = list_files(Source(name="s", path=str(place / "a.jsonl"), format="alpaca"))
    parts = [piece for task in plan_tasks([file], target) for piece in task]
    firsts = [0, *accumulate(map(count_lines, parts))]
    counted = [part._replace(rows=range(*rows)) for part, rows in zip(parts, pairwise(firsts), strict=True)]
    rows = [row for part in counted for row in read_records(part)]
    assert [(row.source_row, row.fields["n"]) for row in rows if isinstance(row, Record)] == [
        (n, n) for n in range(3000)
    ]
    assert len(parts) == -(-file.num_bytes // target) > 5


# --- refusals --------------------------------------------------------------------------------------------------------


def test_a_good_output_is_left_as_it_was(place: Location) -> None:
    probe_output(place)
    assert objects(place) == []


def with_secret(monkeypatch: pytest.MonkeyPatch, secret: str) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    s3fs.S3FileSystem.clear_instance_cache()


def with_unknown_key(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize("change", [with_secret, with_unknown_key])
def test_wrong_credentials_are_told(
    place: Location, monkeypatch: pytest.MonkeyPatch, change: Callable[[pytest.MonkeyPatch, str], None]
) -> None:
    change(monkeypatch, "not-the-right-one")
    started = time.monotonic()
    with pytest.raises(OutputError, match="cannot be written: wrong credentials") as caught:
        probe_output(Location.of(str(place)))
    with pytest.raises(DataError, match="wrong credentials"):
        check_readable([(f"{place}/data", DataError)])
    assert time.monotonic() - started < 60
    assert "not-the-right-one" not in str(caught.value)


def test_no_credentials_are_told(place: Location, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(OutputError, match="no credentials were found"):
        probe_output(Location.of(str(place)))


@pytest.mark.usefixtures("used")
def test_a_missing_bucket_is_told() -> None:
    with pytest.raises(OutputError, match="missing bucket: no-such-bucket does not exist"):
        probe_output(Location.of("s3://no-such-bucket/run"))
    with pytest.raises(ModelError, match=r"s3://no-such-bucket/model.*missing bucket"):
        check_readable([("s3://no-such-bucket/model", ModelError)])
    with pytest.raises(ConfigError, match=r"s3://no-such-bucket/run.yaml.*missing bucket"):
        parse_as(RunConfig, ["--config", "s3://no-such-bucket/run.yaml"])


def test_a_configuration_is_read_from_the_store(place: Location) -> None:
    with pytest.raises(ConfigError, match=r"run.yaml"):
        parse_as(RunConfig, [f"--config={place}/run.yaml"])
    (place / "run.yaml").write_text("limit: 7")
    assert parse_as(RunConfig, [f"--config={place}/run.yaml"]).limit == 7
    assert parse_as(RunConfig, ["--config", f"{place}/run.yaml", "--limit", "8"]).limit == 8


@pytest.mark.usefixtures("used")
def test_an_unreachable_store_is_told_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    s3fs.S3FileSystem.clear_instance_cache()
    started = time.monotonic()
    with pytest.raises(OutputError, match="cannot be written: unreachable"):
        probe_output(Location.of("s3://bucket/run"))
    assert time.monotonic() - started < 60


def test_throttling_is_told_in_time(used: Store, place: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    with FaultyProxy(used.endpoint, share=1.0).serving() as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        s3fs.S3FileSystem.clear_instance_cache()
        started = time.monotonic()
        with pytest.raises(OutputError, match="cannot be written: throttled"):
            probe_output(Location.of(str(place)))
        assert time.monotonic() - started < 60
        assert proxy.counts["refused"] >= 2


@pytest.mark.slow
def test_some_throttling_is_waited_out(used: Store, place: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    with FaultyProxy(used.endpoint, share=0.3).serving() as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        s3fs.S3FileSystem.clear_instance_cache()
        slow = Location.of(str(place))
        for number in range(20):
            (slow / f"{number}").write_bytes(b"%d" % number)
        assert all((slow / f"{number}").read_bytes() == b"%d" % number for number in range(20))
        assert len(slow.names()) == 20
        assert proxy.counts["refused"] > 5


@pytest.mark.parametrize(
    ("allowed", "step"),
    [
        (["s3:ListBucket", "s3:GetObject"], "written"),
        (["s3:PutObject", "s3:GetObject", "s3:DeleteObject"], "listed"),
        (["s3:PutObject", "s3:ListBucket", "s3:DeleteObject"], "read"),
        (["s3:PutObject", "s3:ListBucket", "s3:GetObject"], "deleted from"),
    ],
)
def test_each_missing_permission_is_told(
    moto_store: Store, monkeypatch: pytest.MonkeyPatch, allowed: list[str], step: str
) -> None:
    name = make_bucket(moto_store)
    key, secret = make_user(
        moto_store.endpoint, f"user-{name}", {"Action": allowed}, aws_access_key_id=moto_store.key,
        aws_secret_access_key=moto_store.secret,
    )  # fmt: skip
    for variable, value in {
        **moto_store.environment,
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": secret,
    }.items():
        monkeypatch.setenv(variable, value)
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(OutputError, match=f"cannot be {step}: missing permission.*AccessDenied"):
        probe_output(Location.of(f"s3://{name}/run"))
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_checkpoint_is_copied_to_the_node_once(
    place: Location, base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DAVIR_RAY_CACHE", str(tmp_path))
    for file in base_folder.iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    (place / "optimizer.pt").write_bytes(b"never read")
    checkpoint = Checkpoint.find(str(place))
    assert checkpoint.weights_digest() == {
        name: file_digest(place / name) for name in ("config.json", "model.safetensors")
    }
    with ThreadPoolExecutor(4) as pool:
        (folder,) = set(pool.map(lambda _: checkpoint._folder(weights=True), range(4)))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        path.name: path.read_bytes() for path in base_folder.iterdir()
    }
    (place / "model.safetensors").write_bytes(b"another")
    assert checkpoint._folder(weights=True) == folder  # whoever has it asks nobody
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="was changed while the run used it"):
        checkpoint._folder(weights=True)
