"""From the manifests and tables of one run to the facts of its report, as one dictionary ready for JSON.

Pure functions: no files, no models. Shares are fractions of 1, losses nats, lengths response tokens. A value that is
not defined (a correlation without variance, a count that no manifest holds) is None, never NaN.
"""

from typing import Any

from davir_ray.report import books, composition, distributions, findings, headline, history, length, words
from davir_ray.report.examples import example
from davir_ray.report.inputs import ReportInputs, scored_rows
from davir_ray.report.jsonable import flatten, json_ready


def summarise(inputs: ReportInputs) -> dict[str, Any]:
    """Return the facts of the report; json.dumps(…, allow_nan=False) takes them as they are."""
    scored = scored_rows(inputs.scores)
    is_sample = inputs.scores.num_rows < inputs.num_scored
    figures = headline.figures(inputs)
    statuses, rejects = books.statuses(inputs, is_sample), books.rejects(inputs)
    facts = {
        "format": 1,
        "headline": figures,
        "explanation": words.explanation(figures["reference_trained_here"]),
        "books": books.equations(figures, rejects, statuses),
        "rejects": rejects,
        "statuses": statuses,
        "sample": {"rows": inputs.scores.num_rows, "stands_for": inputs.num_scored, "is_sample": is_sample},
        "training": history.training(inputs.manifests),
        "throughput": history.throughput(inputs.manifests),
        "davir": distributions.davir(scored, inputs),
        "losses": distributions.losses(scored),
        "length": length.panels(scored),
        "composition": composition.compare(scored, is_sample),
        "selection": composition.selection(inputs.manifests),
        "top": [example(row) for row in inputs.top],
        "middle": [example(row) for row in inputs.middle],
        "bottom": [example(row) for row in inputs.bottom],
        "with_tokens": {place: [example(row) for row in rows] for place, rows in inputs.with_tokens.items()},
        "planted": inputs.planted,
        "limits": words.LIMITS,
        "settings": [{"name": name, "value": value} for name, value in flatten(inputs.config)],
        "stages": history.stages(inputs.manifests),
    }
    return json_ready(facts | {"findings": findings.find(facts)})  # type: ignore[no-any-return]
