"""How the run went: the training curve, the throughput of scoring, what each stage left."""

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from davir_ray.report.inputs import Manifests, details_of
from davir_ray.report.jsonable import flatten

STAGES = ("prepare", "finetune", "score", "rank", "select")
MAX_CURVE_POINTS = 500
MAX_RATES = 60  # in shorter intervals two shards that end together would look like a burst
_CURVES = ("loss_by_step", "throughput")


def training(manifests: Manifests) -> dict[str, Any] | None:
    """The fine-tune's loss by step, nats per token; None where none is recorded."""
    curve = [list(point) for point in details_of(manifests, "finetune").get("loss_by_step") or []]
    curve = [point for point in curve if point[1] is not None and math.isfinite(point[1])]
    if not curve:
        return None
    stride = math.ceil(len(curve) / (MAX_CURVE_POINTS - 1))
    tenth = max(1, len(curve) // 10)  # a single step's loss is one batch's, too noisy to quote
    return {
        "steps": curve[-1][0],
        "first": float(np.mean([loss for _, loss in curve[:tenth]])),
        "last": float(np.mean([loss for _, loss in curve[-tenth:]])),
        "loss_by_step": [*curve[:-1:stride], curve[-1]],
    }


def throughput(manifests: Manifests) -> dict[str, Any] | None:
    """Tokens scored a second between the recorded points; None where nothing is recorded."""
    recorded = details_of(manifests, "score").get("throughput") or {}
    seconds, tokens = recorded.get("seconds") or [], recorded.get("tokens") or []
    if not seconds or len(seconds) != len(tokens) or not seconds[-1] > 0:
        return None
    return {
        "seconds": seconds[-1],
        "tokens": tokens[-1],
        "tokens_per_second": tokens[-1] / seconds[-1],
        "first_seconds": seconds[0],
        "rates": _rates(list(zip(seconds, tokens, strict=True))),
    }


def _rates(points: list[tuple[float, float]]) -> list[dict[str, float]]:
    """Tokens a second from each point to the next, points that are near in time taken together."""
    shortest = (points[-1][0] - points[0][0]) / MAX_RATES
    kept = points[:1]
    for point in points[1:]:
        if point[0] - kept[-1][0] >= shortest:
            kept.append(point)
    if kept[-1] != points[-1]:  # the last interval takes in what is left over
        kept = [*kept[: max(1, len(kept) - 1)], points[-1]]
    return [
        {"from": start, "to": end, "tokens_per_second": (after - before) / (end - start)}
        for (start, before), (end, after) in pairwise(kept)
        if end > start
    ]


def stages(manifests: Manifests) -> list[dict[str, Any]]:
    """What each stage counted, took and depended on, in the order of the run."""
    known = [stage for stage in STAGES if stage in manifests]
    return [_stage(stage, manifests[stage]) for stage in [*known, *sorted(manifests.keys() - set(STAGES))]]


def _stage(stage: str, manifest: dict[str, Any]) -> dict[str, Any]:
    details = {name: value for name, value in (manifest.get("details") or {}).items() if name not in _CURVES}
    return {
        "stage": stage,
        "seconds": manifest.get("seconds"),
        "num_files": len(manifest.get("files") or []),
        "counts": _named(manifest.get("counts")),
        "details": _named(details),
        "versions": _named(manifest.get("versions")),
        "fingerprint": _named(manifest.get("fingerprint")),
    }


def _named(mapping: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    return [{"name": name, "value": value} for name, value in flatten(mapping or {})]
