"""Scoring in one worker: base and reference side by side, a shard's columns in, score columns out.

An ordinary class: the same object serves a unit test, a notebook and a Ray actor.
"""

import gc
import logging
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
import transformers

from davir_ray.errors import ModelError
from davir_ray.formulas import scores as formulas
from davir_ray.formulas.hashing import seed_from
from davir_ray.models.adapter import adapter_switched_off, detach_adapter
from davir_ray.models.base_cache import BaseCache
from davir_ray.models.checkpoint import Checkpoint
from davir_ray.models.device import DeviceKind, device_name, resolve_dtype, uses_autocast, worker_device
from davir_ray.models.kernel.likelihood import TOKENS_PER_PACK, Likelihood, Pack
from davir_ray.models.kernel.self_check import probe, self_check
from davir_ray.models.memory import TokenBudget
from davir_ray.schema import SCORES, Status
from davir_ray.versions import NUMERICS_VERSION

log = logging.getLogger(__name__)

INPUT_COLUMNS = [
    "example_id", "content_hash", "source", "num_prompt_tokens", "num_response_tokens", "truncated",
    "input_ids", "response_spans",
]  # fmt: skip
"""Columns of examples that scoring reads; the text is not needed."""

FOLD = "fold"
"""Column of examples that scoring with folds reads, too."""

_PASSED_ON = INPUT_COLUMNS[:6]

Tokenised = tuple[npt.NDArray[np.int32], tuple[int, ...]]
"""(input_ids, response_spans) of one example."""

TokenNlls = list[npt.NDArray[np.float32] | None]
"""For each example the NLL in nats of its scored tokens; None if the example does not fit the device even alone."""


@dataclass(frozen=True, kw_only=True)
class ScorerSettings:
    """Settings that the scores depend on, apart from the models."""

    device: DeviceKind = "cpu"
    gpu_share: float = 1.0
    """Of a GPU that several workers share."""
    precision: str = "auto"
    tokens_per_pack: int | None = None
    compile: bool = False
    """Whether the layers are compiled."""
    num_threads: int = 1
    """Number of CPU threads that the process computes with; another number may change the last bits."""
    keep_token_nll: str = "none"
    """Rows whose token losses are kept: 'all', 'none', or a 'sample' of the share sample_share."""
    sample_share: float = 0.0
    autocast: str = "float32"
    """Precision of the fine-tune whose autocast scoring repeats; float32: no autocast."""


class Scorer:
    """Holds base and reference, and scores tables of examples. An adapter and its base share one copy of the weights.

    Without a reference only the base's losses are computed, for the frozen policy of preference training.
    """

    def __init__(
        self,
        base: Checkpoint,
        reference: Checkpoint | None,
        settings: ScorerSettings,
        base_cache: BaseCache | None = None,
    ) -> None:
        torch.set_num_threads(settings.num_threads)
        self._settings = settings
        self._cache = base_cache
        device = worker_device(settings.device, settings.gpu_share)
        self._device, self._dtype = device, resolve_dtype(settings.precision, device)
        self._autocast = uses_autocast(settings.autocast, device)
        self._budget = TokenBudget(settings.tokens_per_pack or TOKENS_PER_PACK[device.type])
        self._base = self._likelihood(base)
        self._base_attention = self_check(self._base, autocast=self._autocast)
        self._reference: Likelihood | None = None
        if reference is not None:
            self._load(reference)
        self._note_numerics()

    def use(self, reference: Checkpoint) -> None:
        """Score with another reference from now on; the one before is given up first, and the base stays."""
        if self._reference is self._base:
            detach_adapter(self._base.model)
        self._reference = None
        gc.unfreeze()  # a model with compiled layers is a cycle, which is not seen while it is frozen
        gc.collect()
        self._load(reference)
        self._note_numerics()

    def _load(self, reference: Checkpoint) -> None:
        self._reference = self._attach(reference) if reference.is_adapter else self._likelihood(reference)

    def _note_numerics(self) -> None:
        """Check the losses of the models, and note in `numerics` the arithmetic that they are computed in."""
        base_attention = reference_attention = self._base_attention
        if self._reference is not None:
            reference_attention = self_check(self._reference, autocast=self._autocast)
        if self._reference is self._base:  # one model with an adapter: its last check holds for both
            base_attention = reference_attention
        device, dtype = self._device, self._dtype
        # Every file of scores holds this text: in another order of its keys, a resumed run would have other bytes.
        self._base_numerics = {
            "version": NUMERICS_VERSION,
            "device": device.type,
            "device_name": device_name(device),
            "weights": str(dtype).removeprefix("torch."),
            "autocast": self._autocast,
            "logits": str(torch.promote_types(dtype, torch.float32)).removeprefix("torch."),
            "sums": "float64",
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "base_attention": base_attention,
        }
        if self._settings.compile:  # without it the text is that of earlier versions, whose cached losses stay valid
            self._base_numerics["compile"] = True
        fell_back = {base_attention, reference_attention} != {"packed"}
        self.numerics = {**self._base_numerics, "reference_attention": reference_attention, "fell_back": fell_back}
        log.info("scoring with %s", self.numerics)

    def __call__(self, examples: pa.Table) -> pa.Table:
        """Score a table with INPUT_COLUMNS; returns the columns of SCORES, in the same row order."""
        sequences = list(tokenised(examples))
        rows, index = _distinct(sequences)
        ids = np.asarray(examples["example_id"])[rows]
        distinct = [sequences[row] for row in rows]
        base = self._base_token_nlls(distinct, ids)
        reference = None if self._reference is None else self._token_nlls(self._reference, distinct, ids)
        return self._score_table(examples, index, base, reference)

    def base_nll(
        self, sequences: list[Tokenised], ids: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[Any]]:
        """The base's loss of each sequence, in nats, and its status; the losses are cached as those of examples are."""
        rows, index = _distinct(sequences)
        return _sums(self._base_token_nlls([sequences[row] for row in rows], ids[rows]), index)

    def reference_nll(
        self, sequences: list[Tokenised], ids: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[Any]]:
        """The reference's loss of each sequence, in nats, and its status, to the bit as in a table of scores."""
        if self._reference is None:
            raise ValueError("there is no reference")
        rows, index = _distinct(sequences)
        return _sums(self._token_nlls(self._reference, [sequences[row] for row in rows], ids[rows]), index)

    def _likelihood(self, checkpoint: Checkpoint) -> Likelihood:
        likelihood = Likelihood(checkpoint.model(self._dtype, self._device))
        if self._settings.compile:
            likelihood.compile_layers()
        return likelihood

    def _attach(self, adapter: Checkpoint) -> Likelihood:
        """Attach an adapter to the base; raises ModelError if switching it changes a bit of either's losses."""
        before = probe(self._base)
        adapter.attach_to(self._base.model)
        switched_on = probe(self._base)
        with adapter_switched_off(self._base.model):
            switched_off = probe(self._base)
        if not torch.equal(switched_off, before):
            fault = "changes the losses of the base even when it is switched off"
            raise ModelError(f"{adapter.uri} {fault}; merge it into a model")
        if not torch.equal(probe(self._base), switched_on):
            fault = "gives other losses after it was switched off and on"
            raise ModelError(f"{adapter.uri} {fault}; merge it into a model")
        return self._base

    def _base_token_nlls(self, sequences: list[Tokenised], ids: npt.NDArray[np.int64]) -> TokenNlls:
        """The base's token losses, from the cache if it has them."""
        if self._cache is None:
            return self._token_nlls(self._base, sequences, ids, switched_off=True)
        place = self._cache.place(self._base_numerics, ids, sequences)
        if (kept := self._cache.read(place, sequences)) is not None:
            log.info("score: base losses from %s", place)
            return list(kept)
        nlls = self._token_nlls(self._base, sequences, ids, switched_off=True)
        complete = [nll for nll in nlls if nll is not None]
        if complete and len(complete) == len(nlls):  # an example that does not fit this device may fit another
            self._cache.write(place, complete)
        return nlls

    @torch.inference_mode()
    def _token_nlls(
        self,
        likelihood: Likelihood,
        sequences: list[Tokenised],
        ids: npt.NDArray[np.int64],
        *,
        switched_off: bool = False,
    ) -> TokenNlls:
        """Token losses of every sequence; with the adapter switched off, those of the base."""
        device = likelihood.model.device

        def forward(rows: npt.NDArray[np.int64]) -> tuple[torch.Tensor, tuple[int, ...]]:
            packed = Pack.of([sequences[row] for row in rows]).to(device)
            return likelihood(packed), packed.num_scored

        lengths = np.array([len(input_ids) for input_ids, _ in sequences], dtype=np.int64)
        arithmetic = torch.autocast(device.type, torch.bfloat16, enabled=self._autocast)
        with arithmetic, adapter_switched_off(likelihood.model) if switched_off else nullcontext():
            # Losses stay on the device until every pass has begun: while a GPU computes one, the next is prepared.
            passes = list(self._budget.run(forward, np.arange(len(sequences)), lengths, ids))
        nlls: TokenNlls = [None] * len(sequences)
        for rows, (nll_R, num_scored) in passes:
            for row, nll in zip(rows, np.split(nll_R.cpu().numpy(), np.cumsum(num_scored)[:-1]), strict=True):
                nlls[row] = nll
        return nlls

    def _score_table(
        self, examples: pa.Table, index: npt.NDArray[np.int64], base: TokenNlls, reference: TokenNlls | None
    ) -> pa.Table:
        base_nll, base_status = _sums(base, index)
        if reference is None:
            reference_nll, reference_status = np.full_like(base_nll, np.nan), base_status
        else:
            reference_nll, reference_status = _sums(reference, index)
        davir = formulas.davir(base_nll, reference_nll)
        status = np.where(base_status == Status.OK, reference_status, base_status)
        status[(status == Status.OK) & (base_nll == 0)] = Status.ZERO_BASE_NLL
        num_tokens = np.asarray(examples["num_response_tokens"])
        known = np.isin(status, [Status.OK, Status.ZERO_BASE_NLL]) & (reference is not None)
        columns = {name: examples[name] for name in _PASSED_ON} | {
            "base_nll": nullable(base_nll, np.isfinite(base_nll)),
            "reference_nll": nullable(reference_nll, np.isfinite(reference_nll)),
            "davir": nullable(davir, (status == Status.OK) & (reference is not None)),
            "rho_sum": nullable(formulas.rho_sum(base_nll, reference_nll), known),
            "rho_mean": nullable(formulas.rho_mean(base_nll, reference_nll, num_tokens), known),
            "status": pa.array(status.tolist(), pa.string()),
            "base_token_nll": self._kept(examples, base, index),
            "reference_token_nll": self._kept(examples, reference or [None] * len(base), index),
        }
        return pa.table(columns, schema=SCORES)

    def _kept(self, examples: pa.Table, nlls: TokenNlls, index: npt.NDArray[np.int64]) -> pa.Array:
        """The token losses of the rows that keep them, null elsewhere."""
        keep = self._settings.keep_token_nll
        share = {"all": 1.0, "none": 0.0, "sample": self._settings.sample_share}[keep]
        values = [
            nlls[at] if at >= 0 and is_sampled(int(example_id), share) else None
            for example_id, at in zip(examples["example_id"].to_pylist(), index, strict=True)
        ]
        return pa.array(values, pa.list_(pa.float32()))


class FoldScorer:
    """Scores each table of one fold with that fold's reference; the base stays loaded, and one reference at a time."""

    def __init__(
        self,
        base: Checkpoint,
        references: Mapping[int, Checkpoint],
        settings: ScorerSettings,
        base_cache: BaseCache | None = None,
    ) -> None:
        self._references = references
        self._fold: int | None = None
        self._scorer = Scorer(base, None, settings, base_cache)

    @property
    def numerics(self) -> dict[str, Any]:
        """The arithmetic of the last call; see Scorer."""
        return self._scorer.numerics

    def __call__(self, examples: pa.Table) -> pa.Table:
        """Score a table with INPUT_COLUMNS and FOLD, which is the same in every row."""
        return self.scorer_of(examples)(examples)

    def scorer_of(self, examples: pa.Table) -> Scorer:
        """The scorer with the reference of the fold of these rows; that of the anchor is the first."""
        fold, *others = pc.unique(examples[FOLD]).to_pylist()
        if others:
            raise ValueError(f"a shard has rows of one fold, and this one of {len(others) + 1}")
        fold = max(0, fold)  # the first has not seen the anchor, either
        if fold != self._fold:
            log.info("score: the reference of fold %d", fold)
            self._scorer.use(self._references[fold])
            self._fold = fold
        return self._scorer


def is_sampled(example_id: int, share: float) -> bool:
    """Whether a row is in a sample of this share. It depends on the id alone, so every run draws the same rows."""
    return seed_from("token_nll", example_id) < share * 2**63


def tokenised(examples: pa.Table) -> Iterator[Tokenised]:
    """(input_ids, response_spans) of each row; the ids are views."""
    ids, spans = (examples[name].combine_chunks() for name in ("input_ids", "response_spans"))
    values, edges = np.asarray(ids.values), np.asarray(ids.offsets)
    for row, span in enumerate(spans.to_pylist()):
        yield values[edges[row] : edges[row + 1]], tuple(span)


def _distinct(sequences: list[Tokenised]) -> tuple[list[int], npt.NDArray[np.int64]]:
    """One row for each distinct sequence, and for every row the index of its sequence; -1 if it cannot be scored.

    A sequence cannot be scored if nothing predicts its first scored token.
    """
    seen: dict[tuple[bytes, tuple[int, ...]], int] = {}
    rows: list[int] = []
    index = np.full(len(sequences), -1, dtype=np.int64)
    for row, (input_ids, spans) in enumerate(sequences):
        if not spans or spans[0] == 0:
            continue
        key = (input_ids.tobytes(), spans)
        if key not in seen:
            seen[key] = len(rows)
            rows.append(row)
        index[row] = seen[key]
    return rows, index


def _sums(nlls: TokenNlls, index: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.float64], npt.NDArray[Any]]:
    """Summed nats of each example, in float64 and token order, and its status; NaN where there is none."""
    totals, statuses = [], []
    for nll in nlls:
        total = np.nan if nll is None else float(nll.sum(dtype=np.float64))
        found = Status.OK if np.isfinite(total) else Status.NON_FINITE_NLL
        totals.append(total)
        statuses.append(Status.OUT_OF_MEMORY if nll is None else found)
    # Index -1 selects this last element.
    totals.append(np.nan)
    statuses.append(Status.NO_PREDICTOR)
    return np.array(totals)[index], np.array(statuses, dtype=object)[index]


def nullable(values: npt.NDArray[np.float64], valid: npt.NDArray[np.bool_]) -> pa.Array:
    """The values, null where they are not valid or NaN: a score is never made up."""
    array = pa.array(values, pa.float64(), mask=~np.asarray(valid, dtype=bool))
    return pc.if_else(pc.is_nan(array), pa.scalar(None, pa.float64()), array)
