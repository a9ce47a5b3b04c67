"""The input of a job: settings, access, tokenizers and templates checked before anything takes time, then prepared."""

import logging

from davir_ray.config.run import InputConfig, OutputConfig
from davir_ray.config.scoring import ScoreConfig
from davir_ray.config.sources import check_chat_template
from davir_ray.config.training import FinetuneConfig
from davir_ray.engine.pool import plan_pool
from davir_ray.engine.session import connected_to, place_of
from davir_ray.errors import ConfigError, DataError, ModelError, UserError
from davir_ray.models.checkpoint import Checkpoint
from davir_ray.models.size import ModelSize
from davir_ray.run.access import check_readable, probe_output, translated
from davir_ray.run.location import Location
from davir_ray.run.manifest import Manifest
from davir_ray.run.stages import check_claim
from davir_ray.stages.dry_run import device_rate, preview
from davir_ray.stages.estimate import estimate, told
from davir_ray.stages.finetune import check_workers
from davir_ray.stages.pairing import check_base
from davir_ray.stages.prepare import Preparation, are_pairs, prepare

log = logging.getLogger(__name__)


def check_inputs(config: InputConfig, *models: str | None) -> tuple[Location, Checkpoint, Preparation]:
    """What can be wrong with the settings is found here, before Ray starts or a weight is loaded.

    `models` are others than the base that must be readable.
    """
    warn_without_effect(config)
    run = place_of(config.output or "")
    _check_access(run, config, models)
    base = Checkpoint.find(config.base or "", config.trust_remote_code)
    template = read_template(config.chat_template)
    check_chat_template(template, [source.format for source in config.all_sources()])
    preparation = Preparation(
        base=base, config=config.prepare, chat_template=template, keep_record=config.keep_record, limit=config.limit
    )
    check_base(preparation, config.all_sources())
    return run, base, preparation


def warn_without_effect(config: OutputConfig) -> None:
    """Name settings that change nothing: a file that serves several commands may well have some."""
    if unused := config.without_effect():
        log.warning("without effect: %s", "; ".join(f"{name} ({why})" for name, why in unused.items()))


def prepare_inputs(run: Location, config: InputConfig, preparation: Preparation) -> Manifest:
    """Prepare the sources."""
    return prepare(
        run, config.all_sources(), preparation,
        max_bad_fraction=config.max_bad_fraction, written=written_by(run, config.score), overwrite=config.overwrite,
    )  # fmt: skip


def written_by(run: Location, score: ScoreConfig) -> list[Location]:
    """The places that a job writes: no data of its own, though they may lie in a data folder."""
    return [run, *([Location.of(score.base_cache)] if score.base_cache else [])]


def foretell(
    run: Location, config: InputConfig, preparation: Preparation, finetune: FinetuneConfig | None
) -> list[str]:
    """What a job would do, for --dry_run: the first examples, what they will take, the pool. Nothing is written.

    `finetune` is None where nothing is trained.
    """
    lines, data = preview(config.all_sources(), preparation, written=written_by(run, config.score))
    with connected_to(run, is_shared=config.output_is_shared):
        check_claim(run)
        if finetune is not None:
            check_workers(finetune)
        pool = plan_pool(config.score)
        rate = device_rate(config.estimate)
    size, examples_per_unit = ModelSize.of(preparation.base), 2 if are_pairs(config.all_sources()) else 1
    found = estimate(size, data, config.prepare.shard_rows, finetune, examples_per_unit)
    lines += told(found, *rate, pool.at_start, config.estimate.price_per_device_hour)
    return [*lines, f"cluster: {pool} to score", f"output: {run}"]


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
        return Location.of(file).read_text()
