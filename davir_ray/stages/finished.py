"""A finished run, for jobs that begin with one: its last configuration, and the models that it was scored with."""

from davir_ray.config.run import RunConfig
from davir_ray.config.yaml import load
from davir_ray.errors import ConfigError, OutputError
from davir_ray.models.checkpoint import Checkpoint
from davir_ray.run.location import Location
from davir_ray.run.manifest import CONFIG_FILE
from davir_ray.run.stages import require


def remembered(run: Location) -> RunConfig:
    """The configuration of the run's last command."""
    try:
        return load(RunConfig, (run / CONFIG_FILE).read_text())
    except FileNotFoundError as error:
        raise OutputError(f"{run} has no {CONFIG_FILE}; run jobs/score.py with this --output again") from error
    except ConfigError as error:
        raise OutputError(f"{run} is not of jobs/score.py, or of another version of it: {error}") from error


def scored_with(run: Location, role: str, uri: str, trust_remote_code: bool) -> Checkpoint:
    """The model that the run was scored with: of the hub the commit, whatever its branch is by now."""
    commit = require(run, "score").fingerprint[role].get("commit")
    return Checkpoint.find(f"{uri.partition('@')[0]}@{commit}" if commit else uri, trust_remote_code)
