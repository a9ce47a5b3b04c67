"""Errors of file systems, translated where the call is made into one line that says what to change.

Wrong credentials, a missing bucket, a missing permission and throttling look alike in a traceback, and different people
have to fix them. Put only calls of a file system inside `storage_errors` and `user_errors`, so that any other error
keeps its traceback.
"""

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from davir_ray.errors import StorageError, UserError
from davir_ray.text import one_line

_OF_STORES = {"aiohttp": ("ClientError",), "botocore.exceptions": ("BotoCoreError", "ClientError")}
"""The errors of stores by their module."""

CONTINUES = "The same command continues where this run stopped"
"""Last sentence of an error after which the user only needs to try again."""

_CREDENTIALS = "wrong credentials: the store does not accept them ({code}); check the access key, secret and clock"
_PERMISSION = "missing permission: the credentials are valid but may not do this ({code}); ask for access"
_THROTTLED = "throttled: the store answers that there are too many requests ({code}); try later or with fewer actors"
_REGION = "the bucket is in another region ({code}); set AWS_REGION to it"
_REASONS = {
    **dict.fromkeys(["InvalidAccessKeyId", "SignatureDoesNotMatch", "RequestTimeTooSkewed"], _CREDENTIALS),
    **dict.fromkeys(["ExpiredToken", "InvalidToken", "InvalidClientTokenId"], _CREDENTIALS),
    **dict.fromkeys(["AccessDenied", "AllAccessDisabled"], _PERMISSION),
    "403": "refused ({code}): wrong credentials or missing permission; check both",
    "NoSuchBucket": "missing bucket: {bucket} does not exist; create it or correct its name",
    **dict.fromkeys(["SlowDown", "ServiceUnavailable", "503", "429", "TooManyRequests"], _THROTTLED),
    **dict.fromkeys(["PermanentRedirect", "AuthorizationHeaderMalformed"], _REGION),
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
_FULL = "no space is left there; free some or choose another place"
_LOCAL_PERMISSION = "missing permission: this user may not do this there; change its access or choose another place"
_ERRNOS = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EROFS: "it is read-only; choose another place",
    errno.EACCES: _LOCAL_PERMISSION,
    errno.EPERM: _LOCAL_PERMISSION,
    errno.EBUSY: _THROTTLED.format(code="EBUSY"),
}


def explain(error: BaseException, place: object = "") -> str:
    """What a file system's error means and what to change; for an unknown one its type and text."""
    if isinstance(error, StorageError):  # translated before; one from a worker comes without the file system's error
        if not isinstance(error.__cause__, store_errors()):
            return str(error)
        error = error.__cause__
    bucket = str(place).partition("://")[2].split("/")[0] or "the bucket"
    cause: BaseException | None = error
    while cause is not None:  # s3fs keeps the store's own answer in what its error was raised from
        response = getattr(cause, "response", None)
        code = str(response.get("Error", {}).get("Code")) if isinstance(response, dict) else None
        if code in _REASONS:
            return _REASONS[code].format(code=code, bucket=bucket)
        if type(cause).__name__ in _NAMES:
            return _NAMES[type(cause).__name__].format(error=one_line(cause, 300))
        if isinstance(cause, OSError) and cause.errno in _ERRNOS:
            return _ERRNOS[cause.errno]
        cause = cause.__cause__
    if isinstance(error, FileNotFoundError):
        return "it does not exist; correct the path or restore it"
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8 text ({error}); save it as UTF-8"
    return f"{type(error).__name__}: {one_line(error, 300)}; check path and access"


def store_errors() -> tuple[type[Exception], ...]:
    """The errors that a call of a file system raises.

    Those of stores are looked up where one was used: importing them takes every process of a run a third of a second.
    """
    found = (getattr(sys.modules.get(module), name, None) for module, names in _OF_STORES.items() for name in names)
    return (OSError, *(kind for kind in found if kind is not None))


def location_errors() -> tuple[type[Exception], ...]:
    """The errors of the first use of a path, whose protocol may be unknown, or need a package that is missing."""
    return (*store_errors(), StorageError, ValueError, ImportError)


@contextmanager
def storage_errors(place: object, *, may_be_absent: bool = False) -> Iterator[None]:
    """Turn what a file system raises into a StorageError, except FileNotFoundError with `may_be_absent`."""
    try:
        yield
    except store_errors() as error:
        if may_be_absent and isinstance(error, FileNotFoundError):
            raise
        raise StorageError(f"{place}: {explain(error, place)}. {CONTINUES}") from error


@contextmanager
def user_errors(place: object, error_class: type[UserError]) -> Iterator[None]:
    """Turn what a file system raises about a path that the user gave into an error of this class."""
    try:
        yield
    except location_errors() as error:
        raise error_class(f"{place} cannot be used: {explain(error, place)}") from error
