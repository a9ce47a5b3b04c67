"""Finished preference trainings on the same pairs, with which the report compares this one."""

from collections.abc import Sequence

from davir_ray.engine.resources import num_nodes
from davir_ray.errors import ConfigError
from davir_ray.run.access import check_readable
from davir_ray.run.folder import Run
from davir_ray.run.location import Location
from davir_ray.run.manifest import CONFIG_FILE
from davir_ray.run.storage_errors import user_errors
from davir_ray.schema import MARGINS


def finished_runs(places: Sequence[str]) -> list[Run]:
    """The runs in these folders; ConfigError if one cannot be read, is not finished, or has other columns."""
    check_readable([(place, ConfigError) for place in places])
    runs = []
    for place in places:
        with user_errors(place, ConfigError):
            run = Run(Location.of(place))
            missing = [stage for stage in ("prepare", "align", "margins") if run.manifest(stage) is None]
        if missing:
            raise ConfigError(
                f"beside names {place}, which has no complete {missing[0]} stage; name finished runs of jobs/align.py"
            )
        if run.require("margins").fingerprint.get("columns") != MARGINS.names:
            raise ConfigError(
                f"beside names {place}, whose margins/ an earlier version wrote, with other columns; have them written "
                f"again, which takes seconds: python jobs/align.py --config {run / CONFIG_FILE}"
            )
        runs.append(run)
    return runs


def check_comparable(run: Run, others: Sequence[Run], *, is_shared: bool) -> None:
    """ConfigError if one of the others was trained on other pairs, or is in a local folder that other nodes lack.

    The run's own prepare stage must be complete.
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
