"""Files of a remote checkpoint: one copy of each on a node, made under a lock.

A file appears under its final name only when it is complete. So an interrupted copy continues with the files that are
missing, and a worker that finds every file at its full size sends no request.
"""

import errno
import logging
import shutil
import socket
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout

from davir_ray.errors import ModelError
from davir_ray.run.files import content_digest, digest, user_cache
from davir_ray.run.location import TEMPORARY, Location, each
from davir_ray.run.storage_errors import explain, storage_errors

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RemoteFile:
    """A file of a checkpoint, as listed when the checkpoint was found."""

    name: str
    bytes: int
    digest: str = ""
    """Identifies the content; empty if a commit pins all files."""


def store_files(place: Location) -> tuple[RemoteFile, ...]:
    """The files directly in a folder of object storage, from one listing."""
    return tuple(
        RemoteFile(name, found.bytes, f"{found.bytes}-{found.mark}" if found.mark else content_digest(place / name))
        for name, found in place.listed().items()
    )


def fetch_from_store(place: Location, files: tuple[RemoteFile, ...], wanted: list[RemoteFile]) -> Path:
    """Copy the wanted files of a folder to this node's cache; returns the folder in the cache.

    ModelError if the cache cannot hold them or they changed since they were listed; StorageError if the store fails.
    """
    folder = _copy_of(files)

    def copy(missing: list[RemoteFile]) -> None:
        folder.mkdir(exist_ok=True)
        for left in folder.glob(f"{TEMPORARY}*"):
            left.unlink()
        with storage_errors(place):
            each(partial(_copy, place, folder), missing)
            _check_unchanged(place, folder, missing)

    download_missing(str(place), folder, wanted, folder.with_suffix(".lock"), copy)
    return folder


def forget_from_store(files: tuple[RemoteFile, ...]) -> None:
    """Delete this node's copy of a folder's files, if it has one. Models that were loaded from it are not affected."""
    folder = _copy_of(files)
    with suppress(FileNotFoundError):
        shutil.rmtree(folder)
    folder.with_suffix(".lock").unlink(missing_ok=True)


def _copy_of(files: tuple[RemoteFile, ...]) -> Path:
    return user_cache() / "checkpoints" / digest([(file.name, file.digest) for file in files])[:32]


def download_missing(
    uri: str, folder: Path, wanted: list[RemoteFile], lock: Path, download: Callable[[list[RemoteFile]], None]
) -> None:
    """Call `download` for the files that this folder lacks, if any, in one process of the node at a time.

    ModelError if the disk has no room, or this user may not write to it.
    """
    if not missing_files(folder, wanted):
        return
    with _node_lock(uri, lock):
        missing = missing_files(folder, wanted)
        if not missing:
            return
        num_bytes = sum(file.bytes for file in missing)
        _check_room(uri, lock.parent, num_bytes)
        log.info("%s: downloading %d files, %.3g MB, to %s", uri, len(missing), num_bytes / 1e6, host())
        download(missing)
        if still := missing_files(folder, wanted):
            raise ModelError(
                f"{uri}: {still[0].name} is incomplete in {folder} on {host()} after the download; try again"
            )


def missing_files(folder: Path, files: Iterable[RemoteFile]) -> list[RemoteFile]:
    """Files that the folder does not hold in their full length."""
    return [file for file in files if not _is_whole(folder / file.name, file.bytes)]


def host() -> str:
    """Name of this node, for messages: an error may concern one node only."""
    return socket.gethostname()


def _is_whole(path: Path, num_bytes: int) -> bool:
    try:
        return path.stat().st_size == num_bytes
    except (FileNotFoundError, NotADirectoryError):
        return False


@contextmanager
def _node_lock(uri: str, lock: Path) -> Iterator[None]:
    """Hold a node-wide lock for the block; it is released if the process dies. ModelError if it cannot be created."""
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(lock, mode=0o664)  # several users may share the cache
        try:
            held.acquire(timeout=0)
        except Timeout:
            log.info("%s: waiting for another process of %s that downloads it", uri, host())
            held.acquire()
    except OSError as error:
        raise ModelError(f"{uri} cannot be kept in {lock.parent} on {host()}: {explain(error)}") from error
    try:
        yield
    finally:
        held.release()


def _check_room(uri: str, folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise ModelError(
            f"{uri} needs {num_bytes / 1e9:.3g} GB in {folder} on {host()}, which has {free / 1e9:.3g} GB free; free "
            "some space, or name another disk (DAVIR_RAY_CACHE for s3://, HF_HOME for the hub)"
        )


def _copy(place: Location, folder: Path, file: RemoteFile) -> None:
    partial_file = folder / f"{TEMPORARY}{uuid.uuid4().hex}"
    try:
        place.fs.get_file((place / file.name).path, str(partial_file))
        partial_file.replace(folder / file.name)
    except OSError as error:
        partial_file.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ModelError(f"{place} cannot be kept in {folder} on {host()}: {explain(error)}") from error
        raise


def _check_unchanged(place: Location, folder: Path, copied: list[RemoteFile]) -> None:
    """Raise ModelError if the store's files changed since they were listed; other nodes may have older copies."""
    now = {name: f"{found.bytes}-{found.mark}" for name, found in place.listed().items() if found.mark}
    for file in copied:
        if now.get(file.name, file.digest) != file.digest or not _is_whole(folder / file.name, file.bytes):
            (folder / file.name).unlink()
            raise ModelError(f"{place / file.name} was changed while the run used it; start the run again")
