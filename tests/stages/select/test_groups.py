"""Filters, groups, quotas and mixtures against the same selection written out in pandas, and other tools as readers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import duckdb
import numpy as np
import pandas as pd
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from davir_ray.config.run import RunConfig
from davir_ray.config.selection import Part, RankConfig, SelectConfig
from davir_ray.config.sources import Source
from davir_ray.errors import ConfigError
from davir_ray.run.files import FileEntry, read_parquet
from davir_ray.run.folder import Run
from davir_ray.run.manifest import Manifest
from davir_ray.stages import rank as ranking
from davir_ray.stages.rank import rank
from davir_ray.stages.select import mixture as mixing
from davir_ray.stages.select import plan
from davir_ray.stages.select.rule import select

pytestmark = pytest.mark.usefixtures("ray_session", "small_bins")

MakeScores = Callable[..., Run]
ROWS = 240
SOURCES = ("org/alpaca", "gsm8k", "third")


@pytest.fixture
def small_bins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many files of ranked/, selected/ and mixture/, cut at different places."""
    monkeypatch.setattr(ranking, "BIN_ROWS", 35)
    monkeypatch.setattr(ranking, "_SAMPLES_PER_BIN", 12)
    monkeypatch.setattr(plan, "BIN_ROWS", 11)
    monkeypatch.setattr(mixing, "BIN_ROWS", 40)


@pytest.fixture
def run(make_scores: MakeScores) -> Run:
    """Three sources of different sizes and lengths, many ties, and duplicates within and across sources."""
    draw = np.random.default_rng(7)
    davir = draw.integers(0, 25, ROWS) / 25
    columns = {
        "example_id": draw.permutation(10**6)[:ROWS],
        "source": draw.choice(SOURCES, ROWS, p=[0.6, 0.3, 0.1]).tolist(),
        "num_response_tokens": draw.integers(1, 700, ROWS),
        "content_hash": draw.integers(0, 2**63 - 1, ROWS // 2)[draw.integers(0, ROWS // 2, ROWS)],
    }
    columns["record"] = [json.dumps({"n": int(i), "text": "a\nü"}, ensure_ascii=False) for i in columns["example_id"]]
    run = make_scores(davir, num_shards=5, **columns)
    assert len(rank(run, RankConfig()).files) >= 4
    return run


def table_of(run: Run, folder: str) -> pd.DataFrame:
    places = [run / folder / name for name in (run / folder).names(".parquet")]
    return pa.concat_tables([read_parquet(place) for place in places]).to_pandas()


def check(run: Run, manifest: Manifest, expected: pd.DataFrame) -> None:
    selected = table_of(run, "selected")
    assert selected["rank"].tolist() == expected["rank"].tolist()
    assert selected["example_id"].tolist() == expected["example_id"].tolist()
    assert selected["prompt"].tolist() == [f"prompt {i}" for i in expected["example_id"]]
    assert manifest.counts["selected"] == len(expected)
    assert sum(group["selected"] for group in manifest.details["groups"]) == len(expected)
    assert {row["source"]: row["rows"] for row in manifest.details["sources"]} == dict(
        expected["source"].value_counts()
    )
    assert sum(row["tokens"] for row in manifest.details["sources"]) == expected["num_response_tokens"].sum()


def length_group(tokens: int) -> str:
    for first, end in [(0, 32), (32, 64), (64, 128), (128, 256), (256, 512)]:
        if tokens < end:
            return f"{first}-{end - 1}"
    return "512-"


def test_filters_leave_rows_out_before_the_rule_counts(run: Run) -> None:
    ranked = table_of(run, "ranked")
    kept = ranked[ranked["num_response_tokens"].between(50, 400)]
    manifest = select(
        run, RankConfig(), SelectConfig(top_fraction=0.5, min_response_tokens=50, max_response_tokens=400)
    )
    check(run, manifest, kept[: len(kept) // 2])
    assert manifest.counts["too_short"] == int((ranked["num_response_tokens"] < 50).sum())
    assert manifest.counts["too_long"] == int((ranked["num_response_tokens"] > 400).sum())
    assert manifest.counts["eligible"] == len(kept)


def test_of_duplicates_the_highest_ranked_stays(run: Run) -> None:
    ranked = table_of(run, "ranked")
    kept = ranked.drop_duplicates("content_hash", keep="first")
    assert 0 < len(kept) < ROWS - 20
    manifest = select(run, RankConfig(), SelectConfig(top_fraction=1.0, drop_duplicates=True))
    check(run, manifest, kept)
    assert manifest.counts["duplicates"] == ROWS - len(kept)
    written = pd.concat(
        [pq.read_table(run.folder.path + f"/{entry.name}").to_pandas() for entry in duplicates_of(manifest)]
    )
    assert sorted(written["rank"]) == ranked["rank"][ranked.duplicated("content_hash")].tolist()


def test_a_row_that_two_filters_leave_out_counts_for_the_first(run: Run) -> None:
    ranked = table_of(run, "ranked")
    duplicate, short = ranked.duplicated("content_hash"), ranked["num_response_tokens"] < 200
    assert (duplicate & short).any()
    manifest = select(run, RankConfig(), SelectConfig(top_k=20, drop_duplicates=True, min_response_tokens=200))
    assert manifest.counts["duplicates"] == duplicate.sum()
    assert manifest.counts["too_short"] == (short & ~duplicate).sum()
    assert manifest.counts["eligible"] == (~short & ~duplicate).sum()
    check(run, manifest, ranked[~short & ~duplicate][:20])


def test_a_duplicates_file_that_is_lost_or_damaged_is_noticed(run: Run) -> None:
    rule = SelectConfig(top_fraction=1.0, drop_duplicates=True)
    before = select(run, RankConfig(), rule)
    (first, *_) = duplicates_of(before)
    for spoil in (Path.unlink, flip):
        spoil(Path(run.folder.path, first.name))
        assert [line.partition(":")[0] for line in before.damage(run.folder)] == [first.name]
        assert select(run, RankConfig(), rule).content == before.content
        assert select(run, RankConfig(), rule).damage(run.folder) == []


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


def duplicates_of(manifest: Manifest) -> list[FileEntry]:
    found = [entry for entry in manifest.files if entry.name.startswith("duplicates/")]
    assert len(found) > 1
    return found


def test_no_duplicates_is_no_special_case(make_scores: MakeScores) -> None:
    run = make_scores(np.arange(60) / 60, content_hash=list(range(60)), source=["a"] * 60)
    rank(run, RankConfig())
    manifest = select(run, RankConfig(), SelectConfig(top_k=60, drop_duplicates=True))
    assert (manifest.counts["duplicates"], manifest.counts["selected"]) == (0, 60)


@pytest.mark.parametrize("balance", [["source"], ["length"], ["source", "length"]])
def test_a_balanced_selection_has_the_groups_of_the_pool(run: Run, balance: list[Any]) -> None:
    ranked = table_of(run, "ranked")
    labels = {"source": ranked["source"], "length": ranked["num_response_tokens"].map(length_group)}
    group = labels[balance[0]] if len(balance) == 1 else labels["source"] + "/" + labels["length"]
    manifest = select(run, RankConfig(), SelectConfig(top_k=80, balance=balance))
    taken = {row["group"]: row["selected"] for row in manifest.details["groups"]}
    pools = group.value_counts()
    assert sum(taken.values()) == 80
    assert all(abs(taken[name] - 80 * pools[name] / ROWS) < 1 for name in pools.index)
    best = pd.concat([ranked[group == name][: taken[name]] for name in pools.index]).sort_values("rank")
    check(run, manifest, best)


def test_quotas_are_rows_of_each_group(run: Run) -> None:
    ranked = table_of(run, "ranked")
    manifest = select(run, RankConfig(), SelectConfig(balance=["source"], quotas={"third": 7, "org/alpaca": 31}))
    expected = pd.concat(
        [ranked[ranked["source"] == "third"][:7], ranked[ranked["source"] == "org/alpaca"][:31]]
    ).sort_values("rank")
    check(run, manifest, expected)


@pytest.mark.parametrize("balance", [["source", "length"], ["length", "source"]])
def test_quotas_of_a_source_whose_name_has_a_slash(run: Run, balance: list[Any]) -> None:
    wanted = {"org/alpaca": 9, "gsm8k": 4}
    quotas = {"/".join({"source": name, "length": "128-255"}[by] for by in balance): n for name, n in wanted.items()}
    config = SelectConfig(balance=balance, quotas=quotas)
    RunConfig(sources=[Source(name=name, path="x", format="alpaca") for name in SOURCES], select=config)
    ranked = table_of(run, "ranked")
    ranked = ranked[ranked["num_response_tokens"].between(128, 255)]
    expected = pd.concat([ranked[ranked["source"] == name][:n] for name, n in wanted.items()]).sort_values("rank")
    check(run, select(run, RankConfig(), config), expected)


def test_tokens_are_shared_out_among_groups(run: Run) -> None:
    ranked = table_of(run, "ranked")
    manifest = select(run, RankConfig(), SelectConfig(top_tokens=20_000, balance=["source"]))
    parts = []
    for name, rows in ranked.groupby("source"):
        budget = 20_000 * rows["num_response_tokens"].sum() / ranked["num_response_tokens"].sum()
        parts.append(rows[rows["num_response_tokens"].cumsum() <= budget + 1])
        assert name in SOURCES
    check(run, manifest, pd.concat(parts).sort_values("rank"))


def test_a_floor_on_the_score_and_a_filter_go_together(run: Run) -> None:
    ranked = table_of(run, "ranked")
    manifest = select(run, RankConfig(), SelectConfig(min_score=0.6, max_response_tokens=300))
    check(run, manifest, ranked[(ranked["davir"] >= 0.6) & (ranked["num_response_tokens"] <= 300)])


@pytest.mark.slow
def test_lowest_and_random_orders_are_grouped_too(run: Run) -> None:
    for config in (RankConfig(lowest=True), RankConfig(order="random", seed=3), RankConfig(order="length")):
        rank(run, config)
        ranked = table_of(run, "ranked")
        manifest = select(run, config, SelectConfig(balance=["source"], quotas={"gsm8k": 20}))
        check(run, manifest, ranked[ranked["source"] == "gsm8k"][:20])


MIXTURE = SelectConfig(
    mixture=[
        Part(source="org/alpaca", top_fraction=0.25),
        Part(source="gsm8k", all=True, repeat=3),
        Part(source="third", top_tokens=2000),
    ],
    jsonl=True,
)


def test_a_mixture_takes_repeats_and_shuffles(run: Run) -> None:
    ranked = table_of(run, "ranked")
    alpaca, gsm8k, third = (ranked[ranked["source"] == name] for name in SOURCES)
    third = third[third["num_response_tokens"].cumsum() <= 2000]
    expected = pd.concat([alpaca[: len(alpaca) // 4], gsm8k, third]).sort_values("rank")
    manifest = select(run, RankConfig(), MIXTURE)
    check(run, manifest, expected)
    mixture = table_of(run, "mixture")
    repeats = expected["source"].map({"org/alpaca": 1, "gsm8k": 3, "third": 1})
    assert sorted(mixture["example_id"]) == sorted(expected["example_id"].repeat(repeats))
    assert len((run / "mixture").names()) > 1
    places = np.flatnonzero(mixture["source"] == "gsm8k")
    assert abs(places.mean() / len(mixture) - 0.5) < 0.15, "one source stands at one end"
    ids = mixture["example_id"].to_numpy()
    assert (ids[1:] == ids[:-1]).mean() < 0.05, "copies of a row stand together"
    assert {row["source"]: row["repeat"] for row in manifest.details["sources"]} == {
        "org/alpaca": 1,
        "gsm8k": 3,
        "third": 1,
    }
    lines = [
        json.loads(line)
        for name in (run / "jsonl").names()
        for line in (run / "jsonl" / name).read_bytes().decode().splitlines()
    ]
    assert [line["n"] for line in lines] == mixture["example_id"].tolist()
    assert lines[0]["text"] == "a\nü"


@pytest.mark.slow
def test_a_mixture_again_is_the_same_bytes_and_another_seed_another_order(make_scores: MakeScores) -> None:
    found = []
    for name, shards, seed in [("one", 3, 0), ("two", 7, 0), ("three", 3, 1)]:
        run = make_scores(
            np.arange(90) % 10 / 10,
            name=name,
            num_shards=shards,
            source=["alpaca", "gsm8k", "third"] * 30,
            record=["{}"] * 90,
        )
        rank(run, RankConfig())
        parts = [Part(source="alpaca", all=True, repeat=2), Part(source="gsm8k", top_k=20)]
        select(run, RankConfig(), SelectConfig(mixture=parts, shuffle_seed=seed))
        found.append(table_of(run, "mixture"))
    pd.testing.assert_frame_equal(found[0], found[1])
    assert found[0]["example_id"].tolist() != found[2]["example_id"].tolist()
    assert sorted(found[0]["example_id"]) == sorted(found[2]["example_id"])


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (SelectConfig(balance=["source"], quotas={"third": 200}), r"quotas of 'third' is 200, but only \d+ rows"),
        (SelectConfig(balance=["source"], quotas={"nobody": 1}), "quotas of 'nobody' is 1, but only 0"),
        (SelectConfig(mixture=[Part(source="nobody", all=True)]), "no row of this source"),
        (SelectConfig(mixture=[Part(source="third", top_k=200)]), r"top_k is 200, but only \d+"),
        (SelectConfig(top_k=240, drop_duplicates=True), r"top_k is 240, but only \d+ rows may be selected"),
        (SelectConfig(top_k=1, min_response_tokens=10**6), "leaves no row"),
    ],
)
def test_more_than_there_is_is_refused(run: Run, config: SelectConfig, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        select(run, RankConfig(), config)
    assert run.manifest("select") is None


def test_a_ranking_of_the_first_ranks_selects_what_the_whole_one_does(run: Run) -> None:
    ranked = table_of(run, "ranked")
    manifest = rank(run, RankConfig(most=50))
    assert (manifest.counts["ranked"], manifest.counts["rankable"]) == (50, ROWS)
    pd.testing.assert_frame_equal(table_of(run, "ranked"), ranked[:50])
    check(run, select(run, RankConfig(most=50), SelectConfig(top_k=33)), ranked[:33])


def test_ranks_that_end_where_a_bin_ends_leave_no_file_without_rows(run: Run) -> None:
    rows_by_bin = run.require("rank").details["rows_by_bin"]
    manifest = rank(run, RankConfig(most=sum(rows_by_bin[:2])))
    assert [entry.rows for entry in manifest.files] == rows_by_bin[:2]
    assert select(run, RankConfig(), SelectConfig(top_k=9, drop_duplicates=True)).counts["selected"] == 9


def test_selected_and_ranked_load_with_other_tools(run: Run) -> None:
    manifest = select(run, RankConfig(), SelectConfig(top_k=100))
    for folder, rows in {"selected": 100, "ranked": ROWS}.items():
        path = f"{run}/{folder}"
        expected = table_of(run, folder)["example_id"].tolist()
        assert pd.read_parquet(path)["example_id"].tolist() == expected
        assert polars.read_parquet(f"{path}/*.parquet")["example_id"].to_list() == expected
        found = duckdb.sql(f"select example_id from '{path}/*.parquet' order by rank").fetchall()
        assert [row[0] for row in found] == expected
        loaded = datasets.load_dataset("parquet", data_dir=path, split="train", cache_dir=f"{run}/cache-{folder}")
        assert loaded["example_id"][:] == expected
        assert len(expected) == rows
    assert manifest.counts["selected"] == 100
