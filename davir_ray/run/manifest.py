"""What a complete stage left behind: the manifest, written last, and what differs between two of them."""

import json
import platform
import posixpath
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from typing import Any, Self

from davir_ray.errors import IntegrityError
from davir_ray.run.digests import content_digest, digest
from davir_ray.run.files import FileEntry
from davir_ray.run.location import Location, Stored, each

CONFIG_FILE = "config.yaml"
CONFIG_HEAD = (
    "# The last command's configuration of this run of davir_ray; manifests/ say what each stage was made with.\n"
)
"""How the configuration in a run's folder begins: a folder with it is the output of a run."""

_PACKAGES = ("davir_ray", "ray", "torch", "transformers", "tokenizers", "datasets", "pyarrow", "numpy")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a complete stage wrote and what its content depends on."""

    stage: str
    fingerprint: dict[str, Any]
    """Everything the content depends on, by name: compared on the next run, and named where it differs."""
    counts: dict[str, int]
    files: list[FileEntry]
    details: dict[str, Any] = field(default_factory=dict)
    """What a reader may want to know and nothing depends on: numerics, timings, curves."""
    versions: dict[str, str] = field(default_factory=lambda: library_versions())
    seconds: float = 0.0

    def files_in(self, folder: str) -> list[FileEntry]:
        """The stage's files in one of its folders, their names without it."""
        start = f"{folder}/"
        return [replace(entry, name=entry.name[len(start) :]) for entry in self.files if entry.name.startswith(start)]

    @property
    def content(self) -> str:
        """Digest of the files' content: what a following stage depends on."""
        return digest([(entry.name, entry.sha256) for entry in self.files])

    def damage(self, run: Location, *, trust_marks: bool = True) -> list[str]:
        """Lines that name files of the stage that are gone or changed since it was committed.

        A file of the same size and mark is trusted, unless told otherwise. One with another mark may be a copy, and is
        read.
        """
        there = _listed(run, self.files)
        lines = [
            f"{entry.name}: {entry.bytes} bytes → {found}"
            for entry, found in _other_sizes(self.files, there, "missing")
        ]
        doubtful = [entry for entry in self.files if _may_have_changed(entry, there.get(entry.name), trust_marks)]
        digests = each(lambda entry: content_digest(run / entry.name), doubtful)
        lines += [
            f"{entry.name}: sha256 {entry.sha256[:12]}… → {found[:12]}…"
            for entry, found in zip(doubtful, digests, strict=True)
            if entry.sha256 != found
        ]
        return sorted(lines)

    def commit(self, run: Location) -> Self:
        """Complete the stage: write the manifest after a look at every file; returns it with the files' marks.

        IntegrityError if a file is not there as it was written.
        """
        there = _listed(run, self.files)
        for entry, found in _other_sizes(self.files, there, "gone"):
            raise IntegrityError(
                f"{run / entry.name} was written with {entry.bytes} bytes and is now {found}; "
                "does something else write there?"
            )
        marked = replace(self, files=[replace(entry, mark=there[entry.name].mark) for entry in self.files])
        marked.write(run)
        return marked

    def write(self, run: Location) -> None:
        """Write manifests/<stage>.json, with a checksum of itself."""
        body = json.loads(json.dumps(asdict(self)))
        text = json.dumps({**body, "checksum": digest(body)}, indent=1, ensure_ascii=False)
        _manifest_place(run, self.stage).write_text(text + "\n")

    @classmethod
    def read(cls, run: Location, stage: str) -> Self | None:
        """The manifest of a complete stage, else None. IntegrityError if the file was damaged."""
        place = _manifest_place(run, stage)
        try:
            text = place.read_bytes()
        except FileNotFoundError:
            return None
        try:
            body = json.loads(text)
            checksum = body.pop("checksum")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise IntegrityError(f"{place} is not a whole manifest ({error}); delete it to redo the stage") from error
        if digest(body) != checksum:
            raise IntegrityError(f"{place} does not match its own checksum; delete it to redo the stage {stage}")
        return cls(**{**body, "files": [FileEntry(**entry) for entry in body["files"]]})


def _other_sizes(
    files: Iterable[FileEntry], there: Mapping[str, Stored], absent: str
) -> Iterator[tuple[FileEntry, int | str]]:
    """Files that have not the size they were written with, each with its size now."""
    for entry in files:
        found = there.get(entry.name)
        if found is None or found.bytes != entry.bytes:
            yield entry, absent if found is None else found.bytes


def _may_have_changed(entry: FileEntry, now: Stored | None, trust_marks: bool) -> bool:
    """Whether only reading it can tell."""
    if now is None or now.bytes != entry.bytes:
        return False
    return not trust_marks or now.mark is None or now.mark != entry.mark


def _listed(run: Location, files: Iterable[FileEntry]) -> dict[str, Stored]:
    """What is in the folders of these files now, by name from the run's folder."""
    folders = sorted({posixpath.dirname(entry.name) for entry in files})
    return {
        posixpath.join(name, file): stored for name in folders for file, stored in _folder(run, name).listed().items()
    }


def _folder(run: Location, name: str) -> Location:
    return run / name if name else run


def _manifest_place(run: Location, stage: str) -> Location:
    return run / "manifests" / f"{stage}.json"


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Readable lines naming what differs between two fingerprints: 'name: old → new'."""
    lines = []
    for name in sorted({*old, *new}):
        before, after = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            lines += differences(before, after, f"{prefix}{name}.")
        elif before != after:
            lines.append(f"{prefix}{name}: {_shorten(before)} → {_shorten(after)}")
    return lines


def _shorten(value: Any, most: int = 60) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def library_versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter; recorded in manifests, never compared."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions
