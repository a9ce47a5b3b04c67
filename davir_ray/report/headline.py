"""What was run, in a few numbers and one sentence."""

from collections.abc import Mapping
from typing import Any

from davir_ray.config.selection import SELECT_RULES
from davir_ray.report.inputs import ReportInputs, counts_of
from davir_ray.schema import Status


def figures(inputs: ReportInputs) -> dict[str, Any]:
    """Counts of the whole run, its models, and the rule of its selection."""
    prepare, score, rank, select = (counts_of(inputs.manifests, s) for s in ("prepare", "score", "rank", "select"))
    selected, ranked = select.get("selected"), rank.get("ranked")
    reference = inputs.config.get("reference")
    return {
        "read": prepare.get("read"),
        "prepared": prepare.get("prepared"),
        "rejected": prepare.get("rejected"),
        "scored": score.get("scored", score.get(Status.OK.value)),
        "ranked": ranked,
        "selected": selected,
        "share_selected": selected / ranked if selected is not None and ranked else None,
        "base": inputs.config.get("base"),
        "reference": reference,
        "reference_trained_here": reference is None,
        "rule": rule(inputs.config),
    }


def rule(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rule of the selection, by name and in words."""
    select, rank = config.get("select") or {}, config.get("rank") or {}
    order, lowest = rank.get("order") or "davir", bool(rank.get("lowest"))
    name = next((name for name in SELECT_RULES if select.get(name) not in (None, {}, [])), None)
    value = select.get(name) if name else None
    return {
        "name": name,
        "value": value,
        "order": order,
        "lowest": lowest,
        "text": _rule_text(name, value, order, lowest) + _balance_text(name, select.get("balance")),
    }


def _balance_text(name: str | None, balance: list[str] | None) -> str:
    if not balance or name == "quotas":
        return ""
    return f", shared out by {' and '.join(balance)} as the pool is"


def _rule_text(name: str | None, value: Any, order: str, lowest: bool) -> str:
    by = "in random order" if order == "random" else f"by {order}, {'lowest' if lowest else 'highest'} first"
    match name:
        case "top_k":
            return f"the first {value:,} of the examples ranked {by}"
        case "top_fraction":
            return f"the first {100 * value:.4g} % of the examples ranked {by}"
        case "top_tokens":
            return f"the first examples ranked {by}, as many as fit in {value:,} response tokens"
        case "quotas":
            return f"the first of each group ranked {by}, by quotas"
        case "mixture":
            return f"a mixture of {len(value)} sources, the first of each ranked {by}"
        case "min_score":
            return f"every example whose {order} is at {'most' if lowest else 'least'} {value:g}"
        case _:
            return f"no selection rule is recorded; ranked {by}"
