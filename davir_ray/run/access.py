"""Whether a place can be used: a probe before any work, and what is wrong in the class of the user's mistake."""

import logging
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from davir_ray.errors import OutputError, StorageError, UserError
from davir_ray.run.location import Location
from davir_ray.run.storage_errors import STORE_ERRORS, explain

_LOCATION_ERRORS: tuple[type[Exception], ...] = (*STORE_ERRORS, StorageError, ValueError, ImportError)

log = logging.getLogger(__name__)

PATIENCE_S = 9.0
"""Seconds that a probe may take before the store counts as unreachable."""

_QUICK = {"connect_timeout": 3, "read_timeout": 4, "retries": {"mode": "standard", "max_attempts": 2}}
"""Of a probe: a run waits longer."""


@contextmanager
def translated(uri: object, error_class: type[UserError]) -> Iterator[None]:
    """Turn what a file system raises about a path that the user gave into one line of ours."""
    try:
        yield
    except _LOCATION_ERRORS as error:
        raise error_class(f"{uri} cannot be used: {explain(error, uri)}") from error


def check_readable(places: Iterable[tuple[str, type[UserError]]]) -> None:
    """List the buckets of input URIs, each once; an error of the class that stands beside the URI says what is wrong.

    A store's answer to a question about one file has no body, so that nothing tells wrong credentials from a missing
    permission there; the answer to a listing does.
    """
    seen = set[str]()
    for uri, error_class in places:
        bucket = "/".join(uri.split("/")[:3])
        if "://" in uri and bucket not in seen:
            seen.add(bucket)
            with translated(uri, error_class):
                in_time(partial(_list, uri))


def probe_output(run: Location) -> None:
    """Write, list, read and delete a small file in the output. OutputError says which step failed and what to change.

    Leaves nothing behind, not even the folder where there was none.
    """
    place = _quick(run)
    absent = _absent_folders(place)
    name, content = f"probe-{uuid.uuid4().hex}", uuid.uuid4().bytes
    file = place / name
    try:
        _step(run, "written", lambda: file.write_bytes(content))
        _step(run, "listed", lambda: _expect(name in place.listed(), "a new file does not appear in the listing"))
        _step(run, "read", lambda: _expect(file.read_bytes() == content, "a file does not hold what was written"))
        _step(run, "deleted from", lambda: place.fs.rm_file(file.path))
    finally:
        with suppress(Exception):  # where a step failed, what it leaves may not be deletable either
            place.fs.rm_file(file.path)
        for folder in absent:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def _absent_folders(place: Location) -> list[Path]:
    """Folders that writing in a local place would make, the deepest first."""
    path = Path(place.path)
    return [folder for folder in (path, *path.parents) if not folder.exists()] if place.is_local else []


def _step(run: Location, verb: str, work: Callable[[], None]) -> None:
    try:
        in_time(work)
    except _LOCATION_ERRORS as error:
        raise OutputError(f"output {run} cannot be {verb}: {explain(error, run)}") from error


def _expect(condition: bool, otherwise: str) -> None:
    if not condition:
        raise OSError(otherwise)


def _list(uri: str) -> None:
    place = _quick(Location.of(uri))
    if "s3" in place.fs.protocol:
        bucket, _, prefix = place.path.partition("/")
        place.fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, MaxKeys=1)


def _quick(place: Location) -> Location:
    """The same place through a file system that gives up soon."""
    if "s3" not in place.fs.protocol:
        return place
    options: dict[str, Any] = {**place.fs.storage_options, "config_kwargs": _QUICK, "skip_instance_cache": True}
    fs = type(place.fs)(**options)
    fs.retries = 1
    return Location(fs, place.path)


def in_time(work: Callable[[], object]) -> None:
    """Do something; TimeoutError if it takes longer than a probe may."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001  # raised again below
            raised.append(error)

    # A daemon, and no pool: a request that never ends must not keep the process from ending.
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    if thread.is_alive():
        raise TimeoutError(f"no answer within {PATIENCE_S:g} seconds")
    if raised:
        raise raised[0]
