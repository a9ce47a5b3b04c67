"""Digests: of values, and of the content of files."""

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from davir_ray.run.location import Location, stored
from davir_ray.run.storage_errors import storage_errors


def digest(value: Any) -> str:
    """SHA-256 of a JSON-ready value, in hex: how fingerprints and lists of files are compared."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def file_digest(place: Location) -> str:
    """What changes when a file's content does: SHA-256 of a local file, the store's etag of a remote one."""
    if place.is_local:
        with storage_errors(place, may_be_absent=True):
            stat = Path(place.path).stat()
            return _local_digest(place.path, stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    with storage_errors(place, may_be_absent=True):
        num_bytes, mark = stored(place.fs.info(place.path))
    return content_digest(place) if mark is None else f"{num_bytes}-{mark}"


@lru_cache(maxsize=4096)
def _local_digest(path: str, *_: int) -> str:
    """SHA-256 of a local file, computed again only where the file behind the path, its size or its times differ."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_digest(place: Location) -> str:
    """SHA-256 of a file's content, read now."""
    with storage_errors(place, may_be_absent=True), place.fs.open(place.path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
