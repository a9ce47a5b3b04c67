"""Probes before any work: whether the inputs can be read and the output be written, and what to change if not."""

import threading
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from davir_ray.errors import OutputError, UserError
from davir_ray.run.location import Location
from davir_ray.run.storage_errors import explain, location_errors, user_errors

PROBE_S = 9.0
"""Seconds that a probe may take before the store counts as unreachable."""

_QUICK = {"connect_timeout": 3, "read_timeout": 4, "retries": {"mode": "standard", "max_attempts": 2}}
"""Timeouts and retries of a probe; a run waits longer."""


def check_readable(places: Iterable[tuple[str, type[UserError]]]) -> None:
    """List the bucket of each input URI once; a failure is raised as the error class that the URI is paired with.

    Only a store's answer to a listing distinguishes wrong credentials from a missing permission: its answer about a
    single file has no body.
    """
    seen = set[str]()
    for uri, error_class in places:
        bucket = "/".join(uri.split("/")[:3])
        if "://" in uri and bucket not in seen:
            seen.add(bucket)
            with user_errors(uri, error_class):
                in_time(partial(_list, uri))


def probe_output(run: Location) -> set[str]:
    """Write, list, read and delete a small file in the output; raises OutputError that names the step that failed.

    Returns the names of what else is there. Nothing is left behind: a folder that did not exist is removed again.
    """
    place = _quick(run)
    folders = (Path(place.path), *Path(place.path).parents) if place.is_local else ()
    absent = [folder for folder in folders if not folder.exists()]
    name, content = f"probe-{uuid.uuid4().hex}", uuid.uuid4().bytes
    file, there = place / name, set[str]()
    try:
        _step(run, "written", lambda: file.write_bytes(content))
        _step(run, "listed", lambda: there.update(place.entries()))
        _step(run, "listed", lambda: _expect(name in there, "a new file does not appear in the listing"))
        _step(run, "read", lambda: _expect(file.read_bytes() == content, "a file does not hold what was written"))
        _step(run, "deleted from", file.remove_file)
    except BaseException:
        with suppress(Exception):  # where a step failed, deleting may fail, too
            file.remove_file()
        raise
    finally:
        for folder in absent:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
    return there - {name}


def _step(run: Location, verb: str, work: Callable[[], None]) -> None:
    try:
        in_time(work)
    except location_errors() as error:
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
    """The same location, through a file system with short timeouts and few retries."""
    if "s3" not in place.fs.protocol:
        return place
    options: dict[str, Any] = {**place.fs.storage_options, "config_kwargs": _QUICK, "skip_instance_cache": True}
    fs = type(place.fs)(**options)
    fs.retries = 1
    return Location(fs, place.path)


def in_time(work: Callable[[], object]) -> None:
    """Call `work`; raises TimeoutError if it takes longer than PROBE_S."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001  # raised again below
            raised.append(error)

    # A daemon thread, and no pool: a request that never ends must not keep the process alive.
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(PROBE_S)
    if thread.is_alive():
        raise TimeoutError(f"no answer within {PROBE_S:g} seconds")
    if raised:
        raise raised[0]
