"""Finished trainings on the same pairs, which the report of a preference training tells beside its own."""

from collections.abc import Sequence

from davir_ray.engine.connect import num_nodes
from davir_ray.errors import ConfigError
from davir_ray.run.access import check_readable
from davir_ray.run.folder import Run
from davir_ray.run.location import Location
from davir_ray.run.storage_errors import user_errors


def check_finished(places: Sequence[str]) -> list[Run]:
    """The runs at these places; ConfigError if one cannot be read or is not of a finished preference training."""
    check_readable([(place, ConfigError) for place in places])
    return [_finished(place) for place in places]


def check_sweep(run: Run, others: Sequence[Run], *, is_shared: bool) -> None:
    """ConfigError if one was trained on other pairs than this run, whose prepare stage is complete, or if a node may
    not see it.
    """
    pairs = run.require("prepare").content
    for other in others:
        if other.folder.is_local and num_nodes() > 1 and not is_shared:
            raise ConfigError(
                f"beside names {other}, which is local, but the cluster has {num_nodes()} nodes; name runs in "
                "s3://…, or give --output_is_shared if every node sees these paths"
            )
        if other.require("prepare").content != pairs:
            raise ConfigError(
                f"beside names {other}, whose prepared pairs are not those of {run}; name runs of the same data, "
                "base and prepare settings"
            )


def _finished(place: str) -> Run:
    with user_errors(place, ConfigError):
        run = Run(Location.of(place))
        missing = [stage for stage in ("prepare", "align", "margins") if run.manifest(stage) is None]
    if missing:
        raise ConfigError(
            f"beside names {place}, which has no complete {missing[0]} stage; name finished runs of jobs/align.py"
        )
    return run
