"""The text of a run's page: its findings, the selection rule, and fixed texts about the score and its limits."""

from typing import Any

from davir_ray.report.distributions import EXACT_COPY
from davir_ray.report.stability import stability_finding
from davir_ray.schema import RejectReason, Status

REASON_MEANING: dict[str, str] = {
    RejectReason.BROKEN_JSON: "the line or array element is not JSON",
    RejectReason.INVALID_TEXT: "not UTF-8, or contains a lone surrogate",
    RejectReason.BROKEN_ROW: "a row of CSV or TSV is broken, or has more or fewer fields than the header",
    RejectReason.NOT_AN_OBJECT: "JSON, but not an object with named fields",
    RejectReason.MISSING_COLUMN: "a column of the format is missing or null",
    RejectReason.WRONG_TYPE: "a column does not have the type that the format needs",
    RejectReason.EMPTY_RESPONSE: "nothing to score: empty or white space only",
    RejectReason.PROMPT_TOO_LONG: "the prompt alone fills the token limit",
    RejectReason.SPECIAL_TOKEN_IN_TEXT: "the text spells a special token that cannot be encoded as text",
    RejectReason.NO_COMMON_PROMPT: "the two responses of the pair do not follow the same prompt",
    RejectReason.EQUAL_RESPONSES: "the chosen and the rejected response of the pair are equal",
    RejectReason.UNREAD_COLUMN: "a column would change the prompt, and the format has no place for it",
    RejectReason.NOT_TEXT: "the row has images, audio or video",
    RejectReason.BAD_CONVERSATION: "the chat template rejects the messages, or no assistant turn is found",
    RejectReason.IN_EVALUATION_SET: "shares words in a row with a record of an evaluation set (decontaminate)",
    RejectReason.EMPTY_FILE: "an empty file",
    RejectReason.UNREADABLE_FILE: "reading stopped at this row; the rest of the file is lost",
}
STATUS_MEANING: dict[str, str] = {
    Status.OK: "scored",
    Status.NO_PREDICTOR: "the first scored token has no token before it",
    Status.ZERO_BASE_NLL: "the base loss is 0, so the ratio is not defined",
    Status.NON_FINITE_NLL: "a model returned NaN or infinity",
    Status.OUT_OF_MEMORY: "did not fit on the device, even alone",
}
SCORE_EXPLAINED = [
    "The reference is the base model fine-tuned on the whole candidate set; each example’s score is "
    "DavIR = (L_base − L_ref) / L_base, the share of the base’s loss on the response (in nats, given the prompt) "
    "that the fine-tune removed.",
    "0 means that the fine-tune changed nothing, 1 that the reference predicts the response perfectly (it has "
    "memorised it), and a negative score that the reference predicts it worse than the base did.",
]
OF_FOLDS = (
    "The rows are dealt to {num_folds} folds, and each has a reference of its own: the base model fine-tuned on the "
    "rows outside the fold, so that no example is scored by a model that was trained on it. Each example’s score is "
    "DavIR = (L_base − L_ref) / L_base, the share of the base’s loss on the response (in nats, given the prompt) that "
    "the fine-tune removed. "
)
PLACE = "`davir_aligned` is the share of the fold’s scored rows that it is above."
LINKED = (
    "`davir_aligned` is DavIR on the scale that all references have in common, to which a line for each, fitted on the "
    "rows that all have scored (the anchor), brings its scores."
)
REFERENCE_GIVEN = (
    "This run did not train its reference. Whether that model was trained on these examples is not known here; the "
    "score has the meaning above only if it was."
)
SEEN = (
    "The reference was trained on what it scores. It can memorise duplicates and label noise, whose score then rises "
    "towards 1, so a high score alone does not show that an example is good."
)
UNSEEN = (
    "No reference was trained on the rows that it scores, nor on their copies. Paraphrases and translations are no "
    "copies: what two folds share in other words can still be learnt by heart."
)
UNSEEN_VALUES = (
    "No reference was trained on rows with the same `{column}` as those that it scores. It may have been trained on "
    "copies of them that have another value."
)
LIMITS = [
    "How much of a selection is luck of the one reference that scored its rows is known only where others have scored "
    "them, too (Stability).",
    "A small base loss makes the ratio noisy: answers of one or two tokens, or answers that the base already knew, "
    "can get extreme scores in either direction.",
    "Nothing in the score keeps the selection diverse. Before you rely on it, train on a random selection of the same "
    "size, and on a random one with the same lengths, and compare.",
    "Dividing by the base loss reduces the dependence on response length; it does not remove it.",
    "The end-of-sequence token is scored as part of the response, for both models; a truncated response has none. "
    "The paper does not state whether it is scored; here it is.",
]

# These thresholds are our own; they only decide what the page marks for a closer look.
STRONG_CORRELATION = 0.5
LARGE_RATIO = 2.0
SMALLEST_SHARE = 0.01
MANY_REJECTS = 0.01
MANY_TRUNCATED = 0.01
BEYOND_CHANCE = 3.0
"""Standard deviations."""

_MEMORISED_FIRST = {
    "davir": "highest", "davir_repeated": "highest", "rho_sum": "highest", "rho_mean": "highest",
    "reference_nll": "lowest", "reference_mean_nll": "lowest",
}  # fmt: skip
"""Orders by a loss of the reference, with the end at which a memorised response is."""


def explanation(reference_trained_here: bool, num_folds: int, way: str | None = None) -> list[str]:
    """What the score of this run means; `way` is that of davir_aligned, None where there is none."""
    if num_folds > 1:
        aligned = {"linked": LINKED, "place": PLACE}.get(way or "", "")
        return [(OF_FOLDS.format(num_folds=num_folds) + aligned).strip(), *SCORE_EXPLAINED[1:]]
    return SCORE_EXPLAINED if reference_trained_here else [*SCORE_EXPLAINED, REFERENCE_GIVEN]


def limits(num_folds: int, fold_by: str | None = None) -> list[str]:
    """What the score of this run does not show."""
    if num_folds == 1:
        return [SEEN, *LIMITS]
    return [UNSEEN if fold_by is None else UNSEEN_VALUES.format(column=fold_by), *LIMITS]


def rule_text(name: str | None, value: Any, order: str, lowest: bool, balance: list[str]) -> str:
    """The rule of a selection as a phrase; `name` is the option that gave it, None where none is recorded."""
    by = "in random order" if order == "random" else f"by {order}, {'lowest' if lowest else 'highest'} first"
    match name:
        case "top_k":
            text = f"the first {value:,} of the examples ranked {by}"
        case "top_fraction":
            text = f"the first {100 * value:.4g} % of the examples ranked {by}"
        case "top_tokens":
            text = f"the first examples ranked {by}, as many as fit in {value:,} response tokens"
        case "quotas":
            return f"the first of each group ranked {by}, by quotas"
        case "mixture":
            text = f"a mixture of {len(value)} sources, the first of each ranked {by}"
        case "min_score":
            text = f"every example whose {order} is at {'most' if lowest else 'least'} {value:g}"
        case _:
            text = f"no selection rule is recorded; ranked {by}"
    return f"{text}, divided by {' and '.join(balance)} in proportion to the pool" if balance else text


def findings(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """What a reader should know first: sentences, with `look` if something deserves a closer look."""
    found = [
        _row_counts(facts["books"]),
        _rejects(facts["headline"], facts["rejects"]),
        _losses(facts["losses"]["per_token"]),
        _length_correlation(facts["length"]),
        _median_length(facts["composition"]),
    ]
    memorised = _memorised_copies(facts["copies"], facts["headline"])
    groups = [group for group in facts["composition"]["signs"] if not (memorised and group["name"] == EXACT_COPY)]
    found += [memorised, *(_favoured_group(group) for group in groups)]
    found += [_truncated(source) for source in facts["sources"]]
    found.append(stability_finding(facts["stability"]))
    return [finding for finding in found if finding]


def _row_counts(equations: list[dict[str, Any]]) -> dict[str, Any]:
    wrong = [row for row in equations if row["balanced"] is False]
    if wrong:
        sides = [f"{row['left_text']} is {row['left']:,}, {row['right_text']} {row['right']:,}" for row in wrong]
        return {"look": True, "text": f"The row counts do not reconcile: {'; '.join(sides)}."}
    if any(row["balanced"] is None for row in equations):
        return {"look": True, "text": "Not every count is recorded, so the row counts cannot be checked."}
    return {"look": False, "text": "The row counts reconcile: every row that was read is accounted for."}


def _rejects(headline: dict[str, Any], rejects: list[dict[str, Any]]) -> dict[str, Any] | None:
    read, rejected = headline["read"], headline["rejected"]
    if not read or not rejected:
        return None
    text = f"{100 * rejected / read:.2g} % of the rows were rejected ({rejected:,})"
    if rejects and rejects[0]["count"]:
        text += f", most often as {rejects[0]['reason']} ({rejects[0]['count']:,})"
    return {"look": rejected >= MANY_REJECTS * read, "text": f"{text}."}


def _losses(per_token: dict[str, float | None]) -> dict[str, Any] | None:
    """The losses of both models; if the reference is no better than the base, the scores carry no information."""
    base, reference = per_token["base"], per_token["reference"]
    if base is None or reference is None:
        return None
    text = (
        f"Over all responses the loss is {base:.2f} nats per token under the base, {reference:.2f} under the reference."
    )
    return {"look": reference >= base, "text": text}


def _length_correlation(panels: list[dict[str, Any]]) -> dict[str, Any] | None:
    by_measure = {panel["measure"]: panel["spearman"] for panel in panels}
    davir, rho = by_measure["davir"], by_measure["rho_sum"]
    if davir is None or rho is None:
        return None
    text = f"Spearman correlation with response length: DavIR {davir:+.2f}, RHO (summed) {rho:+.2f}."
    return {"look": abs(davir) >= STRONG_CORRELATION, "text": text.replace("-", "−")}


def _median_length(composition: dict[str, Any]) -> dict[str, Any] | None:
    pool, chosen = composition["median_length"]["all"], composition["median_length"]["selected"]
    if not pool or not chosen:
        return None
    text = f"The median response has {chosen:,.0f} tokens in the selection and {pool:,.0f} in the pool."
    return {"look": not 1 / LARGE_RATIO < chosen / pool < LARGE_RATIO, "text": text}


def _favoured_group(group: dict[str, Any]) -> dict[str, Any] | None:
    """A finding about a group that the selection clearly favours; None for any other group."""
    pool, chosen = group["share_of_all"], group["share_of_selected"]
    if pool is None or chosen is None or chosen < SMALLEST_SHARE or chosen < LARGE_RATIO * pool:
        return None
    shares = f"{100 * chosen:.1f} % of the selection, {100 * pool:.1f} % of the pool"
    return {"look": True, "text": f"The selection favours one group: {group['name']}, {shares}."}


def _memorised_copies(copies: dict[str, Any] | None, headline: dict[str, Any]) -> dict[str, Any] | None:
    """A warning where the selection has more copies than chance gives, and the reference has seen what it scores."""
    rule = headline["rule"]
    by_reference = _MEMORISED_FIRST.get(rule["order"]) == ("lowest" if rule["lowest"] else "highest")
    if copies is None or not copies["of_all_rows"] or headline["num_folds"] > 1 or not by_reference:
        return None
    chosen, by_chance, sd = copies["share_of_selected"], copies["expected"], copies["sd"]
    if chosen < SMALLEST_SHARE or chosen <= by_chance + BEYOND_CHANCE * sd:
        return None
    seen = "was trained on them" if headline["reference_trained_here"] else "may have been trained on them"
    text = (
        f"Rows that have exact copies are {100 * chosen:.1f} % of the selection, where chance gives "
        f"{100 * by_chance:.1f} ± {100 * sd:.1f} %: the reference {seen}, and what it has memorised scores high, wrong "
        "answers too; --prepare.folds 2 scores each row by a reference that has seen neither it nor a copy of it."
    )
    return {"look": True, "text": text}


def _truncated(source: dict[str, Any]) -> dict[str, Any] | None:
    """A finding about a source of which examples are truncated; None where none is."""
    if not (source["truncated"] and source["prepared"]):
        return None
    share, limit = source["truncated"] / source["prepared"], source["max_tokens"]
    text = (
        f"{100 * share:.2g} % of the rows of source {source['name']} are truncated"
        f"{f' at {limit:,} tokens' if limit else ''}; their scores are of the part that was kept."
    )
    return {"look": share >= MANY_TRUNCATED, "text": text}
