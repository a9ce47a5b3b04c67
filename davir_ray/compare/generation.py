"""generate: examples + a model → generations/, one file for each shard, through a pool of Ray actors."""

from dataclasses import asdict
from functools import partial

import pyarrow.compute as pc

from davir_ray.config.run import GenerateConfig
from davir_ray.config.scoring import ScoreConfig
from davir_ray.data.chat import ChatTemplate
from davir_ray.engine.pool import Stream
from davir_ray.engine.resources import device_of, num_gpus_of
from davir_ray.errors import ConfigError, ModelError, OutputError
from davir_ray.models.checkpoint import Checkpoint
from davir_ray.models.generator import GENERATION_VERSION, INPUT_COLUMNS, Generator, GeneratorSettings
from davir_ray.run.files import FileEntry, read_parquet
from davir_ray.run.folder import Run
from davir_ray.run.location import each
from davir_ray.run.manifest import Manifest
from davir_ray.schema import GENERATIONS


def generate(
    run: Run,
    model: Checkpoint,
    config: GenerateConfig,
    pool: ScoreConfig,
    *,
    examples: Run | None = None,
    base: Checkpoint | None = None,
    chat_template: str | None = None,
) -> Manifest:
    """Continue the prompt of every example greedily; rows of generations/ are in the order of examples/.

    `examples` is the run that holds the examples (None: this one); `base` is the model that an adapter was trained on;
    `chat_template` is the text of the template that the examples were rendered with (None: the tokenizer's).
    ModelError for an adapter without its base, ConfigError if one of the configured sources has no examples.
    """
    holder = examples or run
    prepared = holder.require("prepare")
    _check_model(model, base)
    settings = GeneratorSettings(
        max_new_tokens=config.max_new_tokens,
        device=device_of(pool),
        gpu_share=min(1.0, num_gpus_of(pool) or 1.0),
        precision=pool.precision,
        tokens_per_batch=config.tokens_per_batch,
        num_threads=max(1, int(pool.num_cpus)),
        turn_end=_turn_end(base if model.is_adapter and base else model, chat_template),
    )
    what_matters = asdict(settings)
    del what_matters["tokens_per_batch"], what_matters["gpu_share"]  # batches are halved when memory runs out
    base_digest = base.weights_digest() if model.is_adapter and base else {}
    fingerprint = {
        "model": model.weights_digest() | {f"base {name}": digest for name, digest in base_digest.items()},
        "examples": prepared.content,
        "sources": sorted(config.sources),
        "settings": what_matters,
        "version": GENERATION_VERSION,
    }
    if done := run.completed("generate", fingerprint):
        return done
    stream = Stream(
        stage="generate",
        run=run,
        folder="generations",
        schema=GENERATIONS,
        fingerprint=fingerprint,
        examples=holder,
        shards=_of_sources(holder, prepared.files_in("examples"), config.sources),
        columns=INPUT_COLUMNS,
        ok_count="generated",
        new_detail="shards_done_by_this_driver",
        count_tokens=lambda table: int(pc.sum(table["num_new_tokens"]).as_py() or 0),
    )
    return stream.fill(partial(Generator, model=model, settings=settings, base=base), pool)


def generated_from(run: Run, examples: Run) -> tuple[Manifest, Manifest]:
    """Manifests of the texts of a run and of the examples they continue; OutputError if they do not belong together."""
    generated, prepared = run.require("generate"), examples.require("prepare")
    if generated.fingerprint["examples"] != prepared.content:
        raise OutputError(f"the texts of {run} were generated from other examples than those of {examples}")
    return generated, prepared


def _check_model(model: Checkpoint, base: Checkpoint | None) -> None:
    """Check that an adapter has its base, before any weights are loaded."""
    if not model.is_adapter:
        return
    if base is None:
        raise ModelError(f"{model.uri} is an adapter; give the base that it was trained on")
    if base.is_adapter:
        raise ModelError(f"{base.uri} is an adapter itself; give a base with weights of its own")
    model.check_adapter(base)


def _turn_end(checkpoint: Checkpoint, template: str | None) -> int | None:
    """Id of the token that the chat template ends a turn with: a model tuned on conversations ends its text with it."""
    tokenizer = checkpoint.tokenizer()
    if template is None and not tokenizer.chat_template:
        return None
    token = ChatTemplate.from_tokenizer(tokenizer, template).turn_end()
    return None if token is None else int(tokenizer.convert_tokens_to_ids(token))


def _of_sources(run: Run, shards: list[FileEntry], sources: list[str]) -> list[FileEntry]:
    """The shards of these sources, or all if none is named; every shard holds rows of one source."""
    if not sources:
        return shards
    names = each(lambda shard: read_parquet(run / "examples" / shard.name, ["source"])["source"][0].as_py(), shards)
    if absent := sorted(set(sources) - set(names)):
        raise ConfigError(
            f"no example of {run} is of the source {absent[0]!r}; there are {', '.join(sorted(set(names)))}"
        )
    return [shard for shard, name in zip(shards, names, strict=True) if name in sources]
