"""The hub as a place to write to: the repository of a data set, its upload, and the licence of a source there."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.errors import HTTPError as TransportError  # type: ignore[attr-defined]  # httpx's, or httpx2's

from davir_ray.config.sources import Source
from davir_ray.errors import ConfigError, StorageError
from davir_ray.run.location import Location
from davir_ray.text import one_line

log = logging.getLogger(__name__)


def create_repository(name: str, *, public: bool) -> None:
    """Create the data set unless it exists; ConfigError if that is not allowed, or it is public without `public`."""
    api = HfApi()
    with _errors(name):
        api.create_repo(name, repo_type="dataset", private=not public, exist_ok=True)
        is_private = api.dataset_info(name).private
    if not is_private and not public:
        raise ConfigError(f"push_to_hub is {name}, which everybody can see; give --public, or another name")


def upload(name: str, folder: Location, message: str) -> None:
    """Upload the folder as one commit."""
    with _errors(name):
        HfApi().upload_folder(
            repo_id=name,
            repo_type="dataset",
            folder_path=Path(folder.path),
            commit_message=message,
            delete_patterns=["data/*", "rejects/*"],  # of an earlier export with more files
        )


def licence_of(sources: Sequence[Source]) -> str | None:
    """The licence that the sources' own cards on the hub name; None if a source is elsewhere or they differ."""
    found = set()
    for source in sources:
        for path in source.paths:
            if "://" in path or Path(path).exists():
                return None
            try:
                card = HfApi().dataset_info(path).card_data
            except (HfHubHTTPError, HFValidationError, TransportError) as error:
                log.warning("the licence of %s is not known: %s", path, one_line(error))
                return None
            found.add(card.get("license") if card is not None else None)
    return found.pop() if len(found) == 1 else None


@contextmanager
def _errors(name: str) -> Iterator[None]:
    try:
        yield
    except (HfHubHTTPError, HFValidationError) as error:
        raise ConfigError(
            f"push_to_hub is {name}, which cannot be written to: {one_line(error)}; set HF_TOKEN to a token with write "
            "access, or give another name"
        ) from error
    except TransportError as error:
        raise StorageError(f"the hub does not answer ({one_line(error)}); the same command tries again") from error
