"""The places that a job's settings name: whether they can be read and written, and what is in them."""

from davir_ray.config.run import InputConfig
from davir_ray.config.scoring import ScoreConfig
from davir_ray.errors import ConfigError, DataError, ModelError, UserError
from davir_ray.run.access import check_readable, probe_output
from davir_ray.run.folder import Run
from davir_ray.run.location import Location
from davir_ray.run.storage_errors import user_errors


def check_places(config: InputConfig, run: Run, *models: str | None) -> None:
    """Check that the files and models that the settings name can be read, and the output be written by a run."""
    paths = [path for source in config.all_sources() for path in source.paths] + config.evaluation_sets
    places: list[tuple[str, type[UserError]]] = [(path, DataError) for path in paths]
    places += [(model, ModelError) for model in (config.base, *models) if model]
    places += [(place, ConfigError) for place in (config.chat_template, config.score.base_cache) if place]
    run.check_claim(probe_output(run.folder))
    check_readable(places)


def read_template(file: str | None) -> str | None:
    """The text of a chat template's file; raises ConfigError if it cannot be read."""
    if file is None:
        return None
    with user_errors(f"chat_template {file}", ConfigError):
        return Location.of(file).read_text()


def written_by(run: Run, score: ScoreConfig) -> list[Location]:
    """The locations that a job writes to; they may be inside a data folder, and are never read as data."""
    return [run.folder, *([Location.of(score.base_cache)] if score.base_cache else [])]
