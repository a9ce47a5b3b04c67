"""A local path or an object-store URI through fsspec: links are followed, files are replaced atomically."""

import logging
import os
import posixpath
import re
import shutil
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from davir_ray.run.storage_errors import storage_errors, store_errors
from davir_ray.text import decoded

log = logging.getLogger(__name__)

_Item = TypeVar("_Item")

_Result = TypeVar("_Result")

TEMPORARY = ".partial-"
"""Prefix of the names of unfinished files: readers skip them, and the next driver removes those of one that died."""

_S3 = ("s3://", "s3a://")

_S3_OPTIONS = {"config_kwargs": {"retries": {"mode": "standard", "max_attempts": 6}}}
"""Exponential backoff of up to 20 s where a store throttles. s3fs retries five times on its own, but not a throttled
HEAD, whose answer has no body to recognise it by. AWS_RETRY_MODE and AWS_MAX_ATTEMPTS take precedence where set."""

_THREADS = 32
"""Concurrent requests where many files are looked at: they wait for the store, not for this process."""

_AHEAD = 16
"""Results that are computed before they are asked for, where each may be large."""

DANGLING = "dangling link"

CYCLE = "link to a folder that it lies in"
"""DANGLING and CYCLE are types of entries in a local listing, in addition to fsspec's `file`, `directory`, `other`."""

LFS_POINTER = re.compile(rb"version https://git-lfs\.github\.com/spec/v1\r?\n(ext-.*\n)*oid ")
"""Beginning of the small text file that Git LFS puts in place of a file that it has not downloaded."""

LFS_POINTER_BYTES = 1024
"""Upper limit of a pointer's size, by Git LFS's specification."""


class LinkedFileSystem(LocalFileSystem):  # type: ignore[misc]
    """The local file system, with links followed in listings, too; fsspec reports them as `other` there.

    Linked folders are entered, except where a link points to a folder above it, which would be listed without end. A
    folder that cannot be listed is an error unless it is hidden; fsspec treats it as empty.
    """

    def info(self, path: Any, **kwargs: Any) -> dict[str, Any]:
        """Type, size and times of a path or of an entry of a listing."""
        if not (isinstance(path, os.DirEntry) and path.is_symlink()):
            return dict(super().info(path, **kwargs))
        try:
            found = dict(super().info(path.path, **kwargs))
        except OSError:  # it points to nothing, to itself, or to where this user has no access
            return {**super().info(path, **kwargs), "type": DANGLING}
        if found["type"] == "directory":
            target = os.path.realpath(path.path)
            if any(os.path.realpath(folder) == target for folder in Path(path.path).parents):
                found["type"] = CYCLE
        return found

    def walk(
        self, path: str, maxdepth: int | None = None, topdown: bool = True, on_error: Any = None, **kwargs: Any
    ) -> Iterator[tuple[str, Any, Any]]:
        """Walk the folders below a path; yields nothing if there is no folder."""
        yield from super().walk(path, maxdepth, topdown, on_error or _raise_unless_absent, **kwargs)


def _raise_unless_absent(error: OSError) -> None:
    name = os.path.basename(str(error.filename))
    if not (isinstance(error, FileNotFoundError) or name.startswith(".") or name == "lost+found"):
        raise error


def file_system(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a path or URI, and the path in it.

    It is fsspec's, but S3 has more retries for a store that throttles, and the local one follows links.
    """
    more_retries = uri.startswith(_S3) and not {"AWS_RETRY_MODE", "AWS_MAX_ATTEMPTS"} & os.environ.keys()
    fs, path = fsspec.core.url_to_fs(uri, **(_S3_OPTIONS if more_retries else {}))
    return LinkedFileSystem() if type(fs) is LocalFileSystem else fs, str(path)


class FileInfo(NamedTuple):
    """A file's size, and what changes when the file is written again."""

    bytes: int
    mark: str | None
    """The store's etag, else the modification time; None where a file system has neither."""


def file_info(info: Mapping[str, Any]) -> FileInfo:
    """Size and mark of a file, from fsspec's answer about it."""
    mark = info.get("ETag") or info.get("etag") or info.get("mtime") or info.get("LastModified")
    num_bytes = int(info.get("size") or 0)  # None where a web server does not say
    return FileInfo(num_bytes, None if mark is None else str(mark).strip('"'))


@dataclass(frozen=True)
class Location:
    """A file or a folder in a file system, which need not exist. Picklable."""

    fs: fsspec.AbstractFileSystem
    path: str

    @classmethod
    def of(cls, uri: str | os.PathLike[str]) -> Self:
        """The location of a local path or a URI such as s3://bucket/key; credentials come from the default chain."""
        fs, path = file_system(os.fspath(uri))
        return cls(fs, path.rstrip("/") or "/")

    def __truediv__(self, name: str) -> "Location":
        return Location(self.fs, posixpath.join(self.path, name))

    def __str__(self) -> str:
        return self.path if self.is_local else str(self.fs.unstrip_protocol(self.path))

    @property
    def name(self) -> str:
        """The last part of the path."""
        return posixpath.basename(self.path)

    @property
    def parent(self) -> "Location":
        """The folder that contains this."""
        return Location(self.fs, posixpath.dirname(self.path))

    @property
    def is_local(self) -> bool:
        """Whether this is a path in the local file system."""
        return isinstance(self.fs, LocalFileSystem)

    def exists(self) -> bool:
        """Whether the file or folder exists now."""
        self.fs.invalidate_cache()
        with storage_errors(self):
            return bool(self.fs.exists(self.path))

    def info(self) -> FileInfo:
        """Size and mark of the file; raises FileNotFoundError if it does not exist."""
        with storage_errors(self, may_be_absent=True):
            return file_info(self.fs.info(self.path))

    def names(self, suffix: str = "") -> list[str]:
        """Sorted names of the finished files directly in this folder; empty if there is no folder."""
        return [name for name in self.listed() if name.endswith(suffix)]

    def entries(self) -> dict[str, dict[str, Any]]:
        """What is directly in this folder, by name, from one listing; empty if there is no folder."""
        self.fs.invalidate_cache()
        try:
            with storage_errors(self, may_be_absent=True):
                return {posixpath.basename(info["name"]): info for info in self.fs.ls(self.path, detail=True)}
        except FileNotFoundError:
            return {}

    def listed(self) -> dict[str, FileInfo]:
        """The finished files directly in this folder, by name, from one listing; empty if there is no folder."""
        infos = self.entries()
        files = {name: info for name, info in infos.items() if info["type"] == "file"}
        return {name: file_info(files[name]) for name in sorted(files) if name and not name.startswith(TEMPORARY)}

    def read_bytes(self) -> bytes:
        """The whole file; raises FileNotFoundError if it does not exist."""
        # s3fs would first ask for the size, to read a large file in parts side by side.
        options = {"max_concurrency": 1} if "s3" in self.fs.protocol else {}
        with storage_errors(self, may_be_absent=True):
            return bytes(self.fs.cat_file(self.path, **options))

    def read_text(self) -> str:
        """The text of the file, in any encoding of `decoded`; raises FileNotFoundError if it does not exist."""
        return decoded(self.read_bytes())

    def write_bytes(self, content: bytes) -> None:
        """Write the whole file, replacing one that is there, so that no reader sees a part of it."""
        with storage_errors(self):
            if not self.is_local:
                self.fs.pipe_file(self.path, content)
                return
            target = Path(self.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f"{TEMPORARY}{uuid.uuid4().hex}")
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(target)

    def create(self, content: bytes) -> bool:
        """Write the file unless it exists; returns whether it was written. Of several writers one succeeds."""
        with storage_errors(self):
            if self.is_local:
                Path(self.path).parent.mkdir(parents=True, exist_ok=True)
            try:
                if self.is_local:
                    with open(self.path, "xb") as file:
                        file.write(content)
                else:
                    self.fs.pipe_file(self.path, content, mode="create")
            except FileExistsError:
                return False
            except OSError as error:
                # s3fs raises a plain OSError for the refusal of some stores (RADOS Gateway 16).
                if self.is_local or not self.exists():
                    raise
                log.debug("%s exists already: %s", self, error)
                return False
            return True

    def write_text(self, text: str) -> None:
        """`write_bytes` of the text in UTF-8."""
        self.write_bytes(text.encode())

    def remove(self) -> None:
        """Delete the file or folder, if it is there; a link is deleted itself, never what it points to."""
        self.fs.invalidate_cache()
        try:
            with storage_errors(self, may_be_absent=True):
                if not self.is_local or self.fs.lexists(self.path):
                    self.fs.rm(self.path, recursive=True)
        except FileNotFoundError as error:  # nothing was there; or a part of it vanished; or its name is a pattern
            self.fs.invalidate_cache()
            with storage_errors(self):
                if self.fs.lexists(self.path):
                    raise error

    def remove_file(self) -> None:
        """Delete the file, if it is there: one request, where `remove` looks for a folder, too."""
        with suppress(FileNotFoundError), storage_errors(self, may_be_absent=True):
            self.fs.rm_file(self.path)


def each(work: Callable[[_Item], _Result], items: Iterable[_Item]) -> list[_Result]:
    """Apply `work` to every item in threads, for requests to a store; returns the results in order."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(work, items))


def each_in_turn(work: Callable[[_Item], _Result], items: Iterable[_Item]) -> Iterator[_Result]:
    """Like `each`, but the results come one by one, and only a few are computed ahead of the one that is taken."""
    with ThreadPoolExecutor(_AHEAD) as pool:
        begun: deque[Future[_Result]] = deque()
        for item in items:
            begun.append(pool.submit(work, item))
            if len(begun) > _AHEAD:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()


def remove_leftovers(folder: Location) -> None:
    """Delete unfinished files of drivers that died, in a folder and below it; nobody else may be writing there.

    Linked folders are not entered: another run may be writing to them. In object storage, parts of incomplete uploads
    are deleted: no listing of objects shows them, but they cost money.
    """
    if folder.is_local:
        with storage_errors(folder):
            for path in sorted(Path(folder.path).rglob(f"{TEMPORARY}*")):
                log.info("removing %s, left by a driver that died", path)
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    elif "s3" in folder.fs.protocol:
        bucket, _, prefix = folder.path.partition("/")
        try:
            found = folder.fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=f"{prefix}/")
            for upload in found.get("Uploads", []):
                log.info("removing parts of %s, left by an incomplete upload", upload["Key"])
                upload_id = upload["UploadId"]
                folder.fs.call_s3("abort_multipart_upload", Bucket=bucket, Key=upload["Key"], UploadId=upload_id)
        except store_errors() as error:  # listing uploads needs a permission that a run can do without
            log.warning("%s: parts of incomplete uploads, if there are any, stay: %s", folder, error)
