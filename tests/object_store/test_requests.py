"""What the start of a run asks of a store, counted on the wire; and that one of several drivers goes on."""

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import s3fs
from object_store.conftest import make_bucket
from object_store.proxy import FaultyProxy, Headers
from object_store.stores import Store

from davir_ray.config.run import RunConfig
from davir_ray.config.selection import SelectConfig
from davir_ray.errors import OutputError
from davir_ray.pipeline import run_all
from davir_ray.run import lease
from davir_ray.run.folder import Run
from davir_ray.run.lease import LEASE_FILE, Lease
from davir_ray.run.location import Location
from davir_ray.run.manifest import Manifest
from davir_ray.stages import prepare as module

NUM_DRIVERS = 4


@dataclass
class Wire:
    """The requests of this process to the store: method and path of each."""

    bucket: str
    requests: list[tuple[str, str]] = field(default_factory=list)
    before: Callable[[str, str], None] = lambda method, path: None
    """Called with each request before it is passed on."""
    is_conditional: bool = True
    """Whether the store knows If-None-Match."""

    @property
    def run(self) -> Run:
        return Run(Location.of(f"s3://{self.bucket}/runs/new"))

    def during(self, work: Callable[[], object]) -> list[tuple[str, str]]:
        first = len(self.requests)
        work()
        return self.requests[first:]


@pytest.fixture
def wire(moto_store: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Wire]:
    found = Wire(make_bucket(moto_store))

    def change(method: str, path: str, headers: Headers, body: bytes) -> Headers:
        found.requests.append((method, path.removeprefix(f"/{found.bucket}").replace("%2F", "/")))
        found.before(*found.requests[-1])
        return headers if found.is_conditional else moto_store.unconditional(method, path, headers, body)

    with FaultyProxy(moto_store.endpoint, share=0.0, change=change).serving() as proxy:
        for name, value in {**moto_store.environment, "AWS_ENDPOINT_URL": proxy.endpoint}.items():
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        yield found
    s3fs.S3FileSystem.clear_instance_cache()


class TasksBeginError(BaseException):
    """Stands for the sending of prepare's first task."""


@pytest.fixture
def start(
    wire: Wire, base_folder: Path, reference_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], Counter[str]]:
    """A start until prepare's first task: the number of requests of each step, from the probe on."""
    (tmp_path / "rows.jsonl").write_text('{"instruction": "Say yes", "output": "yes"}\n' * 20)
    config = RunConfig(
        data=str(tmp_path / "rows.jsonl"),
        format="alpaca",
        base=str(base_folder),
        reference=str(reference_folder),
        output=str(wire.run),
        select=SelectConfig(top_k=3),
    )
    asked: list[tuple[str, str]] = []

    def begin(*_: object) -> None:
        asked.extend(wire.requests)
        raise TasksBeginError

    def count() -> Counter[str]:
        asked.clear()
        wire.requests.clear()
        with pytest.raises(TasksBeginError):
            run_all(config)
        first = next(number for number, (_, path) in enumerate(asked) if "/probe-" in path)
        return Counter(map(step, asked[first:]))

    monkeypatch.setattr(module, "_run", begin)
    # On a busy machine a heartbeat, or a second look at a lease that was written slowly, would be counted as well.
    monkeypatch.setattr(lease, "BEAT_S", 600.0)
    monkeypatch.setattr(lease, "time", SimpleNamespace(monotonic=lambda: 0.0, sleep=lambda seconds: None))
    return count


def step(request: tuple[str, str]) -> str:
    method, path = request
    if "list-type" in path or "uploads" in path:
        return f"LIST {path.partition('?')[2]}"
    return "probe" if "/probe-" in path else f"{method} {path.removeprefix('/runs/new/')}"


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_new_output_costs_at_most_ten_requests_and_a_continued_one_twenty(start: Callable[[], Counter[str]]) -> None:
    steps = start()
    assert steps.total() <= 10, f"{steps.total()} requests, by step: {dict(steps)}"
    steps = start()
    assert steps.total() <= 20, f"{steps.total()} requests, by step: {dict(steps)}"


def test_a_file_is_read_written_and_deleted_in_a_request_each_there_or_not(wire: Wire) -> None:
    place = wire.run / "file"

    def read_absent() -> None:
        with pytest.raises(FileNotFoundError):
            place.read_bytes()

    works = [read_absent, lambda: place.write_bytes(b"x"), place.read_bytes, *[place.remove_file] * 2, read_absent]
    assert [[method for method, _ in wire.during(work)] for work in works] == [
        ["GET"], ["PUT"], ["GET"], ["DELETE"], ["DELETE"], ["GET"],
    ]  # fmt: skip


def test_manifests_are_read_in_a_request_each_and_those_that_are_not_there_in_none(wire: Wire) -> None:
    for stage in ("score", "prepare"):
        Manifest(stage=stage, fingerprint={}, counts={}, files=[]).write(wire.run.folder)
    found: list[dict[str, Manifest]] = []
    assert len(wire.during(lambda: found.append(wire.run.manifests()))) == 3
    assert [(stage, manifest.stage) for stage, manifest in found[0].items()] == [
        ("prepare", "prepare"), ("score", "score"),
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("is_conditional", [True, False])
def test_of_drivers_that_start_a_new_run_at_the_same_moment_one_goes_on(wire: Wire, is_conditional: bool) -> None:
    """All have seen no lease before the first writes its own."""
    all_have_read, refused = threading.Barrier(NUM_DRIVERS), threading.Semaphore(0)
    num_waiting, refusals = 0, list[str]()

    def wait(method: str, path: str) -> None:
        nonlocal num_waiting
        if method == "PUT" and path.endswith(LEASE_FILE) and num_waiting < NUM_DRIVERS:
            num_waiting += 1
            all_have_read.wait(30)

    def take(number: int) -> set[str] | None:
        try:
            with wire.run.writing(f"base: driver-{number}") as there:
                for _ in range(NUM_DRIVERS - 1):
                    assert refused.acquire(timeout=60)
                return there
        except OutputError as error:
            refusals.append(str(error))
            refused.release()
            return None

    wire.before, wire.is_conditional = wait, is_conditional
    with ThreadPoolExecutor(NUM_DRIVERS) as pool:
        found = list(pool.map(take, range(NUM_DRIVERS)))
    assert ["is being written by process" in refusal for refusal in refusals] == [True] * (NUM_DRIVERS - 1)
    (number,) = [number for number, there in enumerate(found) if there is not None]
    assert found[number] == {"lease.json", "config.yaml"}
    assert (wire.run / "config.yaml").read_text().endswith(f"driver-{number}")
    assert not (wire.run / LEASE_FILE).exists()


@pytest.mark.slow
def test_a_driver_sees_what_another_did_between_its_look_at_the_lease_and_its_own(wire: Wire) -> None:
    """The write of the second driver's lease hangs until the first has begun prepare and ended."""
    second_waits, first_ended = threading.Event(), threading.Event()

    def wait(method: str, path: str) -> None:
        if method == "PUT" and path.endswith(LEASE_FILE) and not second_waits.is_set():
            second_waits.set()
            first_ended.wait(60)

    def come_second() -> set[str]:
        with wire.run.writing("") as there:
            return there

    wire.before = wait
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(come_second)
        second_waits.wait(60)
        with wire.run.writing(""):
            wire.run.note_attempt("prepare_tasks", {"limit": 1})
        first_ended.set()
        assert {"config.yaml", "prepare_tasks", "lease.json"} <= second.result()


@pytest.mark.slow
def test_a_lease_that_another_replaced_with_as_many_bytes_is_not_taken_for_ones_own(wire: Wire) -> None:
    """The listing shows a lease of the same size; only its etag tells whose it is."""
    wire.is_conditional = False
    replaced: list[bytes] = []

    def replace(method: str, path: str) -> None:
        if method == "GET" and "list-type" in path and not replaced:
            replaced.append(b"")
            written = json.loads((wire.run / LEASE_FILE).read_bytes())
            replaced.append(json.dumps({**written, "token": written["token"][::-1]}).encode())
            (wire.run / LEASE_FILE).write_bytes(replaced[-1])

    wire.before = replace
    with pytest.raises(OutputError, match="is being written by process"), Lease(wire.run.folder):
        pytest.fail("the lease is another's")
    assert (wire.run / LEASE_FILE).read_bytes() == replaced[-1]
