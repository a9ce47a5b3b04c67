"""What a reader should know first: each a sentence, with `look` where it deserves a second look."""

from typing import Any

# The thresholds are ours; they colour the page and decide nothing.
STRONG_CORRELATION = 0.5
LARGE_RATIO = 2.0
SMALLEST_SHARE = 0.01
MANY_REJECTS = 0.01


def find(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """The findings on the facts of a report, in the order of the run."""
    findings = [
        _finding_books(facts["books"]),
        _finding_rejects(facts["headline"], facts["rejects"]),
        _finding_losses(facts["losses"]["per_token"]),
        _finding_length(facts["length"]),
        _finding_median(facts["composition"]),
    ]
    findings += [_finding_sign(sign) for sign in facts["composition"]["signs"]]
    return [finding for finding in findings if finding]


def _finding_books(books: list[dict[str, Any]]) -> dict[str, Any]:
    wrong = [row for row in books if row["balanced"] is False]
    if wrong:
        sides = [f"{row['left_text']} is {row['left']:,}, {row['right_text']} {row['right']:,}" for row in wrong]
        return {"look": True, "text": f"The counts do not balance: {'; '.join(sides)}."}
    if any(row["balanced"] is None for row in books):
        return {"look": True, "text": "Not every count is recorded, so the books cannot be checked."}
    return {"look": False, "text": "The counts balance: every row that was read is accounted for."}


def _finding_rejects(headline: dict[str, Any], rejects: list[dict[str, Any]]) -> dict[str, Any] | None:
    read, rejected = headline["read"], headline["rejected"]
    if not read or not rejected:
        return None
    text = f"{100 * rejected / read:.2g} % of the rows were rejected ({rejected:,})"
    if rejects and rejects[0]["count"]:
        text += f", most often as {rejects[0]['reason']} ({rejects[0]['count']:,})"
    return {"look": rejected >= MANY_REJECTS * read, "text": f"{text}."}


def _finding_losses(per_token: dict[str, float | None]) -> dict[str, Any] | None:
    """A reference that is no better than the base has learned nothing that a score could show."""
    base, reference = per_token["base"], per_token["reference"]
    if base is None or reference is None:
        return None
    text = (
        f"Over all responses the loss is {base:.2f} nats per token under the base, {reference:.2f} under the reference."
    )
    return {"look": reference >= base, "text": text}


def _finding_length(panels: list[dict[str, Any]]) -> dict[str, Any] | None:
    by_name = {panel["measure"]: panel["spearman"] for panel in panels}
    davir, rho = by_name["davir"], by_name["rho_sum"]
    if davir is None or rho is None:
        return None
    text = f"Spearman correlation with response length: DavIR {_signed(davir)}, RHO (summed) {_signed(rho)}."
    return {"look": abs(davir) >= STRONG_CORRELATION, "text": text}


def _finding_median(composition: dict[str, Any]) -> dict[str, Any] | None:
    pool, chosen = composition["median_length"]["all"], composition["median_length"]["selected"]
    if not pool or not chosen:
        return None
    text = f"The median response has {chosen:,.0f} tokens in the selection and {pool:,.0f} in the pool."
    return {"look": not 1 / LARGE_RATIO < chosen / pool < LARGE_RATIO, "text": text}


def _finding_sign(sign: dict[str, Any]) -> dict[str, Any] | None:
    """Only a group that the selection clearly favours is worth a line."""
    pool, chosen = sign["share_of_all"], sign["share_of_selected"]
    if pool is None or chosen is None or chosen < SMALLEST_SHARE or chosen < LARGE_RATIO * pool:
        return None
    shares = f"{100 * chosen:.1f} % of the selection, {100 * pool:.1f} % of the pool"
    return {"look": True, "text": f"The selection favours one group: {sign['name']}, {shares}."}


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")
