"""The input of a job: settings, access, tokenizers and templates checked before anything takes time, then prepared."""

from davir_ray.access import check_readable, probe_output, translated
from davir_ray.config import InputConfig
from davir_ray.errors import ConfigError, DataError, ModelError, UserError
from davir_ray.manifest import Manifest
from davir_ray.models.checkpoint import Checkpoint
from davir_ray.output import place_of
from davir_ray.stages.pairing import check_base
from davir_ray.stages.prepare import Preparation, prepare
from davir_ray.storage import Location


def check_inputs(config: InputConfig, *models: str | None) -> tuple[Location, Checkpoint, Preparation]:
    """What can be wrong with the settings is found here, before Ray starts or a weight is loaded.

    `models` are others than the base that must be readable.
    """
    run = place_of(config.output or "")
    _check_access(run, config, models)
    base = Checkpoint.find(config.base or "", config.trust_remote_code)
    template = read_template(config.chat_template)
    preparation = Preparation(base, config.prepare, template, config.keep_record, config.limit)
    check_base(preparation, config.all_sources())
    return run, base, preparation


def prepare_inputs(run: Location, config: InputConfig, preparation: Preparation) -> Manifest:
    """Prepare the sources."""
    sources = config.all_sources()
    return prepare(run, sources, preparation, max_bad_fraction=config.max_bad_fraction, overwrite=config.overwrite)


def _check_access(run: Location, config: InputConfig, models: tuple[str | None, ...]) -> None:
    """Use the output and list the inputs, before anything that takes time."""
    paths = [path for source in config.all_sources() for path in source.paths]
    inputs: list[tuple[str, type[UserError]]] = [(path, DataError) for path in paths]
    inputs += [(model, ModelError) for model in (config.base, *models) if model]
    inputs += [(place, ConfigError) for place in (config.chat_template, config.score.base_cache) if place]
    probe_output(run)
    check_readable(inputs)


def read_template(file: str | None) -> str | None:
    """The text of a chat template's file; ConfigError if it cannot be read."""
    if file is None:
        return None
    with translated(f"chat_template {file}", ConfigError):
        return Location.of(file).read_bytes().decode()
