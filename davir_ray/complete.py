"""A run that is complete already, known from a record of what it was made from: without Ray, and without torch.

The record is written when every stage is complete, by a driver that made all checks. While everything in it is the
same, a driver has nothing to do, whatever devices the cluster has now. Whatever else a driver finds is left to the
stages, which say what differs, and redo or refuse it.
"""

import json
import logging
from dataclasses import replace
from typing import Any

from davir_ray.config.run import RunConfig
from davir_ray.config.yaml import dump, load
from davir_ray.data.evaluation import decontamination, list_evaluation_sets
from davir_ray.data.files import digests_of, list_files
from davir_ray.errors import DavirError, OutputError
from davir_ray.models.checkpoint import Checkpoint
from davir_ray.models.reference import Reference, content_of
from davir_ray.places import check_places, read_template, written_by
from davir_ray.references import given_reference
from davir_ray.run.access import check_readable
from davir_ray.run.folder import Run
from davir_ray.run.lease import LEASE_FILE, Holder
from davir_ray.run.manifest import CONFIG_FILE, CONFIG_HEAD, library_versions
from davir_ray.run.progress import Progress
from davir_ray.versions import DEAL_VERSION, NUMERICS_VERSION, PREPARE_VERSION

log = logging.getLogger(__name__)

RECORD = "manifests/complete.json"


def complete_run(config: RunConfig) -> Run | None:
    """The run of these settings, if it is complete and nothing that it was made from has changed; None if it may not.

    With a tracker, code of a model or repeats the answer is None: what these do, or are, is not known without them.
    """
    if config.track is not None or config.trust_remote_code or config.rank.repeats:
        return None
    try:
        return _unchanged(config)
    except (DavirError, OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        log.debug("whether the run is complete is left to its stages: %s", error)  # if it is a mistake, they report it
        return None


def found_inputs(base: Checkpoint, reference: Reference | None, chat_template: str | None) -> dict[str, Any]:
    """What a run is made from, apart from its settings and its data, which config.yaml and a manifest say."""
    return {
        "base": base.content(),
        "reference": None if reference is None else content_of(reference),
        "chat_template": chat_template,
        "prepare": PREPARE_VERSION,
        "deal": DEAL_VERSION,
        "numerics": NUMERICS_VERSION,
        "versions": library_versions(),
    }


def record_complete(run: Run, inputs: dict[str, Any]) -> None:
    """Record that every stage is complete; `inputs` are what was found before any stage began."""
    checksums = {stage: manifest.checksum for stage, manifest in run.manifests().items()}
    (run / RECORD).write_text(json.dumps({**inputs, "stages": checksums}, indent=1) + "\n")


def _unchanged(config: RunConfig) -> Run | None:
    """`complete_run`, but an error that the settings or the files of the run cause is raised."""
    config.require_input()
    config.select.require_rule()
    run = Run.at(config.output or "", overwrite=config.overwrite)
    check_readable([(str(run), OutputError)])
    record = json.loads((run / RECORD).read_bytes())
    progress = Progress.read(run.folder)
    if progress is None or progress.state != "complete" or Holder.read(run / LEASE_FILE) is not None:
        return None
    noted = (run / CONFIG_FILE).read_text()
    config = _with_formats_of(load(RunConfig, noted), config)
    if noted != CONFIG_HEAD + dump(config):
        return None
    check_places(config, run, config.reference)
    base = Checkpoint.find(config.base or "")
    inputs = found_inputs(base, given_reference(config), read_template(config.chat_template))
    manifests = run.manifests()
    checksums = {stage: manifest.checksum for stage, manifest in manifests.items()}
    if record != json.loads(json.dumps({**inputs, "stages": checksums})):
        return None
    if config.prepare.anchor > 0 and "anchor" not in manifests:  # of a version that scored it by one reference
        return None
    if any(manifest.damage(run.folder) for manifest in manifests.values()):
        return None
    read = {name: source["files"] for name, source in manifests["prepare"].fingerprint["sources"].items()}
    if read != {
        source.name: digests_of(list_files(source, written_by(run, config.score))) for source in config.all_sources()
    }:
        return None
    sets = list_evaluation_sets(config.evaluation_sets, written_by(run, config.score))
    if manifests["prepare"].fingerprint.get("decontaminate") != decontamination(sets).get("decontaminate"):
        return None
    config.warn_without_effect()
    for stage in manifests:
        log.info("%s: complete, skipped", stage)
    return run


def _with_formats_of(noted: RunConfig, config: RunConfig) -> RunConfig:
    """The settings with the formats that were found before, where they are to be found: the data are the same.

    Settings that differ in more than that stay different.
    """
    if config.data is not None:
        return config if config.format not in ("auto", None) else replace(config, format=noted.format)
    found = {source.name: source.format for source in noted.sources}
    return replace(
        config,
        sources=[
            replace(source, format=found.get(source.name, "auto")) if source.format == "auto" else source
            for source in config.sources
        ],
    )
