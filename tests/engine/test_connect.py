"""A driver's connection to Ray, and what comes back from workers."""

import inspect
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
import ray
import ray.data.context

from davir_ray.engine import connect as cluster
from davir_ray.engine.shards import Shards
from davir_ray.engine.shuffle import Round, regroup
from davir_ray.errors import ClusterError, IntegrityError, ProgressError, StorageError
from davir_ray.run.files import FileEntry, read_parquet
from davir_ray.run.location import Location

DRIVER = """
import ctypes, logging, os, sys, time
import ray
from davir_ray.cli import exit_status, show_debug
from davir_ray.engine.connect import connected
from davir_ray.engine.console import configure_worker_logging

@ray.remote
def work() -> str:
    configure_worker_logging()
    print("a worker's print", flush=True)
    logging.getLogger("davir_ray.models").warning("a worker's warning")
    logging.getLogger("davir_ray.models").info("a worker's news")
    return os.environ["RAY_ADDRESS"]

def job() -> None:
    if sys.argv[1:] == ["--debug"]:
        show_debug()
    with connected():
        addresses = set(ray.get([work.remote() for _ in range(4)]))
        for line in (b"native noise", b"[today E 1 1] a.cc:1: noise", b"[today C 1 1] a.cc:1: Check failed"):
            ctypes.CDLL(None).write(2, line + b"\\n", len(line) + 1)
        print("a line on standard output")
        time.sleep(3)  # long enough for the lines to come while the driver works
    print("the result", *addresses)

sys.exit(exit_status(job))
"""


def run_driver(address: str, *options: str) -> tuple[str, list[str]]:
    """Standard output of a job, and the lines on standard error."""
    ended = subprocess.run(
        [sys.executable, "-c", DRIVER, *options],
        env={**os.environ, "RAY_ADDRESS": address}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    return ended.stdout, ended.stderr.splitlines()


def test_a_job_shows_its_result_and_what_its_workers_log(ray_address: str) -> None:
    """Ray prints in a driver what any process prints, and its C++ core writes to standard error itself (2.60)."""
    result, lines = run_driver(ray_address)
    assert result == f"the result {ray_address}\n"
    assert sorted(lines) == [
        "Ray: Check failed", "a line on standard output", "a worker's news", "a worker's warning",
    ]  # fmt: skip


@pytest.mark.slow
def test_debug_shows_what_any_process_prints(ray_address: str) -> None:
    result, lines = run_driver(ray_address, "--debug")
    assert result == f"the result {ray_address}\n"
    assert "native noise" in lines
    printed = [line for line in lines if re.fullmatch(r"\(work pid=\d+\) a worker's print", line)]
    assert len(printed) == 4
    assert sum(line.endswith(") a worker's news") for line in lines) == 4


def test_a_connection_that_is_there_leaves_standard_output_alone(ray_session: None) -> None:
    before = sys.stdout
    with cluster.connected():
        assert sys.stdout is before


# --- a Ray that cannot be started or reached -------------------------------------------------------------------------


@pytest.fixture
def closed_port() -> int:
    """A port where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.fixture(params=["silent", "other"])
def listener(request: pytest.FixtureRequest) -> Iterator[int]:
    """The port of a server that says nothing, or something else than Ray."""
    with socket.create_server(("", 0)) as server:
        process = None
        if request.param == "other":
            command = "import http.server, socket, sys; s = http.server.HTTPServer(('', 0), http.server.BaseHTTPRequest"
            command += "Handler, False); s.socket = socket.socket(fileno=int(sys.argv[1])); s.serve_forever()"
            descriptor = server.fileno()
            process = subprocess.Popen(
                [sys.executable, "-c", command, str(descriptor)], pass_fds=[descriptor], stderr=subprocess.DEVNULL
            )
        yield int(server.getsockname()[1])
        if process is not None:
            process.kill()
            process.wait()


def refusal(monkeypatch: pytest.MonkeyPatch, address: str) -> str:
    """What is told of this address, in seconds."""
    monkeypatch.setenv("RAY_ADDRESS", address)
    started = time.monotonic()
    with pytest.raises(ClusterError, match=f"RAY_ADDRESS is {address}") as caught:
        cluster._start()
    assert time.monotonic() - started < 120, "Ray itself would keep trying for ten minutes"
    return str(caught.value)


def test_an_address_where_no_ray_is_is_told_at_once(monkeypatch: pytest.MonkeyPatch, closed_port: int) -> None:
    assert "Connection refused" in refusal(monkeypatch, f"127.0.0.1:{closed_port}")
    assert "Invalid address" in refusal(monkeypatch, "127.0.0.1")
    assert "not known" in refusal(monkeypatch, "no-such-host.invalid:6379")
    assert "Ray Client" in refusal(monkeypatch, f"ray://127.0.0.1:{closed_port}")


def test_what_is_no_ray_is_told_in_time(monkeypatch: pytest.MonkeyPatch, listener: int) -> None:
    monkeypatch.setattr(cluster, "_ANSWER_S", 1.0)
    told = refusal(monkeypatch, f"127.0.0.1:{listener}")
    assert "timed out" in told or "is not Ray" in told


CONNECT = """
import os
import sys
from davir_ray.cli import exit_status

def job() -> None:
    from davir_ray.engine.connect import connected
    with connected():
        print("connected")

statuses = []
for name, value in (pair.split("=", 1) for pair in sys.argv[1:]):
    before = os.environ.copy()
    os.environ[name] = value
    statuses.append(exit_status(job))
    os.environ.clear()
    os.environ.update(before)
sys.exit(statuses != [2] * len(statuses))
"""


def refused(*settings: str, **environment: str) -> list[str]:
    """The lines of a process that cannot connect with each of these settings."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_A", "RAY_TMPDIR"))}
    ended = subprocess.run(
        [sys.executable, "-c", CONNECT, *settings],
        env=kept | environment, capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert (ended.returncode, ended.stdout) == (0, ""), ended.stderr
    assert "Traceback" not in ended.stderr
    return [line for line in ended.stderr.splitlines() if line.startswith("-c: ")]


@pytest.mark.slow
def test_a_ray_that_cannot_be_started_names_the_variable(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 80)
    home, unusable, tmpdir, ray_tmpdir = refused(
        "HOME=/proc/nothing", "RAY_TMPDIR=/proc/nothing", f"TMPDIR={long}", f"RAY_TMPDIR={long}"
    )
    assert "HOME for its token (now /proc/nothing)" in home
    assert "(now /proc/nothing, from RAY_TMPDIR" in unusable
    assert all(
        "AF_UNIX" in line and f"(now {long}, from RAY_TMPDIR, else TMPDIR" in line for line in (tmpdir, ray_tmpdir)
    )


@pytest.mark.slow
def test_a_token_that_the_cluster_does_not_know_is_told(ray_address: str, tmp_path: Path) -> None:
    """A Ray that was started here wants one (2.60)."""
    for environment in ({}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "x" * 40}, {"RAY_AUTH_MODE": "token"}):
        (line,) = refused(f"RAY_ADDRESS={ray_address}", HOME=str(tmp_path), **environment)
        assert f"RAY_ADDRESS is {ray_address}" in line
        assert f"Set RAY_AUTH_MODE=token (it is {environment.get('RAY_AUTH_MODE', 'not set')})" in line


HELPERS = """
import ray
from ray._private import services
from davir_ray.engine.connect import connected

@ray.remote
def found() -> str:
    return services.canonicalize_bootstrap_address_or_die(None)  # as Ray Train's cleaner does

with connected():
    assert ray.get(found.remote()) == ray.get_runtime_context().gcs_address
"""


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_beside_another_ray_the_helpers_find_their_own() -> None:
    kept = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, "-c", HELPERS]
    ended = subprocess.run(command, env=kept, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr


# --- errors of workers -----------------------------------------------------------------------------------------------


def test_a_workers_errors_are_what_they_were(ray_session: None, tmp_path: Path, closed_port: int) -> None:
    (tmp_path / "file").write_bytes(b"no parquet")
    read, connect = ray.remote(read_parquet), ray.remote(socket.create_connection)
    with pytest.raises(StorageError, match=r"file/a: .*Not a directory.*The same command"), cluster.own_errors():
        ray.get(read.remote(Location.of(tmp_path / "file" / "a")))
    with pytest.raises(IntegrityError, match="file is damaged"), cluster.own_errors():
        ray.get(read.remote(Location.of(tmp_path / "file")))
    with pytest.raises(ConnectionRefusedError), cluster.own_errors():
        ray.get(connect.remote(("127.0.0.1", closed_port)))


def test_a_stuck_exchange_names_its_own_limit(ray_session: None) -> None:
    def read(name: str) -> pa.Table:
        time.sleep(6)
        return pa.table({"group": [0]})

    context = ray.data.DataContext.get_current().copy()
    context.execution_no_progress_timeout_s = 1
    shards = Shards([FileEntry(name="a", rows=1, bytes=1, sha256="")], read)
    told = rf"the run is stuck \({cluster.NO_PROGRESS}\): .*timeout: 1s"
    with pytest.raises(ProgressError, match=told) as caught, ray.data.DataContext.current(context):
        regroup(shards, lambda table: table, Round("group", 1, lambda table: table))
    assert "ds.context" not in str(caught.value)
    assert cluster.NO_PROGRESS in inspect.getsource(ray.data.context)
