"""Each rule takes the prefix of the ranking that it means, and refuses what it cannot mean."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from davir_ray.config.selection import Part, RankConfig, SelectConfig
from davir_ray.errors import ConfigError, IntegrityError, OutputError
from davir_ray.formulas.shares import Limit
from davir_ray.run.files import read_parquet, write_parquet
from davir_ray.run.folder import Run
from davir_ray.run.manifest import Manifest
from davir_ray.schema import SELECTED
from davir_ray.stages import rank as ranking
from davir_ray.stages.rank import rank
from davir_ray.stages.select import plan
from davir_ray.stages.select.limits import GroupCount, limits_by_file
from davir_ray.stages.select.plan import rows_with_text
from davir_ray.stages.select.rule import select

pytestmark = pytest.mark.usefixtures("ray_session", "small_bins")

MakeScores = Callable[..., Run]
BY_DAVIR = RankConfig()


@pytest.fixture
def small_bins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many files of ranked/ and, cut elsewhere, of selected/."""
    monkeypatch.setattr(ranking, "BIN_ROWS", 15)
    monkeypatch.setattr(plan, "BIN_ROWS", 11)


def ranked_run(make_scores: MakeScores, rows: int = 100, config: RankConfig = BY_DAVIR, **columns: object) -> Run:
    davir = np.random.default_rng(rows).permutation(rows) / rows
    run = make_scores(davir, example_id=list(range(1000, 1000 + rows)), **columns)
    assert len(rank(run, config).files) >= min(rows // 20, 3)
    return run


def table_of(run: Run, folder: str) -> pd.DataFrame:
    places = [run / folder / name for name in (run / folder).names(".parquet")]
    return pa.concat_tables([read_parquet(place) for place in places]).to_pandas()


def check_prefix(run: Run, manifest: Manifest, expected: int) -> None:
    ranked, selected = table_of(run, "ranked"), table_of(run, "selected")
    assert manifest.counts["ranked"] == len(ranked)
    assert manifest.counts["selected"] == expected
    pd.testing.assert_frame_equal(selected[ranked.columns], ranked[:expected])
    assert selected["prompt"].tolist() == [f"prompt {i}" for i in ranked["example_id"][:expected]]


@pytest.mark.parametrize("top_k", [1, 11, 12, 50, 99, 100])
def test_top_k_takes_the_first_ranks(make_scores: MakeScores, top_k: int) -> None:
    run = ranked_run(make_scores)
    check_prefix(run, select(run, BY_DAVIR, SelectConfig(top_k=top_k)), top_k)


@pytest.mark.parametrize(
    ("rows", "fraction", "expected"), [(100, 0.29, 29), (100, 0.579, 57), (7, 0.1, 1), (9, 1.0, 9)]
)
def test_top_fraction_is_the_floor_of_the_exact_decimal(
    make_scores: MakeScores, rows: int, fraction: float, expected: int
) -> None:
    run = ranked_run(make_scores, rows)
    check_prefix(run, select(run, BY_DAVIR, SelectConfig(top_fraction=fraction)), expected)


def test_files_hold_fewer_rows_where_texts_are_long(make_scores: MakeScores, monkeypatch: pytest.MonkeyPatch) -> None:
    run = ranked_run(make_scores)
    prepared = run.require("prepare")
    replace(prepared, details={"text_bytes_per_row": 10**6}).write(run.folder)
    monkeypatch.setattr(plan, "_BIN_BYTES", 4 * 10**6 + 1)
    selected = select(run, BY_DAVIR, SelectConfig(top_k=50))
    check_prefix(run, selected, 50)
    assert max(entry.rows for entry in selected.files_in("selected")) == 4
    assert rows_with_text(run, 3) == 3


def test_top_fraction_counts_ranked_rows_only(make_scores: MakeScores) -> None:
    run = make_scores([0.1, 0.2, None, None, 0.3, 0.4, None, None])
    rank(run, BY_DAVIR)
    check_prefix(run, select(run, BY_DAVIR, SelectConfig(top_fraction=0.5)), 2)


@pytest.mark.parametrize("share", [0.03, 0.5, 1.0])
def test_top_tokens_is_the_longest_prefix_that_fits(make_scores: MakeScores, share: float) -> None:
    tokens = np.random.default_rng(0).integers(1, 30, 100)
    run = ranked_run(make_scores, num_response_tokens=tokens)
    cumulative = table_of(run, "ranked")["num_response_tokens"].cumsum()
    for most in (int(share * tokens.sum()), int(cumulative[20]), int(cumulative[20]) - 1):
        manifest = select(run, BY_DAVIR, SelectConfig(top_tokens=most))
        check_prefix(run, manifest, int((cumulative <= most).sum()))


def test_more_tokens_than_there_are_takes_all(make_scores: MakeScores) -> None:
    run = ranked_run(make_scores)
    check_prefix(run, select(run, BY_DAVIR, SelectConfig(top_tokens=10**12)), 100)


@pytest.mark.parametrize("lowest", [False, True])
def test_min_score_is_inclusive(make_scores: MakeScores, lowest: bool) -> None:
    config = RankConfig(lowest=lowest)
    run = ranked_run(make_scores, config=config)
    manifest = select(run, config, SelectConfig(min_score=0.4))
    check_prefix(run, manifest, 41 if lowest else 60)
    assert table_of(run, "selected")["davir"].iloc[-1] == 0.4
    assert manifest.details["cut"] == 0.4


def test_min_score_takes_all_ties(make_scores: MakeScores) -> None:
    run = make_scores([0.5] * 40 + [0.1] * 40)
    rank(run, BY_DAVIR)
    check_prefix(run, select(run, BY_DAVIR, SelectConfig(min_score=0.5)), 40)


def test_min_score_is_of_the_ordering_key(make_scores: MakeScores) -> None:
    config = RankConfig(order="length")
    run = ranked_run(make_scores, config=config, num_response_tokens=range(1, 101))
    check_prefix(run, select(run, config, SelectConfig(min_score=91)), 10)


@pytest.mark.parametrize("lowest", [False, True])
def test_max_score_and_skip_top_cut_the_other_end(make_scores: MakeScores, lowest: bool) -> None:
    config = RankConfig(lowest=lowest)
    run = ranked_run(make_scores, config=config)
    ranked = table_of(run, "ranked")
    within = ranked["davir"] >= 0.2 if lowest else ranked["davir"] <= 0.8
    skipped = ranked["rank"] <= 29
    for settings, kept in (
        ({"max_score": 0.2 if lowest else 0.8}, within),
        ({"skip_top": 0.29}, ~skipped),
        ({"max_score": 0.2 if lowest else 0.8, "skip_top": 0.29}, within & ~skipped),
    ):
        manifest = select(run, config, SelectConfig(top_k=30, **settings))
        selected = table_of(run, "selected")
        assert selected["rank"].tolist() == ranked[kept]["rank"].tolist()[:30]
        left_out = [manifest.counts.get(name, 0) for name in ("beyond_max_score", "skipped")]
        assert sum(left_out) == int((~kept).sum())
        assert manifest.counts["eligible"] == int(kept.sum())


def test_a_selection_without_the_new_filters_is_that_of_an_earlier_version(make_scores: MakeScores) -> None:
    run = ranked_run(make_scores)
    rule = select(run, BY_DAVIR, SelectConfig(top_k=10)).fingerprint["rule"]
    assert not {"max_score", "skip_top"} & set(rule)
    assert select(run, BY_DAVIR, SelectConfig(top_k=10, skip_top=0.1)).fingerprint["rule"]["skip_top"] == 0.1


def test_the_cut_of_a_loss_by_token_is_in_nats_per_token(make_scores: MakeScores) -> None:
    config = RankConfig(order="base_mean_nll")
    run = ranked_run(make_scores, config=config, base_nll=np.arange(100.0), num_response_tokens=np.full(100, 4))
    manifest = select(run, config, SelectConfig(min_score=20.0))
    check_prefix(run, manifest, 20)
    assert manifest.details["cut"] == 20.0


def test_a_random_order_has_no_cut_value(make_scores: MakeScores) -> None:
    config = RankConfig(order="random")
    run = ranked_run(make_scores, config=config)
    manifest = select(run, config, SelectConfig(top_k=20))
    check_prefix(run, manifest, 20)
    assert manifest.details["cut"] is None


@pytest.mark.parametrize(
    ("settings", "first", "last"),
    [
        ({"top_k": 12}, 1, 12),
        ({"top_fraction": 0.12}, 1, 12),
        ({"top_k": 12, "skip_top": 0.5}, 51, 62),
        ({"top_fraction": 0.5, "skip_top": 0.5}, 51, 75),
        ({"top_k": 50, "skip_top": 0.5}, 51, 100),
    ],
)
def test_where_ranks_alone_decide_only_the_files_of_the_selected_ones_are_read(
    make_scores: MakeScores, settings: dict[str, Any], first: int, last: int
) -> None:
    run = ranked_run(make_scores)
    ranked = table_of(run, "ranked")
    files = run.require("rank").files_in("ranked")
    ends = np.cumsum([entry.rows for entry in files])
    useless = [entry.name for entry, end in zip(files, ends, strict=True) if end < first or end - entry.rows >= last]
    assert useless
    for name in useless:
        (run / "ranked" / name).remove()
    manifest = select(run, BY_DAVIR, SelectConfig(**settings))
    selected = table_of(run, "selected")
    pd.testing.assert_frame_equal(selected[ranked.columns], ranked[first - 1 : last].reset_index(drop=True))
    assert manifest.counts["eligible"] == 101 - first
    assert manifest.counts.get("skipped", 0) == first - 1
    tokens = int(selected["num_response_tokens"].sum())
    assert manifest.details["groups"] == [
        {"group": "", "eligible": 101 - first, "selected": len(selected), "tokens": tokens}
    ]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"top_k": 5}, {"a": Limit(rows=5), "b": Limit(rows=1)}),
        ({"top_k": 4}, {"a": Limit(rows=4)}),
        ({"top_tokens": 90}, {"a": Limit(tokens=90), "b": Limit(tokens=50), "c": Limit(tokens=10)}),
        ({"top_tokens": 80}, {"a": Limit(tokens=80), "b": Limit(tokens=40)}),
        ({"min_score": 0.5}, {"a": Limit(), "b": Limit(), "c": Limit()}),
    ],
)
def test_only_files_that_something_is_taken_from_have_a_limit(
    settings: dict[str, Any], expected: dict[str, Limit]
) -> None:
    counts = [GroupCount(file=file, group="", rows=4, tokens=40) for file in "abc"]
    assert limits_by_file(counts, SelectConfig(**settings)) == {file: {"": limit} for file, limit in expected.items()}


def test_more_than_all_is_refused_with_the_count(make_scores: MakeScores) -> None:
    run = ranked_run(make_scores)
    with pytest.raises(ConfigError, match=r"top_k is 101, but only 100"):
        select(run, BY_DAVIR, SelectConfig(top_k=101))


@pytest.mark.parametrize("rule", [SelectConfig(min_score=1.5), SelectConfig(top_tokens=4)])
def test_a_rule_that_selects_nothing_is_refused(make_scores: MakeScores, rule: SelectConfig) -> None:
    run = ranked_run(make_scores, num_response_tokens=[5] * 100)
    with pytest.raises(ConfigError, match="no row"):
        select(run, BY_DAVIR, rule)


def test_selected_has_the_schema_of_the_contract(make_scores: MakeScores) -> None:
    run = ranked_run(make_scores)
    select(run, BY_DAVIR, SelectConfig(top_k=30))
    for name in (run / "selected").names():
        assert read_parquet(run / "selected" / name).schema.remove_metadata().equals(SELECTED)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (SelectConfig(top_k=30), range(99, 69, -1)),
        (SelectConfig(min_score=1.5), range(99, 74, -1)),
        (SelectConfig(max_score=1, top_k=7), range(50, 43, -1)),
        (SelectConfig(top_k=9, drop_duplicates=True), range(99, 81, -2)),
    ],
)
def test_a_selection_by_ifd_has_its_column(
    make_scores: MakeScores, add_ifd: Callable[..., None], rule: SelectConfig, expected: range
) -> None:
    """IFD of row i is i/50; two neighbouring rows, 98 and 99, have the same content."""
    run, config = make_scores(np.zeros(100), content_hash=np.arange(100) // 2), RankConfig(order="ifd")
    add_ifd(run, {row: row / 50 for row in range(100)})
    rank(run, config)
    manifest = select(run, config, rule)
    table = table_of(run, "selected")
    assert table["example_id"].tolist() == list(expected)
    assert table.columns.tolist() == [*SELECTED.names, "ifd"]
    assert table["ifd"].tolist() == [row / 50 for row in expected]
    assert manifest.details["cut"] == expected[-1] / 50


def test_a_mixture_by_ifd_has_its_column(make_scores: MakeScores, add_ifd: Callable[..., None]) -> None:
    run, config = make_scores(np.zeros(100), source=["a", "b"] * 50), RankConfig(order="ifd")
    add_ifd(run, {row: row / 50 for row in range(100)})
    rank(run, config)
    select(run, config, SelectConfig(mixture=[Part(source="a", top_k=20, repeat=2), Part(source="b", top_k=5)]))
    table = table_of(run, "mixture")
    assert sorted(table["ifd"]) == sorted(
        [
            *(row / 50 for row in range(60, 100, 2)),
            *(row / 50 for row in range(60, 100, 2)),
            *(row / 50 for row in range(91, 100, 2)),
        ]
    )


def test_a_smaller_selection_leaves_no_file_of_the_larger(make_scores: MakeScores) -> None:
    run = ranked_run(make_scores)
    select(run, BY_DAVIR, SelectConfig(top_k=90))
    check_prefix(run, select(run, BY_DAVIR, SelectConfig(top_k=5)), 5)


def test_scores_and_examples_that_do_not_match_are_found(make_scores: MakeScores) -> None:
    run = ranked_run(make_scores)
    place = run / "examples" / (run / "examples").names()[0]
    table = read_parquet(place)
    write_parquet(place, table.take(list(reversed(range(table.num_rows)))))
    with pytest.raises(IntegrityError, match="do not hold the same rows"):
        select(run, BY_DAVIR, SelectConfig(top_k=5))


def test_selecting_before_ranking_says_what_to_run(make_scores: MakeScores) -> None:
    with pytest.raises(OutputError, match="no complete rank stage"):
        select(make_scores([0.5]), BY_DAVIR, SelectConfig(top_k=1))
