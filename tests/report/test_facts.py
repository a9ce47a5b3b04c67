"""The facts of the report: defined for every input, ready for JSON, and equal to what they claim to be."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import run_facts
from run_facts import manifest
from scipy import stats

from davir_ray import schema
from davir_ray.report import ReportInputs, render_page, summarise
from davir_ray.report.prose import REASON_MEANING, STATUS_MEANING

COLUMNS = [field for field in schema.SCORES if not field.name.endswith("token_nll")]


def scores_table(num_rows: int, seed: int = 0, **columns: Any) -> pa.Table:
    """Scored rows with skewed lengths and two sources, the best tenth selected; named columns replace drawn ones."""
    rng = np.random.default_rng(seed)
    length = np.maximum(1, np.exp(rng.normal(4, 1, num_rows))).astype(int)
    base = length * rng.gamma(9, 0.5, num_rows) + 0.1
    davir = rng.normal(0.2, 0.1, num_rows)
    drawn = {
        "example_id": rng.integers(2**60, 2**62, num_rows),
        "content_hash": rng.integers(0, 2**62, num_rows),
        "source": np.where(rng.random(num_rows) < 0.7, "alpaca", "gsm8k"),
        "num_prompt_tokens": rng.integers(5, 50, num_rows),
        "num_response_tokens": length,
        "truncated": length > 300,
        "base_nll": base,
        "reference_nll": base * (1 - davir),
        "davir": davir,
        "rho_sum": base * davir,
        "rho_mean": base * davir / length,
        "status": np.full(num_rows, "ok"),
        "selected": davir >= np.quantile(davir, 0.9) if num_rows else np.zeros(0, bool),
    } | columns
    fields = [*COLUMNS, pa.field("selected", pa.bool_())]
    return pa.table([pa.array(list(drawn[f.name]), type=f.type) for f in fields], schema=pa.schema(fields))


def example(rank: int, **fields: Any) -> dict[str, Any]:
    """The example of this rank."""
    return run_facts.example(rank=rank, example_id=2**62 + rank, **fields)


def report_inputs(num_rows: int = 400, **fields: Any) -> ReportInputs:
    """A run of this many scored rows whose row counts reconcile: two rejects, one example without a score."""
    counts = {
        "prepare": {"read": num_rows + 3, "prepared": num_rows + 1, "rejected": 2, "empty_response": 2},
        "finetune": {"steps": 4},
        "score": {"scored": num_rows, "ok": num_rows, "zero_base_nll": 1},
        "rank": {"ranked": num_rows},
        "select": {"selected": max(1, num_rows // 10)},
    }
    manifests = {stage: manifest(counted) for stage, counted in counts.items()}
    manifests["finetune"]["details"] = {"loss_by_step": [[1, 4.0], [2, 3.5], [3, 3.2], [4, 3.0]]}
    shown = {"top": [example(1)], "bottom": [example(num_rows)]}
    made = {"manifests": manifests, "scores": scores_table(num_rows), "num_scored": num_rows, **shown}
    return run_facts.report_inputs(**(made | fields))


def without(inputs: ReportInputs, stage: str) -> ReportInputs:
    """The same run without one stage's manifest."""
    return replace(inputs, manifests={name: m for name, m in inputs.manifests.items() if name != stage})


def with_throughput(seconds: list[float], tokens: list[int]) -> ReportInputs:
    """The ordinary run, its score stage with these cumulative tokens at these seconds."""
    inputs = report_inputs()
    inputs.manifests["score"]["details"] = {"throughput": {"seconds": seconds, "tokens": tokens}}
    return inputs


NAN, INF = float("nan"), float("inf")
EDGE_CASES = {
    "ordinary": report_inputs(),
    "no rows": report_inputs(0, scores=scores_table(0), num_scored=0, top=[], bottom=[]),
    "one row": report_inputs(1, scores=scores_table(1, selected=[True])),
    "two rows": report_inputs(2, scores=scores_table(2)),
    "all selected": report_inputs(50, scores=scores_table(50, selected=[True] * 50)),
    "none selected": report_inputs(50, scores=scores_table(50, selected=[False] * 50)),
    "no variance": report_inputs(50, scores=scores_table(50, davir=[0.25] * 50, num_response_tokens=[9] * 50)),
    "huge and equal": report_inputs(50, scores=scores_table(50, davir=[-1e300] * 50)),
    "far tail": report_inputs(50, scores=scores_table(50, davir=[-1e9, *np.linspace(0, 1, 49)])),
    "not finite": report_inputs(4, scores=scores_table(4, davir=[NAN, INF, None, 0.1], rho_sum=[NAN, INF, None, 1.0])),
    "no score": report_inputs(3, scores=scores_table(3, davir=[None] * 3, status=["zero_base_nll"] * 3)),
    "no rejects": report_inputs(rejects=schema.REJECTS.empty_table()),
    "no finetune": without(report_inputs(), "finetune"),
    "no manifests": report_inputs(manifests={}),
    "no settings": report_inputs(config={}),
    "a sample": report_inputs(num_scored=10**9),
    "not finite tokens": report_inputs(top=[example(1, davir=None, base_token_nll=[NAN, INF, 1.0])]),
    "no tokens kept": report_inputs(top=[example(1, base_token_nll=None)]),
    "one point of throughput": with_throughput([20.0], [5000]),
    "throughput of nothing": with_throughput([], []),
    "lone surrogate": report_inputs(top=[example(1, prompt="a\ud800b")]),
}


@pytest.fixture(params=EDGE_CASES)
def any_inputs(request: pytest.FixtureRequest) -> ReportInputs:
    """Each edge case in turn."""
    return EDGE_CASES[request.param]


def test_facts_are_json_without_nan(any_inputs: ReportInputs) -> None:
    facts = summarise(any_inputs)
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    json.dumps(facts, ensure_ascii=False).encode("utf-8")


def test_every_case_gives_a_page_without_loose_ends(any_inputs: ReportInputs) -> None:
    page = render_page(summarise(any_inputs))
    page.encode("utf-8")
    text = re.sub(r"<[^>]*>", " ", page)
    assert not re.search(r"\b(nan|NaN|inf|None|undefined)\b", text)


def test_whole_numbers_are_whole_in_every_json_reader(any_inputs: ReportInputs) -> None:
    def numbers(value: Any) -> Iterator[int]:
        if isinstance(value, dict | list):
            for item in value.values() if isinstance(value, dict) else value:
                yield from numbers(item)
        elif isinstance(value, int):
            yield value

    facts = summarise(replace(any_inputs, config={"id": 2**60, "edge": 2**53}))
    assert max(map(abs, numbers(facts))) <= 2**53
    assert {"name": "id", "value": str(2**60)} in facts["settings"]
    assert {"name": "edge", "value": 2**53} in facts["settings"]


def test_shares_of_pool_and_selection_each_sum_to_one() -> None:
    composition = summarise(report_inputs())["composition"]
    for group in (composition["sources"], composition["length_deciles"]):
        assert sum(row["share_of_all"] for row in group) == pytest.approx(1)
        assert sum(row["share_of_selected"] for row in group) == pytest.approx(1)
        assert sum(row["rows"] for row in group) == composition["num_all"]


def test_shares_are_equal_when_all_is_selected_and_not_defined_when_nothing_is() -> None:
    for row in summarise(EDGE_CASES["all selected"])["composition"]["length_deciles"]:
        assert row["share_of_all"] == row["share_of_selected"]
    for row in summarise(EDGE_CASES["none selected"])["composition"]["sources"]:
        assert row["share_of_selected"] is None


def test_length_deciles_do_not_overlap_and_keep_ties_together() -> None:
    length = [1] * 60 + [5] * 20 + list(range(10, 30))
    deciles = summarise(report_inputs(100, scores=scores_table(100, num_response_tokens=length)))["composition"]
    ranges = [(row["from"], row["to"]) for row in deciles["length_deciles"]]
    assert ranges[:2] == [(1, 1), (5, 5)]
    assert all(end < start for (_, end), (start, _) in pairwise(ranges))
    assert ranges[-1][1] == max(length)


@pytest.mark.parametrize("measure", ["rho_sum", "rho_mean", "davir"])
def test_correlation_is_scipys_spearman(measure: str) -> None:
    inputs = report_inputs()
    panel = next(panel for panel in summarise(inputs)["length"] if panel["measure"] == measure)
    expected = stats.spearmanr(inputs.scores["num_response_tokens"].to_numpy(), inputs.scores[measure].to_numpy())
    assert panel["spearman"] == pytest.approx(expected.statistic, abs=1e-12)
    assert panel["n"] == inputs.scores.num_rows


@pytest.mark.parametrize("case", ["no variance", "one row", "no rows"])
def test_correlation_without_variance_is_not_defined(case: str) -> None:
    assert [panel["spearman"] for panel in summarise(EDGE_CASES[case])["length"]] == [None] * 3


def test_every_row_is_drawn_or_counted_as_outside(any_inputs: ReportInputs) -> None:
    facts = summarise(any_inputs)
    histogram = facts["davir"]["histogram"]
    drawn = sum(histogram["all"]) + histogram["below"] + histogram["above"]
    assert drawn == facts["davir"]["all"]["n"] == facts["composition"]["num_all"]
    for panel in facts["length"]:
        assert sum(count for _, _, count in panel["cells"]) + panel["outside"] == panel["n"]


def test_no_bin_of_the_histogram_mixes_both_sides_of_the_cut() -> None:
    davir = summarise(report_inputs())["davir"]
    histogram = davir["histogram"]
    assert davir["cut"] in histogram["edges"]
    for edge, everyone, chosen in zip(histogram["edges"], histogram["all"], histogram["selected"], strict=False):
        assert chosen == (everyone if edge >= davir["cut"] else 0)


def test_rows_without_a_score_stay_out_of_every_statistic() -> None:
    inputs = EDGE_CASES["not finite"]
    facts = summarise(inputs)
    assert facts["davir"]["all"]["n"] == 1
    assert facts["davir"]["all"]["mean"] == pytest.approx(0.1)


def test_the_cut_is_the_last_selected_score() -> None:
    inputs = report_inputs()
    davir, selected = inputs.scores["davir"].to_numpy(), inputs.scores["selected"].to_numpy()
    assert summarise(inputs)["davir"]["cut"] == davir[selected].min()
    lowest = replace(inputs, config={"rank": {"order": "davir", "lowest": True}, "select": {"top_k": 40}})
    assert summarise(lowest)["davir"]["cut"] == davir[selected].max()
    by_length = replace(inputs, config={"rank": {"order": "length"}, "select": {"top_k": 40}})
    assert summarise(by_length)["davir"]["cut"] is None


def test_the_manifests_cut_wins_over_a_samples() -> None:
    inputs = report_inputs()
    select = inputs.manifests["select"] | {"details": {"cut": 0.123}}
    assert summarise(replace(inputs, manifests=inputs.manifests | {"select": select}))["davir"]["cut"] == 0.123


def test_row_counts_reconcile_or_the_page_says_so() -> None:
    facts = summarise(report_inputs())
    assert [row["balanced"] for row in facts["books"]] == [True, True, True]
    assert not facts["findings"][0]["look"]
    inputs = report_inputs()
    short = inputs.manifests["score"] | {"counts": {"scored": 399, "ok": 399, "zero_base_nll": 1}}
    facts = summarise(replace(inputs, manifests=inputs.manifests | {"score": short}))
    assert [row["balanced"] for row in facts["books"]] == [True, True, False]
    assert facts["findings"][0]["look"]


def test_a_count_that_is_not_recorded_is_not_made_up() -> None:
    facts = summarise(EDGE_CASES["no manifests"])
    assert facts["headline"]["read"] is None
    assert [row["balanced"] for row in facts["books"]] == [None, None, None]
    inputs = report_inputs()
    del inputs.manifests["prepare"]["counts"]["prepared"]
    equation = summarise(inputs)["books"][0]
    assert (equation["left"], equation["right"], equation["balanced"]) == (403, None, None)


def test_reasons_come_with_their_count_meaning_and_rows() -> None:
    (reason,) = summarise(report_inputs())["rejects"]
    assert reason["reason"] == "empty_response"
    assert reason["count"] == 2
    assert reason["rows"] == [{"source": "alpaca", "file": "a.jsonl", "row": 7, "detail": "''"}]


def test_every_reason_and_status_has_words() -> None:
    assert REASON_MEANING.keys() == set(schema.RejectReason)
    assert STATUS_MEANING.keys() == set(schema.Status) - {schema.Status.ZERO_ALONE_NLL}  # of IFD, not of a score


def test_statuses_are_counted_in_the_table_when_no_manifest_has_them() -> None:
    status = ["ok"] * 8 + ["no_predictor"] * 2
    inputs = report_inputs(10, manifests={}, scores=scores_table(10, status=status))
    assert [(row["status"], row["count"]) for row in summarise(inputs)["statuses"]] == [("ok", 8), ("no_predictor", 2)]
    assert summarise(replace(inputs, num_scored=1000))["statuses"] == []


def test_folds_stand_beside_what_chance_gives() -> None:
    """Against the hypergeometric distribution; a row without a score counts nowhere."""
    fold = np.random.default_rng(3).choice([-1, 0, 1], 400, p=[0.1, 0.6, 0.3])
    table = scores_table(400)
    davir, chosen = table["davir"].to_numpy().copy(), table["selected"].to_numpy()
    davir[0] = np.nan
    table = table.set_column(table.column_names.index("davir"), "davir", pa.array(davir))
    table = table.append_column("fold", pa.array(fold, pa.int8()))
    config = {"prepare": {"folds": 2}, "rank": {"order": "davir_aligned"}, "select": {"top_fraction": 0.1}}
    inputs = report_inputs(scores=table, config=config)
    facts = summarise(inputs)
    assert [row["fold"] for row in facts["folds"]] == [-1, 0, 1]
    for row in facts["folds"]:
        of_fold = (fold == row["fold"]) & ~np.isnan(davir)
        by_chance = stats.hypergeom(399, of_fold.sum(), chosen[1:].sum())
        assert (row["rows"], row["selected"]) == (of_fold.sum(), chosen[of_fold].sum())
        assert row["mean_davir"] == pytest.approx(davir[of_fold].mean())
        assert (row["expected"], row["sd"]) == (pytest.approx(by_chance.mean()), pytest.approx(by_chance.std()))
    page = " ".join(render_page(facts).split())
    assert "The rows are dealt to 2 folds" in page
    assert "No reference was trained on the rows that it scores" in page
    assert "trained on what it scores" not in page
    assert "none (anchor)" in page


def test_the_way_of_the_common_scale_is_said_with_its_lines() -> None:
    table = scores_table(400)
    table = table.append_column("fold", pa.array(np.arange(400) % 3 - 1, pa.int8()))
    config = {"prepare": {"folds": 2}, "rank": {"order": "davir_aligned"}, "select": {"top_fraction": 0.1}}
    lines = [{"reference": k, "intercept": 0.25 - k / 2, "slope": 0.75 + k / 2, "residual_sd": 0.125} for k in range(2)]
    for details, said, unsaid in (
        ({"way": "linked", "linked_by": 133, "lines": lines}, "on 133 rows in no fold", "same share of every fold"),
        ({"way": "place"}, "by the place within the fold", "residual SD"),
        ({}, "by the place within the fold", "residual SD"),  # of an earlier version
    ):
        inputs = report_inputs(scores=table, config=config)
        aligned = {"counts": {}, "details": details}
        facts = summarise(replace(inputs, manifests={**inputs.manifests, "davir_aligned": aligned}))
        assert facts["alignment"]["way"] == details.get("way", "place")
        page = " ".join(render_page(facts).split())
        assert said in page
        assert unsaid not in page
        for line in details.get("lines", []):
            assert f"<td>{line['slope']:.4f}</td><td>{line['residual_sd']:.4f}</td>" in page
        share = "share of the fold’s scored rows that it is above"
        assert (share in page) == (details.get("way") != "linked")
    assert summarise(report_inputs(scores=table, config=config))["alignment"] is None


def test_what_having_seen_a_row_is_worth_stands_by_its_number_of_copies() -> None:
    """Not where the rows are a sample, which lacks most copies."""
    draw = np.random.default_rng(4)
    hashes = np.repeat(np.arange(100), draw.choice([1, 2, 3, 6, 12], 100))
    table = scores_table(len(hashes), content_hash=hashes)
    unseen = table["davir"].to_numpy().copy()
    seen = unseen + draw.random(len(hashes))
    seen[:3], unseen[3] = np.nan, np.nan
    table = table.set_column(table.column_names.index("davir"), "davir", pa.array(unseen))
    table = table.append_column("davir_seen", pa.array(seen))
    facts = summarise(report_inputs(scores=table, num_scored=len(hashes)))
    copies = np.array([(hashes == one).sum() for one in hashes])
    expected = []
    for first, last in ((1, 1), (2, 2), (3, 4), (5, 9), (10, 999)):
        rows = (copies >= first) & (copies <= last) & ~np.isnan(seen) & ~np.isnan(unseen)
        expected.append((rows.sum(), pytest.approx(unseen[rows].mean()), pytest.approx(seen[rows].mean())))
    assert [(row["rows"], row["unseen"], row["seen"]) for row in facts["memorised"]] == expected
    page = " ".join(render_page(facts).split())
    assert ">10 and more<" in page
    assert ">3 to 4<" in page
    assert summarise(report_inputs(scores=table, num_scored=10**9))["memorised"] == []


def test_without_folds_the_reference_has_seen_what_it_scores() -> None:
    facts = summarise(report_inputs())
    assert facts["folds"] == []
    assert "trained on what it scores" in " ".join(render_page(facts).split())


def copied_table(num_rows: int = 400, *, first: int = 40) -> pa.Table:
    """Rows of which every tenth text has five or two copies; so many by DavIR are selected, copies at the top."""
    texts = np.arange(num_rows)
    hashes = np.repeat(texts, np.where(texts % 10, 1, np.where(texts % 20, 2, 5)))[:num_rows]
    is_copy = hashes % 10 == 0
    davir = np.where(is_copy, 0.9, 0.1) + hashes / 10_000  # one score for a text
    selected = np.argsort(np.argsort(-davir, kind="stable")) < first
    return scores_table(num_rows, content_hash=hashes, davir=davir, selected=selected)


def test_folds_of_a_column_say_that_copies_with_another_value_may_have_been_seen() -> None:
    for by, words in ((None, "nor on their copies"), ("user", "rows with the same `user` as those that it scores")):
        facts = summarise(report_inputs(config={"prepare": {"folds": 2, "fold_by": by}}))
        assert words in facts["limits"][0]


def test_copies_are_counted_in_pool_and_selection_as_pandas_counts_them() -> None:
    table = copied_table()
    davir = table["davir"].to_numpy().copy()
    davir[0] = NAN  # one of five copies of the first text has no score
    table = table.set_column(table.column_names.index("davir"), "davir", pa.array(davir))
    facts = summarise(report_inputs(scores=table))
    (sign,) = [row for row in facts["composition"]["signs"] if row["name"] == "exact copy of another example"]
    frame = table.to_pandas().iloc[1:]
    is_copy = frame.duplicated("content_hash", keep=False)
    assert sign["rows"] == facts["copies"]["rows"] == is_copy.sum()
    assert sign["share_of_all"] == pytest.approx(is_copy.mean())
    assert sign["share_of_selected"] == pytest.approx(is_copy[frame["selected"]].mean())
    assert facts["copies"]["expected"] == pytest.approx(is_copy.mean())
    sampled = summarise(report_inputs(scores=table, num_scored=10**9))
    assert sampled["copies"] == facts["copies"], "texts are sampled whole"
    assert "copies would be" in render_page(facts)
    assert summarise(EDGE_CASES["none selected"])["copies"] is None


def test_what_chance_gives_is_what_drawing_whole_texts_gives() -> None:
    facts = summarise(report_inputs(scores=copied_table(2000, first=300)))["copies"]
    sizes = np.unique(copied_table(2000)["content_hash"].to_numpy(), return_counts=True)[1]
    draw, shares = np.random.default_rng(0), []
    for _ in range(4000):
        order = draw.permutation(sizes)
        chosen = order[: np.searchsorted(order.cumsum(), 300) + 1]
        shares.append(chosen[chosen > 1].sum() / chosen.sum())
    assert facts["expected"] == pytest.approx(np.mean(shares), abs=0.01)
    assert facts["sd"] == pytest.approx(np.std(shares), rel=0.1)


def test_where_duplicates_are_dropped_chance_draws_each_text_once() -> None:
    """Against the hypergeometric distribution of scipy."""
    table = copied_table(2000, first=300)
    frame = table.to_pandas()
    once = frame["selected"] & ~frame.duplicated("content_hash")
    table = table.set_column(table.column_names.index("selected"), "selected", pa.array(once))
    config = {"rank": {"order": "davir"}, "select": {"top_k": 9, "drop_duplicates": True}}
    facts = summarise(report_inputs(scores=table, config=config))
    sizes = frame["content_hash"].value_counts()
    by_chance = stats.hypergeom(len(sizes), (sizes > 1).sum(), once.sum())
    assert facts["copies"]["expected"] * once.sum() == pytest.approx(by_chance.mean())
    assert facts["copies"]["sd"] * once.sum() == pytest.approx(by_chance.std(), rel=0.01)
    assert "each text once" in render_page(facts)


def copies_warnings(**fields: Any) -> list[str]:
    findings = summarise(report_inputs(**fields))["findings"]
    return [finding["text"] for finding in findings if finding["look"] and "--prepare.folds 2" in finding["text"]]


def test_copies_beyond_chance_are_a_warning_where_the_reference_has_seen_them() -> None:
    table = copied_table()
    (text,) = copies_warnings(scores=table)
    is_copy = table.to_pandas().duplicated("content_hash", keep=False).to_numpy()
    assert is_copy[table["selected"].to_numpy()].all()
    assert f"100.0 % of the selection, where chance gives {100 * is_copy.mean():.1f} ± " in text
    assert "the reference was trained on them" in text
    findings = [row["text"] for row in summarise(report_inputs(scores=table))["findings"]]
    assert sum("cop" in text for text in findings) == 1
    config = {"rank": {"order": "reference_nll", "lowest": True}, "reference": "some/model"}
    (text,) = copies_warnings(scores=table, config=config)
    assert "the reference may have been trained on them" in text


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"scores": copied_table(first=400)}, id="all is selected"),
        pytest.param({"scores": scores_table(400)}, id="no copies"),
        pytest.param({"scores": copied_table(), "config": {"rank": {"lowest": True}}}, id="memorised rows come last"),
        pytest.param({"scores": copied_table(), "config": {"rank": {"order": "length"}}}, id="not by the reference"),
        pytest.param({"scores": copied_table(), "config": {"prepare": {"folds": 2}}}, id="unseen"),
        pytest.param(
            {"scores": copied_table(), "config": {"select": {"top_k": 40, "max_response_tokens": 9}}},
            id="chance does not draw from all rows",
        ),
        pytest.param(
            {
                "scores": scores_table(
                    400, content_hash=copied_table()["content_hash"].to_numpy(), selected=np.arange(400) % 10 == 0
                )
            },
            id="as many as chance gives",
        ),
    ],
)
def test_there_is_no_warning_of_copies_elsewhere(fields: dict[str, Any]) -> None:
    assert copies_warnings(**fields) == []


def test_a_group_that_the_selection_favours_is_a_finding() -> None:
    length = [2] * 40 + [100] * 360
    selected = [True] * 40 + [False] * 360
    facts = summarise(report_inputs(scores=scores_table(400, num_response_tokens=length, selected=selected)))
    texts = [finding["text"] for finding in facts["findings"] if finding["look"]]
    assert any("at most 4 tokens, 100.0 % of the selection, 10.0 % of the pool" in text for text in texts)
    assert any("2 tokens in the selection and 100 in the pool" in text for text in texts)


def test_an_example_has_its_mean_losses_and_its_id_whole() -> None:
    (top,) = summarise(report_inputs())["top"]
    assert (top["base_nll_mean"], top["reference_nll_mean"]) == (2.0, 1.0)
    assert top["example_id"] == str(2**62 + 1)
    assert top["tokens"][0] == {"text": "Yes", "base": 3.0, "reference": 0.5}


@pytest.mark.parametrize("tokens", [{"tokens": ["Yes"]}, {"reference_token_nll": [1.0]}, {"tokens": None}])
def test_token_losses_that_do_not_belong_together_are_left_out(tokens: dict[str, Any]) -> None:
    (top,) = summarise(report_inputs(top=[example(1, **tokens)]))["top"]
    assert top["tokens"] is None


def test_training_curve_keeps_its_ends_and_drops_what_is_not_finite() -> None:
    inputs = report_inputs()
    curve = [[step, 5.0 - step / 5000] for step in range(1, 5001)] + [[5001, NAN]]
    finetune = inputs.manifests["finetune"] | {"details": {"loss_by_step": curve}}
    training = summarise(replace(inputs, manifests=inputs.manifests | {"finetune": finetune}))["training"]
    assert len(training["loss_by_step"]) <= 500
    assert training["steps"] == 5000
    assert training["first"] > 4.9 > 4.1 > training["last"]
    assert summarise(EDGE_CASES["no finetune"])["training"] is None


@pytest.mark.parametrize(
    ("select", "rank", "words"),
    [
        ({"top_k": 5000}, {}, "the first 5,000 of the examples ranked by davir, highest first"),
        (
            {"top_fraction": 0.06},
            {"order": "rho_sum", "lowest": True},
            "the first 6 % of the examples ranked by rho_sum",
        ),
        ({"top_tokens": 10**6}, {"order": "random"}, "in random order, as many as fit in 1,000,000 response tokens"),
        ({"min_score": 0.0}, {}, "every example whose davir is at least 0"),
        ({"min_score": -1.5}, {"lowest": True}, "every example whose davir is at most -1.5"),
        ({}, {}, "no selection rule is recorded"),
    ],
)
def test_the_rule_is_said_in_words(select: dict[str, Any], rank: dict[str, Any], words: str) -> None:
    assert words in summarise(report_inputs(config={"select": select, "rank": rank}))["headline"]["rule"]["text"]


def test_the_counts_of_the_select_stage_are_reported() -> None:
    inputs = report_inputs()
    select = inputs.manifests["select"]
    select["counts"] |= {"duplicates": 12, "too_long": 0}
    select["details"] = {
        "groups": [{"group": "alpaca", "eligible": 90, "selected": 9, "tokens": 700}],
        "sources": [{"source": "alpaca", "rows": 9, "tokens": 700, "repeat": 2}],
    }
    found = summarise(inputs)["selection"]
    assert [row["rows"] for row in found["left_out"]] == [12, 0]
    assert found["groups"] == select["details"]["groups"]
    assert found["is_mixture"]
    assert summarise(report_inputs())["selection"] == {
        "left_out": [], "groups": [], "sources": [], "is_mixture": False
    }  # fmt: skip


@pytest.mark.parametrize(
    ("select", "words"),
    [
        (
            {"top_k": 5, "quotas": {}, "mixture": [], "balance": ["source"]},
            "divided by source in proportion to the pool",
        ),
        ({"top_k": None, "quotas": {"a": 3}, "mixture": [], "balance": ["source"]}, "highest first, by quotas"),
        ({"top_k": None, "quotas": {}, "mixture": [{"source": "a"}, {"source": "b"}]}, "a mixture of 2 sources"),
    ],
)
def test_a_rule_over_groups_is_said_in_words(select: dict[str, Any], words: str) -> None:
    inputs = report_inputs()
    inputs.config["select"] = select
    text = summarise(inputs)["headline"]["rule"]["text"]
    assert words in text
    assert ("in proportion to the pool" in text) == ("proportion" in words)  # quotas leave nothing to balance


@pytest.mark.parametrize("model", ["base", "reference"])
def test_losses_are_numpys_of_the_mean_loss_of_each_response(model: str) -> None:
    inputs = report_inputs()
    found = summarise(inputs)["losses"]
    sums, length = inputs.scores[f"{model}_nll"].to_numpy(), inputs.scores["num_response_tokens"].to_numpy()
    selected = inputs.scores["selected"].to_numpy()
    for part, rows in (("all", np.ones(len(sums), bool)), ("selected", selected)):
        means = sums[rows] / length[rows]
        assert found[model][part]["n"] == rows.sum()
        assert found[model][part]["mean"] == pytest.approx(means.mean())
        for row in found[model][part]["percentiles"]:
            assert row["value"] == pytest.approx(np.quantile(means, row["p"] / 100))
    assert found["per_token"][model] == pytest.approx(sums.sum() / length.sum())
    histogram = found["histogram"]
    expected = [
        ((sums / length >= low) & (sums / length < high)).sum() for low, high in pairwise(histogram["edges"][:-1])
    ]
    assert histogram[model][:-1] == expected


def test_every_loss_is_drawn_or_counted_as_outside(any_inputs: ReportInputs) -> None:
    losses = summarise(any_inputs)["losses"]
    histogram = losses["histogram"]
    drawn = sum(histogram["base"]) + sum(histogram["reference"]) + histogram["below"] + histogram["above"]
    assert drawn == losses["base"]["all"]["n"] + losses["reference"]["all"]["n"]


def test_a_reference_that_is_no_better_is_a_finding() -> None:
    better = [f for f in summarise(report_inputs())["findings"] if "nats per token" in f["text"]]
    assert [f["look"] for f in better] == [False]
    table = scores_table(400)
    worse = table.set_column(table.column_names.index("reference_nll"), "reference_nll", table["base_nll"])
    (finding,) = [f for f in summarise(report_inputs(scores=worse))["findings"] if "nats per token" in f["text"]]
    assert finding["look"]


def test_near_duplicates_count_among_the_rows_that_were_read() -> None:
    inputs = report_inputs()
    before = summarise(inputs)["books"][0]
    assert before["right_text"] == "prepared + left out + rejected"
    counts = inputs.manifests["prepare"]["counts"]
    counts |= {"read": counts["read"] + 7, "near_duplicates": 7}
    found = summarise(inputs)["books"][0]
    assert found["right_text"] == "prepared + left out + near duplicates + rejected"
    assert found["balanced"]
    assert found["left"] == found["right"] == before["left"] + 7


def test_many_rejects_are_a_finding() -> None:
    inputs = report_inputs()
    inputs.manifests["prepare"]["counts"] = {"read": 403, "prepared": 382, "rejected": 21, "empty_response": 21}
    (finding,) = [f for f in summarise(inputs)["findings"] if "rejected" in f["text"]]
    assert finding == {"look": True, "text": "5.2 % of the rows were rejected (21), most often as empty_response (21)."}
    assert not [f for f in summarise(report_inputs())["findings"] if "rejected" in f["text"] and f["look"]]


def test_throughput_is_the_slope_between_the_points() -> None:
    found = summarise(with_throughput([20.0, 30.0, 40.0, 60.0], [5000, 20000, 40000, 70000]))["throughput"]
    assert [rate["tokens_per_second"] for rate in found["rates"]] == [1500, 2000, 1500]
    assert [(rate["from"], rate["to"]) for rate in found["rates"]] == [(20, 30), (30, 40), (40, 60)]
    assert (found["tokens"], found["seconds"], found["first_seconds"]) == (70000, 60, 20)
    assert found["tokens_per_second"] == pytest.approx(70000 / 60)


def test_points_of_throughput_that_are_near_are_taken_together_without_losing_tokens() -> None:
    rng = np.random.default_rng(0)
    seconds = np.cumsum(rng.exponential(10, 200)) + 30  # some shards end at nearly the same time
    tokens = np.cumsum(rng.integers(1, 100_000, 200))
    rates = summarise(with_throughput(seconds.tolist(), tokens.tolist()))["throughput"]["rates"]
    assert 30 < len(rates) <= 60
    assert (rates[0]["from"], rates[-1]["to"]) == (seconds[0], seconds[-1])
    assert all(before["to"] == after["from"] for before, after in pairwise(rates))
    assert all(rate["to"] - rate["from"] > (seconds[-1] - seconds[0]) / 61 for rate in rates)
    for rate in rates:
        start, end = np.interp([rate["from"], rate["to"]], seconds, tokens)
        assert rate["tokens_per_second"] == pytest.approx((end - start) / (rate["to"] - rate["from"]))


@pytest.mark.parametrize(("seconds", "tokens"), [([], []), ([1.0], [5, 6]), ([0.0], [5])])
def test_throughput_that_says_nothing_is_left_out(seconds: list[float], tokens: list[int]) -> None:
    assert summarise(with_throughput(seconds, tokens))["throughput"] is None
    assert summarise(EDGE_CASES["no manifests"])["throughput"] is None


def test_curves_are_not_repeated_among_a_stages_details() -> None:
    facts = summarise(with_throughput([20.0, 30.0], [5000, 20000]))
    assert [row for stage in facts["stages"] for row in stage["details"]] == []


def test_middle_ranks_and_examples_with_tokens_are_reported() -> None:
    kept = {"best": [example(2)], "middle": [example(200)], "worst": []}
    facts = summarise(report_inputs(middle=[example(201)], with_tokens=kept))
    assert [row["rank"] for row in facts["middle"]] == [201]
    assert {place: [row["rank"] for row in rows] for place, rows in facts["with_tokens"].items()} == {
        "best": [2], "middle": [200], "worst": []
    }  # fmt: skip
    assert facts["with_tokens"]["best"][0]["tokens"][0] == {"text": "Yes", "base": 3.0, "reference": 0.5}
