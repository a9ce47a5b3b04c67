"""What a run leaves for its report, made in memory: an ordinary run, and one whose every text is markup."""

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from davir_ray import schema
from davir_ray.report import ReportInputs
from davir_ray.report.distributions import TEXTS

EVIL = "<script>alert(1)</script>\"'&"
THROUGHPUT = {"seconds": [20.0, 30.0, 40.0, 60.0], "tokens": [5000, 20000, 40000, 70000]}


def scores_table(sources: list[str]) -> pa.Table:
    """Forty scored rows, the four best selected, their sources taken in turn."""
    rows = [
        {
            "example_id": 2**60 + i,
            "content_hash": i,
            "source": sources[i % len(sources)],
            "num_prompt_tokens": 5,
            "num_response_tokens": 1 + i * i % 97,
            "truncated": False,
            "base_nll": 50.0,
            "reference_nll": 50.0 - i,
            "davir": i / 50,
            "rho_sum": float(i),
            "rho_mean": i / (1 + i * i % 97),
            "status": "ok",
            "selected": i >= 36,
        }
        for i in range(40)
    ]
    fields = [field for field in schema.SCORES if not field.name.endswith("token_nll")]
    return pa.Table.from_pylist(rows, schema=pa.schema([*fields, pa.field("selected", pa.bool_())]))


def texts_of(scores: pa.Table) -> pa.Table:
    """What the report gets of the texts of these rows, counted in pandas."""
    frame = scores.to_pandas()
    frame = frame[(frame["status"] == "ok") & np.isfinite(frame["davir"].astype(float))]
    by_text = frame.groupby("content_hash")["selected"].agg(["size", "sum"])
    rows = [(*of_text, texts) for of_text, texts in by_text.value_counts().items()]
    return pa.table(list(zip(*rows, strict=True)) or [[], [], []], names=TEXTS.names).cast(TEXTS)


def example(**fields: Any) -> dict[str, Any]:
    """One ranked example of three tokens."""
    losses = {"davir": 0.5, "rho_sum": 3.0, "rho_mean": 1.0, "base_nll": 6.0, "reference_nll": 3.0}
    tokens = {"base_token_nll": [3.0, 2.0, 1.0], "reference_token_nll": [0.5, 2.5, 0.0], "tokens": ["Yes", ".", "</s>"]}
    texts = {"source": "alpaca", "prompt": "Say yes.", "response": "Yes."}
    return {"rank": 1, "example_id": 2**62, "num_response_tokens": 3} | losses | tokens | texts | fields


def source(**facts: Any) -> dict[str, Any]:
    """What prepare records of a source: forty-three rows read, of which it prepared forty-one."""
    counts = {"read": 43, "prepared": 41, "left_out": 0, "rejected": 2, "turns_left_out": 3, "truncated": 0}
    tokens = {"num_prompt_tokens": 205, "num_response_tokens": 1200, "sampled": 41}
    columns = {"columns_used": {"messages": 43}, "columns_not_used": {"date": 40}}
    shown = {
        "source_file": "a.jsonl",
        "source_row": 7,
        "truncated": False,
        "pieces": [["Say yes.", False], ["Yes.", True]],
    }
    recorded = {"format": "messages", "chat": "always", "role_tokens": {"user": 205, "scored": 1200}, "shown": [shown]}
    return counts | tokens | columns | recorded | facts


def evaluation_set(**counts: int) -> dict[str, int]:
    """What prepare records of an evaluation set."""
    return {"records": 90, "too_short": 5, "only_common": 2, "ngrams": 700, "common": 30, "rows": 4} | counts


def manifest(counts: dict[str, int], **details: Any) -> dict[str, Any]:
    """A stage's manifest with the given counts."""
    facts = {"fingerprint": {"weights": "sha256:abc"}, "versions": {"python": "3.11"}, "seconds": 12.5, "files": [{}]}
    return {"counts": counts, "details": details, **facts}


def report_inputs(**fields: Any) -> ReportInputs:
    """A run whose row counts reconcile: two rejects, one example without a score."""
    reject = {"source": "alpaca", "source_file": "a.jsonl", "source_row": 7, "reason": "empty_response", "detail": "''"}
    inputs = ReportInputs(
        config={"base": "tiny-base", "reference": None, "rank": {"order": "davir"}, "select": {"top_fraction": 0.1}},
        manifests={
            "prepare": manifest(
                {"read": 43, "prepared": 41, "rejected": 2, "empty_response": 2}, by_source={"alpaca": source()}
            ),
            "finetune": manifest({"steps": 4}, loss_by_step=[[1, 4.0], [2, 3.5], [3, 3.2], [4, 3.0]]),
            "score": manifest({"scored": 40, "ok": 40, "zero_base_nll": 1}, throughput=THROUGHPUT),
            "rank": manifest({"ranked": 40}),
            "select": manifest({"selected": 4}),
        },
        scores=scores_table(["alpaca", "gsm8k"]),
        num_scored=40,
        texts=TEXTS.empty_table(),
        top=[example()],
        bottom=[example(rank=40, tokens=None)],
        rejects=pa.Table.from_pylist([reject], schema=schema.REJECTS),
    )
    inputs = replace(inputs, **fields)
    return inputs if "texts" in fields else replace(inputs, texts=texts_of(inputs.scores))


def evil_inputs() -> ReportInputs:
    """Markup in every text that comes from outside."""
    texts = {"source": EVIL, "prompt": EVIL * 50, "response": EVIL, "tokens": [EVIL, ".", EVIL]}
    reject = {"source": EVIL, "source_file": EVIL, "source_row": 1, "reason": EVIL, "detail": EVIL}
    details = manifest({EVIL: 1}) | {name: {EVIL: {EVIL: EVIL}} for name in ("details", "fingerprint", "versions")}
    shown = {"source_file": EVIL, "source_row": 1, "truncated": True, "pieces": [[EVIL, False], [EVIL, True]]}
    columns = {"columns_used": {EVIL: 1}, "columns_not_used": {EVIL: 1}, "role_tokens": {EVIL: 1}}
    prepared = manifest({"read": 43}, by_source={EVIL: source(format=EVIL, shown=[shown], **columns)})
    prepared["details"]["evaluation_sets"] = {EVIL: evaluation_set()}
    planted_class = {"name": EVIL, "share_of_all": 1, "share_of_selected": 1, "share_of_random": 1, "mean_davir": 0}
    return report_inputs(
        config={EVIL: EVIL, "base": EVIL, "reference": EVIL, "rank": {"order": EVIL}, "sources": [{"name": EVIL}]},
        manifests=report_inputs().manifests | {EVIL: details, "prepare": prepared},
        scores=scores_table([EVIL]),
        top=[example(**texts)],
        bottom=[example(**(texts | {"tokens": None}))],
        rejects=pa.Table.from_pylist([reject], schema=schema.REJECTS),
        planted={"classes": [planted_class], "note": EVIL},
    )


def stability_manifest(
    overlap: float | None, over: str = "references", num_runs: int = 3, **changed: Any
) -> dict[str, Any]:
    """What the stage stability records: 40 selected rows of 1,000, chosen by no run, by one, and so on."""
    pairs = [
        {"first": first, "second": second, "common": 7, "overlap": overlap}
        for second in range(num_runs)
        for first in range(second)
    ]
    details = {
        "runs": [f"runs/<{number}>" for number in range(num_runs)],
        "overlap": overlap,
        "interval": None if overlap is None else [overlap - 0.1, overlap + 0.1],
        "interval_over": None if overlap is None else over,
        "pairs": pairs,
        "times_chosen": [4, 6, 10, 20][-num_runs - 1 :],
        "place_sd": 0.125,
        "cut": 0.96,
        **changed,
    }
    return manifest({"selected": 40, "rows": 1000, "near_cut": 333}, **details)
