"""A cache of base losses between runs: scoring a second reference on the same examples takes one pass, not two."""

import hashlib
import logging
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from davir_ray.config.scoring import ScoreConfig
from davir_ray.errors import ConfigError, IntegrityError, OutputError
from davir_ray.models.checkpoint import Checkpoint
from davir_ray.models.kernel.packing import Spans, scored_positions
from davir_ray.models.tokenizer import tokenizer_digest
from davir_ray.run.files import digest, read_parquet, write_parquet
from davir_ray.run.location import Location
from davir_ray.run.storage_errors import user_errors

log = logging.getLogger(__name__)

_CHECKSUM = b"davir_sha256"

Nlls = list[npt.NDArray[np.floating[Any]]]
"""Nats of each scored token, for each example; float32, or float64 of a float64 model."""


@dataclass(frozen=True)
class BaseCache:
    """A folder of token losses: <model and numerics>/<content of the shard>.parquet, one row for each example.

    A hit is bitwise identical to what would be computed: the first part of the name is a digest of everything that
    the losses depend on except the examples, the second a digest of the examples' ids, tokens and spans in order.
    """

    folder: Location
    base: str
    """Digest of the base's weights and tokenizer."""

    def place(
        self,
        numerics: dict[str, Any],
        ids: npt.NDArray[np.int64],
        examples: Sequence[tuple[npt.NDArray[np.int32], tuple[int, ...]]],
    ) -> Location:
        """The file for the losses of these examples."""
        content = hashlib.sha256(np.ascontiguousarray(ids).tobytes())
        for input_ids, spans in examples:
            content.update(f"{len(input_ids)} {spans}".encode())
            content.update(input_ids.tobytes())
        return self.folder / digest([self.base, numerics])[:32] / f"{content.hexdigest()[:32]}.parquet"

    @staticmethod
    def read(place: Location, examples: Sequence[tuple[npt.NDArray[np.int32], Spans]]) -> Nlls | None:
        """The losses in this file; None if it does not exist or is damaged."""
        try:
            with user_errors(place, OutputError):
                if not place.exists():
                    return None
                table = read_parquet(place)
        except (OutputError, IntegrityError) as error:
            log.warning("the cached base losses %s cannot be read and are computed again: %s", place, error)
            return None
        column = table["token_nll"].combine_chunks()
        values = np.asarray(column.flatten())
        counts = [len(scored_positions(spans)) for _, spans in examples]
        whole = (table.schema.metadata or {}).get(_CHECKSUM) == _checksum(values)
        if not whole or column.value_lengths().to_pylist() != counts:
            log.warning("the cached base losses %s are damaged and are computed again", place)
            return None
        return [values[end - count : end] for count, end in zip(counts, np.cumsum(counts), strict=True)]

    @staticmethod
    def write(place: Location, nlls: Nlls) -> None:
        """Write losses atomically; two workers with the same shard write the same. A failure is only a warning."""
        values = np.concatenate(nlls)
        kind = pa.list_(pa.from_numpy_dtype(values.dtype))
        try:
            with user_errors(place, OutputError):
                write_parquet(place, pa.table({"token_nll": pa.array(nlls, kind)}), {_CHECKSUM: _checksum(values)})
        except OutputError as error:
            log.warning("the base losses are not cached: %s", error)


def _checksum(values: npt.NDArray[np.floating[Any]]) -> bytes:
    return hashlib.sha256(values.tobytes()).hexdigest().encode()


def base_cache(base: Checkpoint, config: ScoreConfig) -> BaseCache | None:
    """The cache of base losses that the settings name; raises ConfigError if it cannot be written."""
    if config.base_cache is None:
        return None
    folder = config.base_cache if "://" in config.base_cache else Path(config.base_cache).expanduser().resolve()
    identity = digest([base.weights_digest(), tokenizer_digest(base.tokenizer())])
    with user_errors(config.base_cache, ConfigError):
        cache = BaseCache(Location.of(folder), identity)
        # Fail now rather than warn for each shard.
        probe = cache.folder / f"probe-{uuid.uuid4().hex}"
        probe.write_text("")
        probe.remove()
        return cache
