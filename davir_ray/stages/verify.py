"""verify: are the files of a run unchanged, and does a plain loop compute the same scores?"""

from __future__ import annotations

import gc
import logging
import math
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import ray
import torch
from scipy.stats import spearmanr

from davir_ray.engine.connect import own_errors
from davir_ray.engine.console import configure_worker_logging
from davir_ray.engine.resources import has_gpu
from davir_ray.engine.shards import Shards, read_side_by_side
from davir_ray.engine.shuffle import gather
from davir_ray.errors import ConfigError, IntegrityError, OutputError
from davir_ray.formulas.hashing import random_keys, sample_rows, seed_from
from davir_ray.formulas.scores import Floats, davir
from davir_ray.models.checkpoint import Checkpoint
from davir_ray.models.device import DeviceKind, worker_device
from davir_ray.models.kernel.eager import eager_nll
from davir_ray.models.reference import Reference, by_fold, weights_of
from davir_ray.models.response_scorer import response_alone
from davir_ray.models.scorer import Tokenised
from davir_ray.run.files import FileEntry, read_parquet
from davir_ray.run.folder import Run
from davir_ray.run.location import Location
from davir_ray.run.manifest import Manifest, differences
from davir_ray.schema import EXAMPLES, IFD, SCORES, Status
from davir_ray.stages.folds import ANCHORED_FOLDER, Folds, source_of_anchored

if TYPE_CHECKING:  # transformers' models take seconds to import, and a driver loads none
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

_TOLERANCE = {"float64": 2e-3, "float32": 2e-3, "bfloat16": 0.3}
"""Nats per token by which a stored loss may differ from the plain one, by the dtype of the stored one.

Correct float32 losses differed by at most 7e-5; one wrong token or mask makes a difference of whole nats."""

_ANCHORED_SHARE = 0.1
"""Rows of the anchor that are scored again by references other than the first, as a share of the other rows."""

_SCORE_COLUMNS = ["example_id", "num_response_tokens", "base_nll", "reference_nll", "davir"]
_TOKEN_COLUMNS = ["input_ids", "response_spans"]
_DRAWN = pa.schema([("name", pa.string()), SCORES.field("example_id")])
_SCORED = pa.schema(
    [
        *map(SCORES.field, _SCORE_COLUMNS),
        *map(EXAMPLES.field, _TOKEN_COLUMNS),
        IFD.field("alone_nll"),
        pa.field("scored_by", pa.int64()),
    ]
)
"""`scored_by` is the fold of the reference that scored the row; 0 without folds."""


@dataclass(frozen=True, kw_only=True)
class Verification:
    """The result of scoring some rows again, one at a time in float32."""

    num_files: int
    """Files that match their manifests."""
    num_rows: int
    precision: str
    """Dtype in which the stored scores were computed."""
    largest_davir_difference: float
    largest_nll_difference: float
    """Nats per token, the largest of both models and, with IFD, of the responses alone."""
    rank_correlation: float
    """Spearman's correlation of stored and plain scores."""
    top_k: int
    """Number of these rows that the run's selected share amounts to, at least 1."""
    overlap: float
    """Share of the top k rows by stored scores that are also in the top k by plain ones."""
    num_anchored: int = 0
    """Number of these rows that are of the anchor, scored by another reference than in scores/."""

    def lines(self) -> list[str]:
        """Lines for the user."""
        return [
            f"files: {self.num_files}, unchanged since they were written",
            f"scores: {self.num_rows} rows"
            + (f" ({self.num_anchored} of extra/anchor)" if self.num_anchored else "")
            + f", stored in {self.precision}, computed again one at a time in float32",
            f"  largest difference: davir {self.largest_davir_difference:.3g}, "
            f"loss {self.largest_nll_difference:.3g} nats per token",
            f"  rank correlation (Spearman): {self.rank_correlation:.6f}",
            f"  overlap of the top {self.top_k}: {self.overlap:.1%}",
        ]


def verify(run: Run, base: Checkpoint, reference: Reference, num_rows: int, seed: int) -> Verification:
    """Check every committed file, and score some rows again; raises IntegrityError that names what differs."""
    num_files = _check_files(run)
    scored = run.require("score")
    for name, model in (("base", base), ("reference", reference)):
        if changed := differences(scored.fingerprint[name], weights_of(model)):
            uris = ", ".join(checkpoint.uri for checkpoint in by_fold(model).values())
            raise OutputError(f"{uris} is not the {name} that the run was scored with ({changed[0]})")
    ifd = run.manifest("ifd")
    rows = _draw(run, scored, num_rows, seed, with_ifd=ifd is not None)
    num_drawn = rows.num_rows
    if (anchored := run.manifest("anchor")) is not None:
        num_anchored = math.ceil(_ANCHORED_SHARE * num_rows)
        rows = pa.concat_tables([rows, _draw_anchored(run, anchored, num_anchored, seed)])
    start_id = None if ifd is None else ifd.fingerprint["start_id"]
    with own_errors():
        score_again = ray.remote(num_gpus=1 if has_gpu() else 0)(_score_again)
        losses = ray.get(score_again.remote(base, reference, rows, start_id, "cuda" if has_gpu() else "cpu"))
    selected = run.manifest("select")
    share = selected.counts["selected"] / scored.counts["scored"] if selected else 0.1
    return replace(_compare(rows, losses, scored, num_files, share), num_anchored=rows.num_rows - num_drawn)


def _check_files(run: Run) -> int:
    """The number of files of all complete stages; raises IntegrityError that names damaged ones.

    Local files are read, because their modification time says nothing about a failing disk. In a store the etag is
    enough, which depends on the content.
    """
    run.require("prepare")  # without the manifest, its files would not be checked
    manifests = run.manifests().values()
    damaged = [
        line for manifest in manifests for line in manifest.damage(run.folder, trust_marks=not run.folder.is_local)
    ]
    if damaged:
        raise IntegrityError(
            f"{len(damaged)} files of {run} have changed since they were written: {'; '.join(damaged[:5])}"
        )
    return sum(len(manifest.files) for manifest in manifests)


def _draw(run: Run, scored: Manifest, num_rows: int, seed: int, *, with_ifd: bool) -> pa.Table:
    """Random rows that have a score, with their tokens; the choice depends on the seed only. alone_nll may be null."""
    files = scored.files_in("scores")
    wanted = _drawn(run / "scores", files, scored.counts["scored"], num_rows, f"verify {seed}")
    if not wanted:
        raise ConfigError(f"no row of {run} has a score; there is nothing to verify")
    folds = Folds.of(run.require("prepare"))
    read = partial(_read_rows, run, wanted, {} if folds is None else folds.of_file, with_ifd)
    needed = Shards([entry for entry in files if entry.name in wanted], read)
    return gather(needed, _SCORED).sort_by("example_id")


def _draw_anchored(run: Run, anchored: Manifest, num_rows: int, seed: int) -> pa.Table:
    """Random rows of the anchor with their scores by references other than the first, and with their tokens."""
    files = anchored.files_in(ANCHORED_FOLDER)
    wanted = _drawn(run / ANCHORED_FOLDER, files, anchored.counts["scored"], num_rows, f"verify anchor {seed}")
    needed = Shards([entry for entry in files if entry.name in wanted], partial(_read_anchored, run, wanted))
    return gather(needed, _SCORED).sort_by("example_id")


def _drawn(
    folder: Location, files: list[FileEntry], num_scored: int, num_rows: int, purpose: str
) -> dict[str, list[int]]:
    """The ids of random rows that have a score, by their file."""
    # Three times as many in expectation: a sample by hash may be smaller than its mean.
    share = min(1.0, 3 * num_rows / num_scored) if num_scored else 0.0
    found = gather(Shards(files, partial(_read_drawn, folder, share, purpose)), _DRAWN)
    keys = random_keys(np.asarray(found["example_id"]), seed_from(purpose))
    wanted: dict[str, list[int]] = {}
    for row in found.take(pa.array(np.argsort(keys)[:num_rows])).to_pylist():
        wanted.setdefault(row["name"], []).append(row["example_id"])
    return wanted


def _read_drawn(folder: Location, share: float, purpose: str, name: str) -> pa.Table:
    table = sample_rows(read_parquet(folder / name, ["example_id", "status"]), share, purpose)
    ids = np.asarray(table["example_id"])[np.asarray(table["status"]) == Status.OK]
    return pa.table({"name": [name] * len(ids), "example_id": ids}, schema=_DRAWN)


def _read_rows(run: Run, wanted: dict[str, list[int]], fold_of: dict[str, int], with_ifd: bool, name: str) -> pa.Table:
    if with_ifd:
        scores = read_side_by_side(run / "scores", _SCORE_COLUMNS, run / "extra/ifd", ["alone_nll"], name)
    else:
        scores = read_parquet(run / "scores" / name, _SCORE_COLUMNS)
        scores = scores.append_column("alone_nll", pa.nulls(scores.num_rows, pa.float64()))
    scored_by = max(0, fold_of.get(name, 0))  # of the anchor, scores/ have those by the first
    scores = scores.append_column("scored_by", pa.array([scored_by] * scores.num_rows, pa.int64()))
    return _with_tokens(run, scores, name, wanted[name])


def _read_anchored(run: Run, wanted: dict[str, list[int]], name: str) -> pa.Table:
    scores = read_parquet(run / ANCHORED_FOLDER / name, [*_SCORE_COLUMNS, "scored_by"])
    scores = scores.append_column("alone_nll", pa.nulls(scores.num_rows, pa.float64()))
    return _with_tokens(run, scores, source_of_anchored(name)[0], wanted[name])


def _with_tokens(run: Run, scores: pa.Table, name: str, wanted: list[int]) -> pa.Table:
    """The wanted rows of scores, with the tokens that a file of examples has for them, in the same order."""
    tokens = read_parquet(run / "examples" / name, _TOKEN_COLUMNS)
    for column in _TOKEN_COLUMNS:
        scores = scores.append_column(column, tokens[column])
    mask = np.isin(np.asarray(scores["example_id"]), wanted)
    return scores.filter(pa.array(mask)).select(_SCORED.names).cast(_SCORED)


def _score_again(
    base: Checkpoint, reference: Reference, rows: pa.Table, start_id: int | None, device: DeviceKind
) -> tuple[Floats, ...]:
    configure_worker_logging()
    losses = np.empty((2 if start_id is None else 3, rows.num_rows))
    for fold, checkpoint in by_fold(reference).items():
        at = np.flatnonzero(np.asarray(rows["scored_by"]) == fold)
        if len(at):
            losses[:, at] = plain_losses(base, checkpoint, rows.take(pa.array(at)), worker_device(device), start_id)
    return tuple(losses)


def plain_losses(
    base: Checkpoint, reference: Checkpoint, rows: pa.Table, device: torch.device, start_id: int | None = None
) -> tuple[Floats, ...]:
    """Summed nats of each row's response under both models: float32, one at a time, transformers' own forward.

    With a start token, there is a third array: the base's losses of the responses alone.

    The models are loaded one after the other, as both may not fit. An adapter is loaded by peft and never switched off:
    how scoring loads and switches it is what is checked.
    """
    examples = [
        (np.array(row["input_ids"], np.int32), tuple(row["response_spans"]))
        for row in rows.select(_TOKEN_COLUMNS).to_pylist()
    ]

    alone = [] if start_id is None else [response_alone(*example, start_id) for example in examples]

    @torch.no_grad()
    def losses(model: PreTrainedModel, sequences: list[Tokenised]) -> Floats:
        return np.array([float(eager_nll(model, ids, spans).double().sum()) for ids, spans in sequences])

    model = base.model(torch.float32, device)
    base_nll, alone_nll = losses(model, examples), losses(model, alone)
    del model
    gc.collect()
    adapted = reference.is_adapter
    model = reference.as_peft(base.model(torch.float32, device)) if adapted else reference.model(torch.float32, device)
    reference_nll = losses(model, examples)
    return (base_nll, reference_nll, alone_nll) if alone else (base_nll, reference_nll)


def _compare(
    rows: pa.Table, losses: tuple[Floats, ...], scored: Manifest, num_files: int, share: float
) -> Verification:
    base_nll, reference_nll, *alone_nll = losses
    # The coarsest dtype that any shard was computed in.
    precision = max((str(one["weights"]) for one in scored.details["numerics"]), key=lambda name: _TOLERANCE[name])
    num_tokens = np.asarray(rows["num_response_tokens"]).astype(np.float64)
    differences_N = [np.asarray(rows["base_nll"]) - base_nll, np.asarray(rows["reference_nll"]) - reference_nll]
    for plain in alone_nll:
        stored_alone = rows["alone_nll"].to_numpy()  # null where the pass has no loss, and says why
        differences_N.append(np.where(np.isnan(stored_alone), 0.0, stored_alone - plain))
    worst = np.abs(np.stack(differences_N)).max(axis=0) / num_tokens
    stored, plain = np.asarray(rows["davir"]), davir(base_nll, reference_nll)
    top_k = max(1, round(share * len(stored)))
    top_stored, top_plain = (np.argsort(-values, kind="stable")[:top_k] for values in (stored, plain))
    result = Verification(
        num_files=num_files,
        num_rows=len(stored),
        precision=precision,
        largest_davir_difference=float(np.abs(stored - plain).max()),
        largest_nll_difference=float(worst.max()),
        rank_correlation=float(spearmanr(stored, plain).statistic) if len(set(stored.tolist())) > 1 else 1.0,
        top_k=top_k,
        overlap=len(np.intersect1d(top_stored, top_plain)) / top_k,
    )
    if not worst.max() <= _TOLERANCE[precision]:
        row = rows.slice(int(worst.argmax()), 1).to_pylist()[0]
        raise IntegrityError(
            f"the stored losses of example {row['example_id']} differ by {worst.max():.3g} nats per token from a plain "
            f"loop in float32 (more than {_TOLERANCE[precision]} for {precision}); {'; '.join(result.lines()[2:])}"
        )
    return result
