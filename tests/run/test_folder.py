"""The output of a job while it runs: how it ended is in progress.json, and only storage's errors are storage errors."""

import socket
from collections.abc import Callable

import jinja2
import pytest
from drivers import PACKAGE

from davir_ray.config.run import RunConfig
from davir_ray.config.yaml import dump
from davir_ray.errors import DataError, StorageError
from davir_ray.run.folder import Run
from davir_ray.run.lease import LEASE_FILE
from davir_ray.run.location import Location
from davir_ray.run.progress import Progress


def find_no_template() -> None:
    jinja2.Environment(loader=jinja2.FileSystemLoader(PACKAGE), autoescape=True).get_template("report.html.j2")


def lose_connection() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
    socket.create_connection(address)


def find_no_column() -> None:
    {}["column"]


def find_bad_data() -> None:
    raise DataError("too much of it\nis bad")


@pytest.mark.parametrize(
    ("work", "kind", "expected"),
    [
        (find_no_template, jinja2.TemplateNotFound, "TemplateNotFound: "),
        (lose_connection, ConnectionRefusedError, "ConnectionRefusedError: [Errno 111] Connection refused"),
        (find_no_column, KeyError, "KeyError: 'column'"),
        (find_bad_data, DataError, "too much of it is bad"),
    ],
)
def test_an_error_stays_itself_and_is_in_the_progress(
    work: Callable[[], None], kind: type[Exception], expected: str, local: Location
) -> None:
    with pytest.raises(kind), Run(local).writing(dump(RunConfig())):
        work()
    progress = Progress.read(local)
    assert progress is not None
    assert progress.state == "failed"
    assert progress.error is not None
    assert progress.error.startswith(expected)
    assert not (local / LEASE_FILE).exists()


def test_a_disk_that_fails_is_a_storage_error(local: Location) -> None:
    with pytest.raises(StorageError, match="The same command continues"), Run(local).writing(dump(RunConfig())):
        (local / "config.yaml" / "below").write_bytes(b"x")
    progress = Progress.read(local)
    assert progress is not None
    assert progress.error is not None
    assert progress.error.startswith(f"{local}/config.yaml/below: FileExistsError")
