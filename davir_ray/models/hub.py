"""The Hugging Face hub: the driver resolves a name to one commit, whose files are downloaded once to each node.

They are stored in the cache that all Hugging Face libraries share (HF_HOME). HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE
work as in huggingface_hub.
"""

import glob
import logging
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from huggingface_hub import HfApi, constants, get_cached_repo_tree, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)
from huggingface_hub.errors import HTTPError as TransportError  # type: ignore[attr-defined]  # httpx's, or httpx2's
from huggingface_hub.file_download import repo_folder_name

from davir_ray.errors import DavirError, ModelError, StorageError
from davir_ray.models.download import RemoteFile, download_missing, host
from davir_ray.run.storage_errors import CONTINUES, explain
from davir_ray.text import one_line

log = logging.getLogger(__name__)

# RuntimeError is raised by hf_xet.
_UNREACHABLE = (TransportError, LocalEntryNotFoundError, RevisionResolutionError, OfflineModeIsEnabled, RuntimeError)
_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


@cache
def resolve(name: str, revision: str | None) -> str:
    """The commit of a branch, a tag, or (None) the default branch; each process resolves it once, so it stays the same.

    A full commit hash is returned unchanged. If the hub cannot be reached, the last commit that this node knows is
    used; ModelError if there is none.
    """
    if not _NAME.fullmatch(name):
        raise ModelError(f"{name!r} is neither a folder here nor a hub name such as org/model or org/model@revision")
    with _hub_errors(name, revision, ModelError):
        offline = constants.HF_HUB_OFFLINE
        return str(HfApi().resolve_revision(name, revision=revision, local_files_only=offline).resolved)


def repository_files(name: str, commit: str) -> tuple[RemoteFile, ...]:
    """All files of a commit, from the hub or from the list in the cache. ModelError if neither is available.

    Older versions of huggingface_hub left no list: without it and without the hub, these are the files in the cache.
    """
    try:
        return _cached_list(name, commit)
    except CachedRepoTreeNotFoundError:
        with _hub_errors(name, commit, ModelError):
            # Writes the list to the cache, and the files that are needed in any case.
            folder = snapshot_download(name, revision=commit, allow_patterns=["config.json", "adapter_config.json"])
    try:
        return _cached_list(name, commit)
    except CachedRepoTreeNotFoundError as error:
        paths = [path for path in sorted(Path(folder).rglob("*")) if not path.is_dir()]
        if lost := [path for path in paths if not path.exists()]:
            raise ModelError(
                f"{lost[0]} is a link to {lost[0].readlink()}, which does not exist; download {name} again"
            ) from error
        return tuple(RemoteFile(path.relative_to(folder).as_posix(), path.stat().st_size) for path in paths)


def fetch_from_hub(name: str, commit: str, wanted: list[RemoteFile]) -> Path:
    """Download the wanted files of a commit unless this node has them, and return their folder.

    ModelError if the hub refuses access or the cache cannot hold them; StorageError if the hub or the network fails.
    """
    repository = Path(constants.HF_HUB_CACHE).expanduser() / repo_folder_name(repo_id=name, repo_type="model")
    folder = repository / "snapshots" / commit
    lock = repository.parent / ".locks" / repository.name / f"davir_ray-{commit}.lock"

    def download(missing: list[RemoteFile]) -> None:
        with _hub_errors(name, commit, StorageError):
            for file in missing:
                if (folder / file.name).exists():  # with another length: damaged
                    hf_hub_download(name, file.name, revision=commit, force_download=True)
            snapshot_download(name, revision=commit, allow_patterns=[glob.escape(file.name) for file in missing])

    download_missing(name, folder, wanted, lock, download)
    return folder


@contextmanager
def hub_offline() -> Iterator[None]:
    """Set HF_HUB_OFFLINE for the block, in which an adapter is saved.

    peft (0.21) would ask the hub whether the vocabulary of the base was changed, which never happens here. Unlike
    huggingface_hub, it reads the variable each time.
    """
    before = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Could not find a config file")
            yield
    finally:
        del os.environ["HF_HUB_OFFLINE"]
        if before is not None:
            os.environ["HF_HUB_OFFLINE"] = before


def _cached_list(name: str, commit: str) -> tuple[RemoteFile, ...]:
    return tuple(RemoteFile(file.path, file.size) for file in get_cached_repo_tree(name, revision=commit))


@contextmanager
def _hub_errors(name: str, revision: str | None, failed: type[DavirError]) -> Iterator[None]:
    """Turn errors of huggingface_hub into one-line errors, of the class `failed` if the hub does not answer."""
    after = f". {CONTINUES}" if failed is StorageError else ""
    try:
        yield
    except (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise ModelError(f"{name} cannot be used: {_refusal(name, revision, error)}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise ModelError(
                f"{name} cannot be used: the hub does not accept the token ({status}); set HF_TOKEN, where driver and "
                "workers see it, to one that may read this model"
            ) from error
        reason = "throttled (429); try later" if status == 429 else f"the hub failed ({status})"
        raise failed(f"{name} on {host()}: {reason}{after}") from error
    except _UNREACHABLE as error:
        place = f"is not a folder on {host()}, and" if failed is ModelError else f"on {host()}:"
        raise failed(f"{name} {place} {_absence(revision, error)}{after}") from error
    except OSError as error:
        if error.errno is None:  # raised by huggingface_hub itself: a file was not received as announced
            raise failed(f"{name} on {host()}: {one_line(error, 300)}{after}") from error
        raise ModelError(f"{name} cannot be kept in {constants.HF_HUB_CACHE} on {host()}: {explain(error)}") from error


def _refusal(name: str, revision: str | None, error: Exception) -> str:
    access = "with the token of HF_TOKEN" if os.environ.get("HF_TOKEN") else "without a token"
    match error:
        case GatedRepoError():
            return (
                f"it is gated; ask for access at {constants.ENDPOINT}/{name} and set HF_TOKEN, where driver and "
                "workers see it, to a token of the account that has it"
            )
        case RevisionNotFoundError():
            return f"it has no revision {revision!r}; give a branch, a tag or a full commit hash after the @"
        case HFValidationError():
            return f"it is not a hub name ({one_line(error, 200)}); give a folder or org/model"
    return (
        f"it is not a folder here, and the hub shows no such model {access}; correct the name or, if it is private, "
        "set HF_TOKEN to a token that may read it"
    )


def _absence(revision: str | None, error: Exception) -> str:
    """The reason for an error if the hub does not answer and the cache has no copy."""
    wanted = f"revision {revision}" if revision else "the default branch"
    lacks = f"the cache {constants.HF_HUB_CACHE} has no complete copy of {wanted}"
    if constants.HF_HUB_OFFLINE:
        return f"HF_HUB_OFFLINE is set and {lacks}; unset it, or download the model there first (hf download)"
    last = error
    while last.__cause__ is not None:
        last = last.__cause__  # type: ignore[assignment]
    reason = " ".join(f"{type(last).__name__}: {last}".split())[:200]
    return f"the hub {constants.ENDPOINT} gives no answer ({reason}) and {lacks}; check the network and HF_ENDPOINT"
