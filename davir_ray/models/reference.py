"""The reference of a run: one model for all rows, or one for each fold, which has not seen the fold's rows."""

from collections.abc import Mapping
from typing import Any

from davir_ray.models.checkpoint import Checkpoint

Reference = Checkpoint | Mapping[int, Checkpoint]
"""One model, or the model of each fold."""


def by_fold(reference: Reference) -> Mapping[int, Checkpoint]:
    """The model of each fold; the only one counts as that of fold 0."""
    return {0: reference} if isinstance(reference, Checkpoint) else reference


def weights_of(reference: Reference) -> dict[str, Any]:
    """The digest of a reference's weights, or for each fold that of its reference; see Checkpoint.weights_digest."""
    if isinstance(reference, Checkpoint):
        return reference.weights_digest()
    return {f"fold {fold}": checkpoint.weights_digest() for fold, checkpoint in sorted(reference.items())}


def content_of(reference: Reference) -> dict[str, Any]:
    """What identifies a reference, known without loading anything; see Checkpoint.content."""
    if isinstance(reference, Checkpoint):
        return reference.content()
    return {f"fold {fold}": checkpoint.content() for fold, checkpoint in sorted(reference.items())}
