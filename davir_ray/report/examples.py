"""Ranked examples with their losses, summed and by token."""

from typing import Any


def example(row: dict[str, Any]) -> dict[str, Any]:
    """One ranked example with its losses summed and per token; ids are strings, whole in every JSON reader."""
    num_tokens = row["num_response_tokens"]
    plain = ("rank", "source", "davir", "rho_sum", "rho_mean", "base_nll", "reference_nll", "num_response_tokens")
    return {
        **{name: row[name] for name in (*plain, "prompt", "response")},
        "example_id": str(row["example_id"]),
        "base_nll_mean": _ratio(row["base_nll"], num_tokens),
        "reference_nll_mean": _ratio(row["reference_nll"], num_tokens),
        "tokens": _tokens(row),
    }


def _ratio(value: float | None, count: int | None) -> float | None:
    return value / count if value is not None and count else None


def _tokens(row: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Tokens with both losses; None where they were not kept or do not belong together."""
    columns = [row.get(name) for name in ("tokens", "base_token_nll", "reference_token_nll")]
    if any(column is None for column in columns):
        return None
    texts, base, reference = (list(column) for column in columns if column is not None)
    if not texts or not len(texts) == len(base) == len(reference):
        return None
    return [{"text": t, "base": b, "reference": r} for t, b, r in zip(texts, base, reference, strict=True)]
