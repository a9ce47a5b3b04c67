"""The checks at the start of a job: settings, paths, tokenizers and templates, before any slow work begins."""

import logging
from collections.abc import Collection
from dataclasses import replace
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from davir_ray.config.run import InputConfig, RunConfig
from davir_ray.config.sources import Source
from davir_ray.config.yaml import load
from davir_ray.data.chat import ChatTemplate
from davir_ray.data.detection import with_format
from davir_ray.data.files import SourceFile, list_files
from davir_ray.data.formats import check_chat_template, needs_chat
from davir_ray.engine.trackers import check_tracker
from davir_ray.errors import ConfigError, DataError, ModelError, OutputError
from davir_ray.models.checkpoint import Checkpoint
from davir_ray.models.size import num_ids
from davir_ray.models.tokenizer import check_same_encoding
from davir_ray.places import check_places, read_template, written_by
from davir_ray.run.access import check_readable
from davir_ray.run.folder import Run
from davir_ray.run.manifest import CONFIG_FILE, Manifest, differences
from davir_ray.stages.prepare import Preparation, prepare, scoring_spec

log = logging.getLogger(__name__)


Config = TypeVar("Config", bound=InputConfig)


def with_formats(config: Config, *, pairs: bool = False) -> tuple[Config, list[list[SourceFile]]]:
    """The settings with the format of every source, found where it is auto, and the files of each source.

    It comes before everything that depends on a source's name or format: ids, fingerprints and the remembered settings.
    See davir_ray.data.detection.
    """
    check_readable([(path, DataError) for source in config.all_sources() for path in source.paths])
    written = written_by(Run.at(config.output or ""), config.score)
    files = [list_files(source, written) for source in config.all_sources()]
    sources = [
        with_format(source, listed, config.prepare, pairs=pairs)
        for source, listed in zip(config.all_sources(), files, strict=True)
    ]
    if config.data is None:
        return replace(config, sources=sources), files
    config = replace(config, format=sources[0].format)
    (source,) = config.all_sources()  # it is named after its format
    return config, [[replace(file, source=source.name) for file in listed] for listed in files]


def check_inputs(config: InputConfig, *models: str | None) -> tuple[Run, Preparation]:
    """Check the settings and everything they name, before Ray starts or weights are loaded.

    `models` are models besides the base that must be readable.
    """
    config.warn_without_effect()
    run = Run.at(config.output or "", overwrite=config.overwrite)
    check_tracker(config.track, run)
    check_places(config, run, *models)
    base = Checkpoint.find(config.base or "", config.trust_remote_code)
    template = read_template(config.chat_template)
    check_chat_template(template, config.all_sources(), config.prepare)
    preparation = Preparation(
        base=base,
        config=config.prepare,
        chat_template=template,
        keep_record=config.keep_record,
        limit=config.limit,
        evaluation_sets=tuple(config.evaluation_sets),
    )
    check_base(preparation, config.all_sources())
    return run, preparation


def prepare_inputs(
    run: Run, config: InputConfig, preparation: Preparation, files: list[list[SourceFile]], there: Collection[str]
) -> Manifest:
    """Prepare the job's sources, each of which has these files; `there` is what Run.writing found in the folder."""
    return prepare(
        run,
        config.all_sources(),
        preparation,
        max_bad_fraction=config.max_bad_fraction,
        files=files,
        there=there,
    )


def check_base(preparation: Preparation, sources: list[Source]) -> None:
    """Check the base against the settings and the sources.

    Raises ModelError if the base is an adapter, lacks a chat template that is needed or has tokens without an
    embedding, and ConfigError if it has fewer positions than prepare.max_tokens.
    """
    base, max_tokens = preparation.base, preparation.config.max_tokens
    if base.is_adapter:
        raise ModelError(f"{base.uri} is an adapter; give the model it was trained on as the base")
    longest = getattr(base.config().get_text_config(), "max_position_embeddings", None)
    if longest and max_tokens > longest:
        raise ConfigError(f"prepare.max_tokens is {max_tokens}, but {base.uri} has {longest} positions")
    tokenizer = base.tokenizer()
    _check_embedding_rows(base, {base.uri: tokenizer})
    if any(needs_chat(source, preparation.config) for source in sources):
        ChatTemplate.from_tokenizer(tokenizer, preparation.chat_template)


def check_reference(reference: Checkpoint, preparation: Preparation, sources: list[Source]) -> None:
    """Raise ModelError unless the reference belongs to the base and was trained on text encoded in the same way."""
    base = preparation.base
    if reference.is_adapter:  # it uses the base's embeddings
        reference.check_adapter(base)
    else:
        ours, theirs = base.tokenizer(), reference.tokenizer()
        check_same_encoding(ours, theirs, (base.uri, reference.uri))
        _check_embedding_rows(reference, {base.uri: ours, reference.uri: theirs})
    spec = reference.spec()
    if spec is not None and (changed := differences(spec, scoring_spec(preparation, sources))):
        raise ModelError(
            f"{reference.uri} was fine-tuned on text that was encoded differently ({'; '.join(changed)}); "
            "use the same settings"
        )


def _check_embedding_rows(model: Checkpoint, tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    """Raise ModelError unless the model has an embedding row for each token; keys are the tokenizers' checkpoints."""
    limit = num_ids(model)
    for uri, tokenizer in tokenizers.items():
        roles = tokenizer.special_tokens_map
        # An image, audio or video processor inserts these, text never has them; gemma-3-1b has one without a row.
        placeholders = {str(roles.get(f"{kind}_token")) for kind in ("image", "audio", "video")}
        beyond = {id: token for token, id in tokenizer.get_vocab().items() if id >= limit and token not in placeholders}
        if beyond:
            first = min(beyond)
            more = f" and {len(beyond) - 1} more beyond them" if len(beyond) > 1 else ""
            raise ModelError(
                f"the tokenizer of {uri} has the token {beyond[first]!r} with the id {first}{more}, but {model.uri} "
                f"has {limit} embedding rows; resize it (model.resize_token_embeddings({max(beyond) + 1})), train it "
                "and save it, or remove these tokens from the tokenizer"
            )


def last_config(run: Run) -> RunConfig:
    """The configuration of a finished run's last command."""
    try:
        return load(RunConfig, (run / CONFIG_FILE).read_text())
    except FileNotFoundError as error:
        raise OutputError(f"{run} has no {CONFIG_FILE}; run jobs/score.py with this --output again") from error
    except ConfigError as error:
        raise OutputError(f"{run} was not written by jobs/score.py, or by another version of it: {error}") from error


def scored_with(run: Run, role: str, uri: str, trust_remote_code: bool) -> Checkpoint:
    """The base or reference that a finished run was scored with; a model of the hub at the same commit."""
    commit = run.require("score").fingerprint[role].get("commit")
    return Checkpoint.find(f"{uri.partition('@')[0]}@{commit}" if commit else uri, trust_remote_code)
