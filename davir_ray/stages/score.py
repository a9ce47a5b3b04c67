"""score: examples + base + reference → scores/, one file for each shard, through a pool of Ray actors.

Two other stages score with the base alone: `freeze` for preference training, and `ifd` after a run was scored.
"""

from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from davir_ray.config.scoring import ScoreConfig
from davir_ray.config.training import FinetuneConfig
from davir_ray.engine.pool import Stream
from davir_ray.engine.resources import device_of, num_gpus_of
from davir_ray.engine.shards import read_side_by_side
from davir_ray.models import anchor_scorer
from davir_ray.models.anchor_scorer import AnchorScorer
from davir_ray.models.base_cache import base_cache
from davir_ray.models.checkpoint import Checkpoint
from davir_ray.models.device import weights_precision
from davir_ray.models.reference import Reference, weights_of
from davir_ray.models.response_scorer import EXAMPLE_COLUMNS, SCORE_COLUMNS, ResponseScorer, start_id_of
from davir_ray.models.scorer import FOLD, INPUT_COLUMNS, FoldScorer, Scorer, ScorerSettings
from davir_ray.run.folder import Run
from davir_ray.run.manifest import Manifest
from davir_ray.schema import ANCHORED, IFD, SCORES
from davir_ray.stages.folds import ANCHOR, ANCHORED_FOLDER, Folds, anchored_file, source_of_anchored
from davir_ray.stages.ids import IDS_CHECKED, check_ids
from davir_ray.versions import NUMERICS_VERSION

_SAMPLED_ROWS = 200
"""Minimum number of rows whose token losses are kept with keep_token_nll sample."""


def score(
    run: Run,
    base: Checkpoint,
    reference: Reference | None,
    config: ScoreConfig,
    *,
    keep_token_nll: str = "sample",
    examples: Run | None = None,
    stage: str = "score",
    folder: str = "scores",
    autocast: str = "float32",
) -> Manifest:
    """Score every example with both models; rows of scores/ are in the order of examples/.

    With folds each is scored with the reference of its fold, which has not seen it, and the anchor with the first (see
    `score_anchor` for the others).

    `examples` is the run that holds the examples; None: this one. The last three parameters are for `freeze`, which has
    no reference, and `score_seen`.
    """
    examples = examples or run
    prepared = examples.require("prepare")
    # Twice the wanted rows in expectation: a sample by hash may be smaller than its mean, and 200 are guaranteed.
    sample_share = min(1.0, 2 * _SAMPLED_ROWS / prepared.counts["prepared"])
    settings = replace(scorer_settings(config, keep_token_nll, sample_share), autocast=autocast)
    fingerprint = _fingerprint(base, reference, prepared, settings)
    folds = Folds.of(prepared) if isinstance(reference, Mapping) else None
    if done := run.completed(stage, fingerprint):
        return done
    if not prepared.details.get(IDS_CHECKED):  # prepared by a version that checked them here
        check_ids(examples / "examples", prepared.files_in("examples"))
    stream = Stream(
        stage=stage,
        run=run,
        folder=folder,
        schema=SCORES,
        fingerprint=fingerprint,
        examples=examples,
        shards=prepared.files_in("examples"),
        columns=INPUT_COLUMNS if folds is None else [*INPUT_COLUMNS, FOLD],
        turn_of={} if folds is None else folds.of_file,
        ok_count="scored",
        new_detail="shards_scored_by_this_driver",
    )
    cache = base_cache(base, config)
    if isinstance(reference, Mapping):
        return stream.fill(partial(FoldScorer, base, reference, settings, cache), config)
    return stream.fill(partial(Scorer, base, reference, settings, cache), config)


def score_seen(run: Run, base: Checkpoint, references: Mapping[int, Checkpoint], config: ScoreConfig) -> Manifest:
    """Score every example of two folds with the other fold's reference; extra/seen/ has the columns of scores/.

    That reference has seen it, but for the anchor, which none has. The base's losses are computed once more, unless
    there is a base cache.
    """
    has_seen = {fold: references[1 - fold] for fold in references}
    return score(run, base, has_seen, config, keep_token_nll="none", stage="seen", folder="extra/seen")


def score_anchor(run: Run, base: Checkpoint, references: Mapping[int, Checkpoint], config: ScoreConfig) -> Manifest:
    """Score the rows of the anchor with every reference but the first, which has scored them in scores/.

    extra/anchor/ has a file for each reference and file of the anchor, with the rows of scores/ in their order. The
    settings and so the arithmetic are those of scores/, which has the base's losses.
    """
    prepared, scored = run.require("prepare"), run.require("score")
    folds, settings = Folds.of(prepared), scorer_settings(config, "none")
    if folds is None or not folds.has_anchor:
        raise ValueError(f"{run} has no anchor")
    fingerprint = _fingerprint(base, references, prepared, settings) | {"scores": scored.content}
    if done := run.completed("anchor", fingerprint):
        return done
    anchor, others = folds.files(prepared, ANCHOR), sorted(references)[1:]
    stream = Stream(
        stage="anchor",
        run=run,
        folder=ANCHORED_FOLDER,
        schema=ANCHORED,
        fingerprint=fingerprint,
        examples=run,
        shards=[replace(shard, name=anchored_file(shard.name, fold)) for fold in others for shard in anchor],
        columns=[],
        read=partial(_read_anchored, run),
        turn_of={anchored_file(shard.name, fold): fold for fold in others for shard in anchor},
        ok_count="scored",
        new_detail="shards_scored_by_this_driver",
    )
    return stream.fill(partial(AnchorScorer, base, references, settings), config)


def _read_anchored(run: Run, name: str) -> pa.Table:
    """The rows of a file of the anchor, and in the column `fold` the reference that is to score them."""
    source, fold = source_of_anchored(name)
    table = read_side_by_side(
        run / "examples", anchor_scorer.EXAMPLE_COLUMNS, run / "scores", anchor_scorer.SCORE_COLUMNS, source
    )
    return table.append_column(FOLD, pa.array([fold] * table.num_rows, pa.int8()))


def freeze(run: Run, base: Checkpoint, config: ScoreConfig, training: FinetuneConfig) -> Manifest:
    """Compute the losses of every example under the base alone, the frozen policy; frozen/ has the columns of scores/.

    They are computed in the arithmetic of the training, so that the policy starts equal to the frozen one: bfloat16
    shifts the log-probability of a response by tenths of a nat. So no layer is compiled, either.
    """
    config = replace(config, precision=weights_precision(training), compile=False)
    return score(
        run, base, None, config, keep_token_nll="none", stage="freeze", folder="frozen", autocast=training.precision
    )


def ifd(run: Run, base: Checkpoint, config: ScoreConfig) -> Manifest:
    """Compute IFD of every scored example by one more pass of the base; rows of extra/ifd are in the order of scores/.

    The base, the settings and so the arithmetic are those of scores/, which has the losses with the prompt.
    """
    prepared, scored = run.require("prepare"), run.require("score")
    start_id = start_id_of(base.tokenizer())
    settings = scorer_settings(config, "none")
    fingerprint = _fingerprint(base, None, prepared, settings) | {"scores": scored.content, "start_id": start_id}
    if done := run.completed("ifd", fingerprint):
        return done
    stream = Stream(
        stage="ifd",
        run=run,
        folder="extra/ifd",
        schema=IFD,
        fingerprint=fingerprint,
        examples=run,
        shards=prepared.files_in("examples"),
        columns=EXAMPLE_COLUMNS,
        score_columns=SCORE_COLUMNS,
        ok_count="scored",
        new_detail="shards_scored_by_this_driver",
        count_tokens=_num_alone_tokens,
    )
    return stream.fill(partial(ResponseScorer, base, settings, start_id, base_cache(base, config)), config)


def _num_alone_tokens(table: pa.Table) -> int:
    """Tokens of responses alone, their start tokens included."""
    return int(table.num_rows + np.asarray(table["num_response_tokens"]).sum())


def scorer_settings(config: ScoreConfig, keep_token_nll: str, sample_share: float = 0.0) -> ScorerSettings:
    """The settings of one actor's Scorer."""
    return ScorerSettings(
        device=device_of(config),
        gpu_share=min(1.0, num_gpus_of(config) or 1.0),
        precision=config.precision,
        compile=config.compile,
        tokens_per_pack=config.tokens_per_pack,
        num_threads=max(1, int(config.num_cpus)),
        keep_token_nll=keep_token_nll,
        sample_share=sample_share,
    )


def _fingerprint(
    base: Checkpoint, reference: Reference | None, prepared: Manifest, settings: ScorerSettings
) -> dict[str, Any]:
    """What the scores depend on."""
    kept = asdict(settings)
    del kept["tokens_per_pack"], kept["gpu_share"]  # an out-of-memory error may halve the packs on the way
    if settings.device != "cpu":
        del kept["num_threads"]
    if not settings.compile:  # scores of earlier versions, which compiled nothing, stay complete
        del kept["compile"]
    fingerprint: dict[str, Any] = {
        "base": base.weights_digest(),
        "reference": None if reference is None else weights_of(reference),
        "examples": prepared.content,
        "settings": kept,
        "numerics": NUMERICS_VERSION,
    }
    # Scores without this entry were computed without these modules, and must not count as complete.
    first = min(reference.items())[1] if isinstance(reference, Mapping) else reference  # all have the same recipe
    if first is not None and (modules := first.modules_to_save()):
        fingerprint["modules_to_save"] = modules
    return fingerprint
