"""The manifest of a complete stage, written after its files, and the differences between two fingerprints."""

import json
import platform
import posixpath
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from typing import Any, Self

from davir_ray.errors import IntegrityError
from davir_ray.run.files import FileEntry, content_digest, digest
from davir_ray.run.location import FileInfo, Location, each
from davir_ray.text import shorten

CONFIG_FILE = "config.yaml"
CONFIG_HEAD = (
    "# The last command's configuration of this run of davir_ray; manifests/ say what each stage was made with.\n"
)
"""First line of the configuration in a run's folder, by which the folder is recognised as a run."""

_PACKAGES = ("davir_ray", "ray", "torch", "transformers", "tokenizers", "datasets", "pyarrow", "numpy")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a complete stage wrote and what its content depends on."""

    stage: str
    fingerprint: dict[str, Any]
    """Everything the content depends on, by name: compared when the stage is to run again."""
    counts: dict[str, int]
    files: list[FileEntry]
    details: dict[str, Any] = field(default_factory=dict)
    """Information that nothing depends on: numerics, timings, curves."""
    versions: dict[str, str] = field(default_factory=lambda: library_versions())
    seconds: float = 0.0

    def files_in(self, folder: str) -> list[FileEntry]:
        """The stage's files in one of its folders, their names relative to it."""
        start = f"{folder}/"
        return [replace(entry, name=entry.name[len(start) :]) for entry in self.files if entry.name.startswith(start)]

    @property
    def content(self) -> str:
        """Digest of the files' content: what a following stage depends on."""
        return digest([(entry.name, entry.sha256) for entry in self.files])

    @property
    def checksum(self) -> str:
        """Digest of the whole manifest: its files, and all that it says of them."""
        return digest(json.loads(json.dumps(asdict(self))))

    def damage(self, run: Location, *, trust_marks: bool = True) -> list[str]:
        """A line for each file of the stage that is missing or has changed since the stage was committed.

        A file of the same size and mark counts as unchanged if `trust_marks`; one with another mark may be a copy, so
        its content is read.
        """
        found = damaged(run, self.files, trust_marks=trust_marks)
        return [f"{name}: {change}" for name, change in sorted(found.items())]

    def commit(self, run: Location) -> Self:
        """Complete the stage: check the size of every file, then write the manifest; returns it with the files' marks.

        Raises IntegrityError if a file is missing or its size is not the one that was written.
        """
        there = _listed(run, self.files)
        for entry, found in _other_sizes(self.files, there):
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
        manifest_file(run, self.stage).write_text(text + "\n")

    @classmethod
    def read(cls, run: Location, stage: str) -> Self | None:
        """The manifest of a stage; None if it is not complete. Raises IntegrityError if the file is damaged."""
        place = manifest_file(run, stage)
        try:
            text = place.read_bytes()
        except FileNotFoundError:
            return None
        try:
            body = json.loads(text)
            checksum = body.pop("checksum")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise IntegrityError(f"{place} is not a manifest ({error}); delete it to redo the stage") from error
        if digest(body) != checksum:
            raise IntegrityError(f"{place} does not match its own checksum; delete it to redo the stage {stage}")
        return cls(**{**body, "files": [FileEntry(**entry) for entry in body["files"]]})

    @classmethod
    def read_all(cls, run: Location, stages: Iterable[str]) -> dict[str, Self]:
        """The manifests of those stages that are complete, in the same order; what a listing lacks is not asked for."""
        there = (run / "manifests").entries()
        names = [stage for stage in stages if manifest_file(run, stage).name in there]
        return {stage: found for stage in names if (found := cls.read(run, stage))}


def damaged(run: Location, files: list[FileEntry], *, trust_marks: bool = True) -> dict[str, str]:
    """What has become of each file that is missing or has changed, by name; see `Manifest.damage`."""
    there = _listed(run, files)
    changed = {entry.name: f"{entry.bytes} bytes → {found}" for entry, found in _other_sizes(files, there)}
    doubtful = [
        entry
        for entry in files
        if entry.name not in changed and not (trust_marks and entry.mark and entry.mark == there[entry.name].mark)
    ]
    digests = each(lambda entry: content_digest(run / entry.name), doubtful)
    return changed | {
        entry.name: f"sha256 {entry.sha256[:12]}… → {found[:12]}…"
        for entry, found in zip(doubtful, digests, strict=True)
        if entry.sha256 != found
    }


def _other_sizes(files: Iterable[FileEntry], there: Mapping[str, FileInfo]) -> Iterator[tuple[FileEntry, int | str]]:
    """Yield each file whose size has changed since it was written, with its size now or "missing"."""
    for entry in files:
        found = there.get(entry.name)
        if found is None or found.bytes != entry.bytes:
            yield entry, "missing" if found is None else found.bytes


def _listed(run: Location, files: Iterable[FileEntry]) -> dict[str, FileInfo]:
    """The files now in the folders of `files`, by path relative to the run's folder; lists each folder once."""
    there: dict[str, FileInfo] = {}
    for name in sorted({posixpath.dirname(entry.name) for entry in files}):
        folder = run / name if name else run
        there |= {posixpath.join(name, file): info for file, info in folder.listed().items()}
    return there


def manifest_file(run: Location, stage: str) -> Location:
    """The file of a stage's manifest, which exists if the stage is complete."""
    return run / "manifests" / f"{stage}.json"


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """A line for each difference between two fingerprints: 'name: old → new'."""
    lines = []
    for name in sorted({*old, *new}):
        before, after = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            lines += differences(before, after, f"{prefix}{name}.")
        elif before != after:
            before, after = (shorten(json.dumps(value, ensure_ascii=False)) for value in (before, after))
            lines.append(f"{prefix}{name}: {before} → {after}")
    return lines


def library_versions() -> dict[str, str]:
    """Versions of Python and of the packages that results may depend on; of the stages, the report alone is redone."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions
