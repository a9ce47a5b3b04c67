"""Whether a place can be used: a file system's errors in words that tell what to change; a probe before any work.

Wrong credentials, a missing bucket, a missing permission and throttling look alike in a traceback, and want different
people to mend them.
"""

import errno
import logging
import re
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from davir_ray.errors import OutputError, StorageError, UserError
from davir_ray.storage import Location

try:
    from botocore.exceptions import BotoCoreError, ClientError
except ModuleNotFoundError:  # the kernel alone, on a machine without s3fs
    _STORE_ERRORS: tuple[type[Exception], ...] = (OSError,)
else:
    _STORE_ERRORS = (OSError, BotoCoreError, ClientError)

_LOCATION_ERRORS: tuple[type[Exception], ...] = (*_STORE_ERRORS, ValueError, ImportError)

log = logging.getLogger(__name__)

CONTINUES = "The same command goes on where this run stopped"

PATIENCE_S = 9.0
"""Seconds that a probe may take before the store counts as unreachable."""

_QUICK = {"connect_timeout": 3, "read_timeout": 4, "retries": {"mode": "standard", "max_attempts": 2}}
"""Of a probe: a run waits longer."""

_CREDENTIALS = "wrong credentials: the store does not accept them ({code}); check the access key, secret and clock"
_PERMISSION = "missing permission: the credentials are valid but may not do this ({code}); ask for access"
_THROTTLED = "throttled: the store answers that there are too many requests ({code}); try later or with fewer actors"
_REGION = "the bucket is in another region ({code}); set AWS_REGION to it"
_REASONS = {
    "InvalidAccessKeyId": _CREDENTIALS,
    "SignatureDoesNotMatch": _CREDENTIALS,
    "ExpiredToken": _CREDENTIALS,
    "InvalidToken": _CREDENTIALS,
    "InvalidClientTokenId": _CREDENTIALS,
    "RequestTimeTooSkewed": _CREDENTIALS,
    "AccessDenied": _PERMISSION,
    "AllAccessDisabled": _PERMISSION,
    "403": "refused ({code}): wrong credentials or missing permission; check both",
    "NoSuchBucket": "missing bucket: {bucket} does not exist; create it or correct its name",
    "SlowDown": _THROTTLED,
    "ServiceUnavailable": _THROTTLED,
    "503": _THROTTLED,
    "429": _THROTTLED,
    "TooManyRequests": _THROTTLED,
    "PermanentRedirect": _REGION,
    "AuthorizationHeaderMalformed": _REGION,
    "IllegalLocationConstraintException": _REGION,
}
_UNREACHABLE = "unreachable: {error}; check AWS_ENDPOINT_URL and the network"
_NAMES = {
    "NoCredentialsError": "no credentials were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile or a "
    "role, where the driver and the workers see them",
    "PartialCredentialsError": "the credentials are incomplete: {error}",
    "ProfileNotFound": "the profile does not exist: {error}",
    "EndpointConnectionError": _UNREACHABLE,
    "ConnectTimeoutError": _UNREACHABLE,
    "ConnectionClosedError": _UNREACHABLE,
    "ReadTimeoutError": "no answer: {error}; check AWS_ENDPOINT_URL and the network",
}
_LOCAL_PERMISSION = "missing permission: this user may not do this there; change its access or choose another place"
_NUMBERS = {
    errno.ENOSPC: "no space is left there; free some or choose another place",
    errno.EROFS: "it is read-only; choose another place",
    errno.EACCES: _LOCAL_PERMISSION,
    errno.EPERM: _LOCAL_PERMISSION,
    errno.EBUSY: _THROTTLED.format(code="EBUSY"),
}


def explain(error: BaseException, place: object = "") -> str:
    """What a file system's error means and what to change; for an unknown one its type and text."""
    bucket = str(place).partition("://")[2].split("/")[0] or "the bucket"
    for cause in _causes(error):
        code = _code(cause)
        if code in _REASONS:
            return _REASONS[code].format(code=code, bucket=bucket)
        if type(cause).__name__ in _NAMES:
            return _NAMES[type(cause).__name__].format(error=_one_line(cause))
        if isinstance(cause, OSError) and cause.errno in _NUMBERS:
            return _NUMBERS[cause.errno]
    if isinstance(error, FileNotFoundError):
        return "it does not exist; correct the path or restore it"
    return f"{type(error).__name__}: {_one_line(error)}; check path and access"


def explain_text(text: str) -> str | None:
    """The same of a traceback's text, where only that is left of an error; None if no storage failed in it."""
    for code in re.findall(r"An error occurred \((\w+)\)", text):
        if code in _REASONS:
            return _REASONS[code].format(code=code, bucket="the bucket")
    for name, told in re.findall(r"botocore\.exceptions\.(\w+): (.+)", text):
        if name in _NAMES:
            return _NAMES[name].format(error=told)
    for number, told in re.findall(r"^\w*Error: \[Errno (\d+)\] (.*)", text, re.MULTILINE):
        return str(_NUMBERS.get(int(number), told))
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it was raised from: s3fs keeps the store's own answer there."""
    while error is not None:
        yield error
        error = error.__cause__


def _code(error: BaseException) -> str | None:
    response = getattr(error, "response", None)
    return str(response.get("Error", {}).get("Code")) if isinstance(response, dict) else None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


@contextmanager
def translated(uri: object, error_class: type[UserError]) -> Iterator[None]:
    """Turn what a file system raises about a path that the user gave into one line of ours."""
    try:
        yield
    except _LOCATION_ERRORS as error:
        raise error_class(f"{uri} cannot be used: {explain(error, uri)}") from error


@contextmanager
def storage_errors(place: object) -> Iterator[None]:
    """Turn what a file system raises in the middle of a run into one line."""
    try:
        yield
    except _STORE_ERRORS as error:
        raise StorageError(f"{place}: {explain(error, place)}. {CONTINUES}") from error


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
