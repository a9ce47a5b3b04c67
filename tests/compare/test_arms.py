"""Which rows each arm gets: as many as the selection of each group, the right ones, the same whatever the shards."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from davir_ray.compare import arms as row_sets
from davir_ray.compare.arms import FinishedRun, write_set
from davir_ray.config.selection import Part, RankConfig, SelectConfig
from davir_ray.engine import shuffle
from davir_ray.errors import ConfigError, IntegrityError
from davir_ray.formulas.length_matching import length_bins
from davir_ray.run.files import FileEntry, in_folder, read_parquet, write_parquet
from davir_ray.run.folder import Run
from davir_ray.run.manifest import Manifest
from davir_ray.schema import EXAMPLES
from davir_ray.stages.rank import rank
from davir_ray.stages.select.rule import select

pytestmark = pytest.mark.usefixtures("ray_session")

ROWS = 400
DRAW = np.random.default_rng(0)
DAVIR = DRAW.normal(0, 1, ROWS).round(2)
RHO = DRAW.normal(0, 1, ROWS)
TOKENS = DRAW.integers(1, 300, ROWS)
PROMPTS = DRAW.integers(1, 300, ROWS)
SOURCES = np.where(np.arange(ROWS) % 4 == 0, "gsm8k", "alpaca")


def finished(
    make_scores: Callable[..., Run], config: SelectConfig, order: RankConfig = RankConfig(), **options: Any
) -> FinishedRun:
    """A constructed run, ranked and selected by the real stages."""
    columns = {
        "source": SOURCES, "rho_sum": RHO, "num_response_tokens": TOKENS, "content_hash": range(ROWS),
        "num_prompt_tokens": PROMPTS,
    }  # fmt: skip
    run = make_scores(DAVIR, **columns | options)
    names = (run / "examples").names()
    files = in_folder("examples", [entry_of(Run(run / "examples" / name)) for name in names])
    Manifest(
        stage="prepare", fingerprint={}, counts={"read": ROWS, "prepared": ROWS, "rejected": 0}, files=files
    ).write(run.folder)
    rank(run, order)
    select(run, order, config)
    return FinishedRun(run, order, config)


def entry_of(place: Run) -> Any:
    table = read_parquet(place.folder)
    return FileEntry(name=place.folder.name, rows=table.num_rows, bytes=len(place.folder.read_bytes()), sha256="")


def ids_of(run: Run, folder: str) -> list[int]:
    tables = [read_parquet(run / folder / name, ["example_id"]) for name in (run / folder).names()]
    return pa.concat_tables(tables)["example_id"].to_pylist()


def best(values: np.ndarray, count: int, rows: np.ndarray | None = None) -> set[int]:
    """Rows of the highest values, ties by the lower id."""
    rows = np.arange(ROWS) if rows is None else rows
    return set(rows[np.lexsort((rows, -values[rows]))][:count].tolist())


@pytest.mark.parametrize("sampled", [20_000, 40])
def test_each_arm_gets_its_rows(make_scores: Any, sampled: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_sets, "_SAMPLED_KEYS", sampled)
    run = finished(make_scores, SelectConfig(top_k=60))
    selection = run.selection(None)
    chosen = {arm: run.rows_of(arm, selection, 0).tolist() for arm in ("selection", "lowest", "rho", "random")}
    assert set(chosen["selection"]) == set(ids_of(run.run, "selected")) == best(DAVIR, 60)
    assert set(chosen["lowest"]) == best(-DAVIR, 60)
    assert set(chosen["rho"]) == best(RHO, 60)
    assert len(set(chosen["random"])) == 60
    again, other = (run.rows_of("random", selection, seed).tolist() for seed in (0, 1))
    assert again == chosen["random"]
    assert len(set(other) & set(again)) < 30
    matched = run.rows_of("random_matched", selection, 0)
    wanted, edges = TOKENS[chosen["selection"]], run.select.length_edges
    assert sorted(length_bins(TOKENS[matched], edges)) == sorted(length_bins(wanted, edges))
    assert TOKENS[matched].sum() == wanted.sum()
    assert len(set(matched.tolist()) & set(chosen["selection"])) < 40


def test_the_worst_rows_of_a_run_that_takes_the_lowest_are_the_highest(make_scores: Any) -> None:
    run = finished(make_scores, SelectConfig(top_k=60), RankConfig(lowest=True))
    selection = run.selection(None)
    chosen = {arm: set(run.rows_of(arm, selection, 0).tolist()) for arm in ("selection", "lowest")}
    assert chosen == {"selection": best(-DAVIR, 60), "lowest": best(DAVIR, 60)}


@pytest.mark.parametrize("sampled", [20_000, 40])
def test_an_arm_of_another_order_has_its_highest_rows(
    make_scores: Any, add_ifd: Any, sampled: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as the selection; rows without a value in that order are left out, as they are of a ranking by it."""
    monkeypatch.setattr(row_sets, "_SAMPLED_KEYS", sampled)
    draw = np.random.default_rng(5)
    losses, ifd = draw.gamma(2, 40, ROWS), draw.normal(1, 0.1, ROWS)
    ifd[draw.random(ROWS) < 0.2] = np.nan
    run = finished(make_scores, SelectConfig(top_k=60, min_response_tokens=20), base_nll=losses)
    add_ifd(run.run, {row: None if np.isnan(value) else float(value) for row, value in enumerate(ifd)})
    selection, pool = run.selection(None), np.flatnonzero(TOKENS >= 20)
    chosen = {
        arm: set(run.rows_of(f"order:{arm}", selection, 0).tolist()) for arm in ("base_mean_nll", "ifd", "length")
    }
    assert chosen["base_mean_nll"] == best(losses / TOKENS, 60, pool)
    assert chosen["ifd"] == best(ifd, 60, pool[~np.isnan(ifd[pool])])
    assert chosen["length"] == best(TOKENS, 60, pool)
    assert chosen["base_mean_nll"] != best(losses, 60, pool)


def test_an_arm_by_ifd_of_a_run_that_drops_duplicates_needs_its_ranking(make_scores: Any, add_ifd: Any) -> None:
    config, ifd = SelectConfig(top_k=40, drop_duplicates=True), np.random.default_rng(6).normal(size=ROWS)
    run = finished(make_scores, config, content_hash=COPIES)
    add_ifd(run.run, dict(enumerate(ifd.tolist())))
    with pytest.raises(ConfigError, match=r"ranked/ has no ifd; give jobs/rank.py --rank.order ifd"):
        run.rows_of("order:ifd", run.selection(None), 0)
    rank(run.run, RankConfig(order="ifd"))
    select(run.run, RankConfig(order="ifd"), config)
    ranked = FinishedRun(run.run, RankConfig(order="ifd"), config)
    selection = ranked.selection(None)
    firsts = {copy: max(np.flatnonzero(copy == COPIES), key=lambda row: ifd[row]) for copy in set(COPIES.tolist())}
    pool = np.array(sorted(firsts.values()))
    assert set(ranked.rows_of("order:ifd", selection, 0).tolist()) == best(ifd, 40, pool)
    assert set(ranked.rows_of("lowest", selection, 0).tolist()) == best(-ifd, 40, pool)
    assert set(ranked.rows_of("order:davir", selection, 0).tolist()) == best(DAVIR, 40, pool)


COPIES = np.random.default_rng(3).integers(0, 200, ROWS)
"""Hashes of contents of which most are there more than once."""

FILTERS: list[tuple[SelectConfig, RankConfig]] = [
    (SelectConfig(top_k=40, min_response_tokens=60), RankConfig()),
    (SelectConfig(top_k=40, max_response_tokens=200, drop_duplicates=True), RankConfig()),
    (SelectConfig(top_k=40, drop_duplicates=True), RankConfig(order="rho_sum", lowest=True)),
    (SelectConfig(min_score=1.3, min_response_tokens=20), RankConfig()),
]


def may_be_taken(config: SelectConfig, order: RankConfig) -> np.ndarray:
    """The rows that pass the filters, one by one: of each content the first of the run's ranking, and its length."""
    values = {"davir": DAVIR, "rho_sum": RHO}[order.by] * (-1 if order.lowest else 1)
    seen: set[int] = set()
    kept = []
    for row in np.lexsort((np.arange(ROWS), -values)).tolist():
        is_copy = config.drop_duplicates and COPIES[row] in seen
        seen.add(COPIES[row])
        fits = (config.min_response_tokens or 0) <= TOKENS[row] <= (config.max_response_tokens or 1000)
        if fits and not is_copy:
            kept.append(row)
    return np.array(sorted(kept))


@pytest.mark.parametrize("sampled", [20_000, 40])
@pytest.mark.parametrize(("config", "order"), FILTERS)
def test_the_filters_of_the_selection_bind_every_arm(
    make_scores: Any, config: SelectConfig, order: RankConfig, sampled: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_sets, "_SAMPLED_KEYS", sampled)
    run, pool = finished(make_scores, config, order, content_hash=COPIES), may_be_taken(config, order)
    selection = run.selection(None)
    size = selection.num_rows
    assert size < len(pool) < ROWS
    assert set(run.rows_of("rho", selection, 0).tolist()) == best(RHO, size, pool)
    values = {"davir": DAVIR, "rho_sum": RHO}[order.by] * (-1 if order.lowest else 1)
    assert set(run.rows_of("lowest", selection, 0).tolist()) == best(-values, size, pool)
    for arm in ("random", "random_matched"):
        draws = [run.rows_of(arm, selection, draw).tolist() for draw in range(3)]
        assert all(set(rows) <= set(pool.tolist()) and len(rows) == size for rows in draws)
        assert len({tuple(rows) for rows in draws}) == 3


def test_the_mean_length_is_that_of_the_rows_that_an_arm_may_take(make_scores: Any) -> None:
    config = SelectConfig(top_k=9, max_response_tokens=120, max_score=1.0, balance=["length"])
    run = finished(make_scores, config)
    assert run.mean_tokens() == {"": pytest.approx(TOKENS[TOKENS <= 120].mean())}
    parts = [Part(source="alpaca", top_k=5), Part(source="gsm8k", all=True)]
    run = finished(make_scores, SelectConfig(mixture=parts, min_response_tokens=50), name="mixture")
    means = {name: TOKENS[(name == SOURCES) & (TOKENS >= 50)].mean() for name in ("alpaca", "gsm8k")}
    assert run.mean_tokens() == pytest.approx(means)
    assert finished(make_scores, SelectConfig(top_k=9), RankConfig(most=50), name="most").mean_tokens() is None


def test_a_content_with_many_copies_is_drawn_no_more_often_than_another(make_scores: Any) -> None:
    """Half of the rows are copies of one: of the others every second is drawn, and so is it."""
    copied = np.where(np.arange(ROWS) < ROWS // 2, 0, np.arange(ROWS))
    config = SelectConfig(top_k=100, drop_duplicates=True)
    run = finished(make_scores, config, content_hash=copied)
    selection = run.selection(None)
    drawn = [set(copied[run.rows_of("random", selection, draw)].tolist()) for draw in range(12)]
    assert all(len(contents) == 100 for contents in drawn)
    times = sum(0 in contents for contents in drawn)
    assert 1 <= times <= 11  # of 12 draws, by half: all or none once in two thousand


def test_duplicates_beyond_the_ranks_that_were_kept_are_not_guessed(make_scores: Any) -> None:
    config = SelectConfig(top_k=40, drop_duplicates=True)
    run = finished(make_scores, config, RankConfig(most=100), content_hash=COPIES)
    with pytest.raises(ConfigError, match=r"100 of 400 ranks \(rank.most\).*--rank.most null"):
        run.rows_of("random", run.selection(None), 0)
    without = finished(make_scores, SelectConfig(top_k=40), RankConfig(most=100), name="without")
    assert max(without.rows_of("lowest", without.selection(None), 0)) > 0


def test_draws_from_outside_the_selection_have_none_of_it(make_scores: Any) -> None:
    run = finished(make_scores, SelectConfig(top_k=60))
    selection = run.selection(None)
    without = np.sort(np.asarray(selection["example_id"]))
    for arm in ("random", "random_matched"):
        rows = run.rows_of(arm, selection, 0, without=without)
        assert len(set(rows.tolist())) == 60
        assert not set(rows.tolist()) & set(without.tolist())
    most = run.selection(250)
    without = np.sort(np.asarray(most["example_id"]))
    outside = r"are outside the selection \(outside_selection\)"
    with pytest.raises(ConfigError, match=rf"the arm random needs 250 rows, but only 150 that pass .* {outside}"):
        run.rows_of("random", most, 0, without=without)
    with pytest.raises(ConfigError, match=rf"random_matched cannot be drawn: .* that has \d+ .*{outside}"):
        run.rows_of("random_matched", most, 0, without=without)


@pytest.mark.parametrize("mixture", [[], [Part(source="alpaca", top_k=40), Part(source="gsm8k", top_k=20)]])
def test_prompt_lengths_are_matched_on_request(make_scores: Any, mixture: list[Part]) -> None:
    config = SelectConfig(mixture=mixture) if mixture else SelectConfig(top_k=60)
    run = finished(make_scores, config)
    selection = run.selection(None)
    wanted, bounds = np.asarray(selection["example_id"]), [0, *config.length_edges, 10**9]
    rows = run.rows_of("random_matched", selection, 0, match_prompts=True)
    for lengths in (TOKENS, PROMPTS):
        for source in ("alpaca", "gsm8k") if mixture else ("",):
            found, expected = (
                np.histogram(lengths[ids][(SOURCES[ids] == source) | (source == "")], bounds)[0]
                for ids in (rows, wanted)
            )
            assert found.tolist() == expected.tolist()
    plain = run.rows_of("random_matched", selection, 0)
    histograms = [np.histogram(PROMPTS[ids], bounds)[0].tolist() for ids in (plain, wanted)]
    assert histograms[0] != histograms[1]


def test_the_driver_gets_no_more_rows_of_a_range_than_matching_may_need(
    make_scores: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a range has hardly a row in the sample, so that its cut is no cut."""
    run = finished(make_scores, SelectConfig(top_k=20))
    selection = run.selection(None)
    expected = run.rows_of("random_matched", selection, 0, match_prompts=True)
    tables = []

    def collect(*given: Any, **options: Any) -> pa.Table:
        tables.append(shuffle.collect(*given, **options))
        return tables[-1]

    monkeypatch.setattr(row_sets, "collect", collect)
    assert run.rows_of("random_matched", selection, 0, match_prompts=True).tolist() == expected.tolist()
    assert tables[-1].num_rows > 100
    monkeypatch.setattr(row_sets, "_SAMPLED_KEYS", 40)
    monkeypatch.setattr(row_sets, "_MATCHING_ROWS", 1)
    assert len(run.rows_of("random_matched", selection, 0, match_prompts=True)) == 20
    assert 20 <= tables[-1].num_rows <= 3 * 20


def test_the_rows_do_not_depend_on_the_shards(make_scores: Any) -> None:
    found = []
    for shards in (1, 7):
        run = finished(make_scores, SelectConfig(top_k=30), num_shards=shards, name=f"run{shards}")
        selection = run.selection(None)
        found.append([run.rows_of(arm, selection, 3).tolist() for arm in ("random", "random_matched", "lowest")])
    assert found[0] == found[1]


MIXTURE = [Part(source="alpaca", top_k=40), Part(source="gsm8k", all=True, repeat=2)]


def test_a_mixture_keeps_its_parts_in_every_arm_and_its_repeats(make_scores: Any) -> None:
    run = finished(make_scores, SelectConfig(mixture=MIXTURE))
    selection = run.selection(None)
    assert run.size_of(selection) == 40
    alpaca, gsm8k = (np.flatnonzero(source == SOURCES) for source in ("alpaca", "gsm8k"))
    for arm in ("selection", "random", "random_matched", "lowest"):
        rows = set(run.rows_of(arm, selection, 0).tolist())
        assert set(gsm8k.tolist()) <= rows
        assert len(rows - set(gsm8k.tolist())) == 40
    assert best(DAVIR, 40, alpaca) <= set(run.rows_of("selection", selection, 0).tolist())
    larger = run.selection(70)
    assert run.size_of(larger) == 70
    assert best(DAVIR, 70, alpaca) <= set(run.rows_of("selection", larger, 0).tolist())

    place = run.run.within("set")
    ids = run.rows_of("random", selection, 0)
    manifest = write_set(place, run, ids)
    written = ids_of(place, "examples")
    assert sorted(written) == sorted([*ids.tolist(), *gsm8k.tolist()])
    assert manifest.counts["prepared"] == len(written) == 40 + 2 * len(gsm8k)
    assert manifest.counts["num_response_tokens"] == TOKENS[written].sum()
    before = (place / "examples").listed()
    write_set(place, run, ids)
    assert (place / "examples").listed() == before


def test_the_full_set_of_a_mixture_has_all_of_its_sources_as_often_as_it_takes_them(make_scores: Any) -> None:
    run = finished(make_scores, SelectConfig(mixture=[Part(source="gsm8k", top_k=5, repeat=3)]))
    manifest = write_set(run.run.within("set"), run, None)
    gsm8k = np.flatnonzero(SOURCES == "gsm8k").tolist()
    assert sorted(ids_of(run.run.within("set"), "examples")) == sorted(gsm8k * 3)
    assert manifest.counts["prepared"] == 3 * len(gsm8k)
    assert manifest.counts["trainable"] == 0  # in these constructed examples nothing precedes what is scored


def test_a_set_of_a_run_with_folds_has_no_folds(make_scores: Any) -> None:
    run = finished(make_scores, SelectConfig(top_k=30))
    for name in (run.run / "examples").names():
        table = read_parquet(run.run / "examples" / name)
        folds = pa.array(np.arange(table.num_rows) % 3, pa.int8())
        write_parquet(run.run / "examples" / name, table.append_column("fold", folds))
    place = run.run.within("set")
    ids = run.rows_of("selection", run.selection(None), 0)
    for entry in write_set(place, run, ids).files:
        assert read_parquet(place / entry.name).schema.equals(EXAMPLES)
    assert sorted(ids_of(place, "examples")) == sorted(ids.tolist())


def test_another_size_keeps_filters_and_balance(make_scores: Any) -> None:
    run = finished(make_scores, SelectConfig(top_fraction=0.1, min_response_tokens=50, balance=["source"]))
    for size in (20, 90):
        rows = np.asarray(run.selection(size)["example_id"])
        assert len(rows) == size
        assert (TOKENS[rows] >= 50).all()
        assert abs((SOURCES[rows] == "gsm8k").mean() - (SOURCES[TOKENS >= 50] == "gsm8k").mean()) < 0.05


def test_duplicates_that_are_lost_are_not_taken_for_none(make_scores: Any) -> None:
    """By a comparison with a run, whose manifest may be of a version that did not name their files."""
    config = SelectConfig(top_k=50, drop_duplicates=True)
    run = finished(make_scores, config, content_hash=np.arange(ROWS) % 300)
    selected = run.run.manifest("select")
    assert selected is not None
    older = replace(selected, files=[entry for entry in selected.files if not entry.name.startswith("duplicates/")])
    assert len(older.files) < len(selected.files)
    for manifest in (selected, older):
        manifest.write(run.run.folder)
        assert sorted(run.selection(None)["example_id"].to_pylist()) == sorted(ids_of(run.run, "selected"))
    (run.run / "duplicates" / (run.run / "duplicates").names()[0]).remove()
    with pytest.raises(IntegrityError, match=r"duplicates holds \d+ duplicates, but the selection counted \d+"):
        run.selection(None)
    selected.write(run.run.folder)
    with pytest.raises(IntegrityError, match=r"duplicates/\S+ is missing"):
        run.selection(None)


def test_more_rows_than_there_are_is_told(make_scores: Any) -> None:
    run = finished(make_scores, SelectConfig(top_k=10))
    with pytest.raises(ConfigError, match="only 400 rows"):
        run.selection(401)
