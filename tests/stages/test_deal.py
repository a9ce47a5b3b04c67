"""Rows are dealt by components of copies: the same partition as a plain loop over all pairs of texts finds."""

import json
import random
from collections import Counter, defaultdict
from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from davir_ray.config.prepare import PrepareConfig
from davir_ray.config.sources import Source
from davir_ray.engine.shards import Shards, read_columns
from davir_ray.errors import DataError, OutputError
from davir_ray.formulas.components import Strength
from davir_ray.models.checkpoint import Checkpoint
from davir_ray.run.files import FileEntry, read_parquet
from davir_ray.run.folder import Run
from davir_ray.run.manifest import Manifest
from davir_ray.schema import EXAMPLES, FOLDED_EXAMPLES
from davir_ray.stages import components as components_module
from davir_ray.stages import deal as deal_module
from davir_ray.stages import joins as joins_module
from davir_ray.stages.components import Labeller
from davir_ray.stages.deal import Dealing, in_groups
from davir_ray.stages.folds import ANCHOR, FOLDS, Folds
from davir_ray.stages.joins import Texts, join_equal, join_near, write_keys
from davir_ray.stages.prepare import TASKS, Preparation, prepare

pytestmark = pytest.mark.usefixtures("ray_session")

WORDS = [
    f"{first}{last}" for first in ("bar", "lom", "tig", "sev", "run", "ol") for last in ("a", "en", "is", "ut", "o")
]
NUM_ROWS = 300


def planted() -> list[dict[str, str]]:
    """Rows among which some are exact copies, near copies, chains of near copies, and some share a prompt or answer."""
    draw = random.Random(7)

    def text(length: int) -> list[str]:
        return [f"{draw.choice(WORDS)}{draw.randrange(50)}" for _ in range(length)]

    rows = [(text(draw.randint(6, 12)), text(draw.choice([3, 8, 40, 60]))) for _ in range(200)]
    for number in range(20):
        rows.append(rows[number])  # exact
        prompt, response = rows[20 + number]
        rows.append((prompt, [*response[:-1], "other"] if number % 2 else response[:-2]))  # near, if long
        rows.append((rows[40 + number][0], text(30)))  # the same prompt
        rows.append((text(8), rows[60 + number][1]))  # the same response, long or not
    prompt, response = text(8), text(60)
    for _ in range(NUM_ROWS - len(rows)):  # each is near the one before it
        at = draw.randrange(len(response) - 2)
        response = [*response[:at], *text(1), *response[at + 1 :]]
        rows.append((prompt[:-1] + text(1), response))
    draw.shuffle(rows)
    return [
        {"prompt": " ".join(prompt).capitalize() + "?", "response": " ".join(response) + "." * (number % 3)}
        for number, (prompt, response) in enumerate(rows)
    ]


def words_of(text: str) -> list[str]:
    return text.lower().replace("?", "").replace(".", "").split()


def grams(row: Any) -> set[tuple[str, ...]]:
    words = words_of(row.prompt) + words_of(row.response)
    return {tuple(words[at : at + 5]) for at in range(max(1, len(words) - 4))}


def jaccard(one: set[Any], other: set[Any]) -> float:
    return len(one & other) / len(one | other)


def partition(examples: pd.DataFrame, *, near_only: bool = False, threshold: float = 0.7) -> dict[int, int]:
    """The smallest id of each row's component, by all pairs of rows."""
    rows = list(examples.itertuples())
    sets, pairs = [grams(row) for row in rows], []
    for (i, one), (j, other) in combinations(enumerate(rows), 2):
        same_prompt = words_of(one.prompt) == words_of(other.prompt)
        is_long = min(one.num_response_tokens, other.num_response_tokens) >= 20
        same_response = is_long and words_of(one.response) == words_of(other.response)
        if (not near_only and (same_prompt or same_response)) or jaccard(sets[i], sets[j]) >= threshold:
            pairs.append((i, j))
    ends = np.array(pairs).T
    _, found = connected_components(coo_array((np.ones(len(pairs)), ends), shape=(len(rows),) * 2), directed=False)
    ids = examples.example_id.to_numpy()
    smallest = {number: int(ids[found == number].min()) for number in set(found.tolist())}
    return {int(row): smallest[number] for row, number in zip(ids, found.tolist(), strict=True)}


class Prepared(NamedTuple):
    run: Run
    manifest: Manifest

    @property
    def folds(self) -> Folds:
        found = Folds.of(self.manifest)
        assert found is not None
        return found

    def examples(self, *files: str) -> pd.DataFrame:
        names = files or [entry.name for entry in self.manifest.files_in("examples")]
        tables = [read_parquet(self.run / "examples" / name).to_pandas().assign(file=name) for name in names]
        return pd.concat(tables, ignore_index=True)


class Maker:
    """Prepares rows under settings."""

    def __init__(self, folder: Path, base: Path) -> None:
        self.folder, self.base, self.number = folder, base, 0

    def __call__(
        self, rows: list[dict[str, Any]] | dict[str, list[dict[str, Any]]], *, run: Run | None = None, **options: Any
    ) -> Prepared:
        self.number += 1
        by_source = rows if isinstance(rows, dict) else {"s": rows}
        sources = []
        for name, records in by_source.items():
            (folder := self.folder / name).mkdir(exist_ok=True)
            (folder / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
            sources.append(Source(name=name, path=str(folder), format="prompt_response"))
        config = PrepareConfig(**{"max_tokens": 1024, "shard_rows": 40, **options})
        run = run or Run.at(self.folder / f"run-{self.number}")
        preparation = Preparation(base=Checkpoint.find(str(self.base)), config=config)
        return Prepared(run, prepare(run, sources, preparation, max_bad_fraction=0))


@pytest.fixture
def make(tmp_path: Path, base_folder: Path) -> Maker:
    return Maker(tmp_path, base_folder)


def labels_of(prepared: Prepared, scratch: str, *, strengths: tuple[Strength, ...] = tuple(Strength)) -> dict[int, int]:
    """The component of each row by the steps of the dealing, without a cut."""
    files = prepared.manifest.files_in("examples")
    source = Source(name="s", path="unused", format="prompt_response")
    texts = Texts(sources=[source], options=PrepareConfig(), needs_text=True)
    place, num_rows = prepared.run / scratch, sum(entry.rows for entry in files)
    keys, counted = write_keys(
        place, Shards(files, partial(read_columns, prepared.run / "examples", texts.columns)), texts
    )
    assert counted == {"not_read": 0, "grouped": 0}
    equal = join_equal(place, keys, num_rows, ["prompt", "response", "copy"], num_rows)
    edges = [*equal.edges, *join_near(place, keys, num_rows)]
    found = Labeller(scratch=place, folder="labels", strengths=strengths, max_rows=num_rows).label(edges)
    labels = {int(row): int(row) for row in prepared.examples().example_id}
    for entry in found.labels:
        table = read_parquet(place / entry.name)
        labels |= dict(zip(table["id"].to_pylist(), table["label"].to_pylist(), strict=True))
    return labels


SMALL_PARTS = {(joins_module, "ROWS_PER_PART"): 50, (joins_module, "_TEXTS_PER_PART"): 30}
BY_SHUFFLE = {**SMALL_PARTS, (components_module, "EDGES_OF_A_TASK"): 0, (components_module, "ROWS_PER_PART"): 40}


@pytest.mark.parametrize(("shard_rows", "patches"), [(300, {}), (70, SMALL_PARTS), (13, BY_SHUFFLE)])
def test_components_are_those_of_all_pairs_of_texts(
    shard_rows: int, patches: dict[tuple[Any, str], int], make: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    for (module, name), value in patches.items():
        monkeypatch.setattr(module, name, value)
    prepared = make(planted(), shard_rows=shard_rows)
    expected = partition(prepared.examples())
    assert 40 < sum(row != label for row, label in expected.items()) < 200
    assert max(Counter(expected.values()).values()) >= 20, "a chain"
    assert labels_of(prepared, "all") == expected
    near = (Strength.NEAR, Strength.NEARER, Strength.NEAREST, Strength.COPY)
    assert labels_of(prepared, "near", strengths=near) == partition(prepared.examples(), near_only=True)


def check_folds(prepared: Prepared, num_folds: int, num_rows: int = NUM_ROWS) -> pd.DataFrame:
    """Each file has rows of the fold that the manifest says, every row is there once; returns the rows."""
    rows, folds = prepared.examples(), prepared.folds
    assert len(rows) == rows.example_id.nunique() == num_rows == prepared.manifest.counts["prepared"]
    assert folds.num_folds == num_folds
    assert (rows.fold == rows.file.map(folds.of_file)).all()
    for fold in range(num_folds):
        inside, outside = (
            {entry.name for entry in files(prepared.manifest, fold)} for files in (folds.files, folds.files_outside)
        )
        assert inside == set(rows.file[rows.fold == fold])
        assert outside == set(rows.file[(rows.fold != fold) & (rows.fold != ANCHOR)])
        assert inside
    counted = prepared.manifest.details[FOLDS]["rows"]
    assert counted == {str(fold): int((rows.fold == fold).sum()) for fold in sorted(set(rows.fold))}
    schema = pq.read_schema(prepared.run.folder.path + "/examples/" + rows.file[0])
    assert [*schema][:14] == [*FOLDED_EXAMPLES]
    assert not (prepared.run / TASKS).entries()
    return rows


def folds_of(rows: pd.DataFrame) -> dict[int, int]:
    return dict(zip(rows.example_id.tolist(), rows.fold.tolist(), strict=True))


def check_whole(rows: pd.DataFrame, labels: dict[int, int]) -> None:
    """No component is in two folds."""
    by_label = defaultdict(set)
    for row, fold in folds_of(rows).items():
        by_label[labels[row]].add(fold)
    assert {len(folds) for folds in by_label.values()} == {1}


@pytest.mark.slow
def test_no_component_is_in_two_folds_and_strata_are_dealt_evenly(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = planted()
    by_source = {"s": rows[:200], "t": rows[200:]}
    first = make(by_source, folds=3)
    found = check_folds(first, 3)
    labels = partition(found)
    sizes = Counter(labels.values())
    monkeypatch.setattr(deal_module, "_NEVER_CUT", NUM_ROWS)
    whole = check_folds(make(by_source, folds=3), 3)
    check_whole(whole, labels)
    details = make(by_source, folds=3).manifest.details[FOLDS]
    assert details["components"] == len(sizes)
    assert details["components_of_several"] == sum(size > 1 for size in sizes.values())
    assert details["largest_component"] == max(sizes.values()) >= 20
    assert (details["cut"], details["too_large"], details["prompts_not_joined"]) == (0, 0, 0)
    bits = whole.num_response_tokens.map(int.bit_length)
    per_stratum = whole.groupby([whole.source, bits]).fold.value_counts().unstack(fill_value=0)
    single = whole.example_id.map(lambda row: sizes[labels[row]] == 1).groupby([whole.source, bits]).sum()
    spread = per_stratum.max(axis=1) - per_stratum.min(axis=1)
    assert (single > 10).any()
    assert spread[single > 10].max() <= 1
    assert np.ptp(whole.fold.value_counts()) <= 4

    # The chain has more than a tenth of a fold: only stronger edges are left of it, and all other components stay.
    limit = max(10, NUM_ROWS / 30)
    strong = partition(found, threshold=0.9)
    assert first.manifest.details[FOLDS]["cut"] == 1
    check_whole(found, {row: strong[row] if sizes[label] > limit else label for row, label in labels.items()})
    chain = [row for row, label in labels.items() if sizes[label] > limit]
    assert len({folds_of(found)[row] for row in chain}) == 3


@pytest.mark.slow
def test_folds_do_not_depend_on_shards_parts_or_the_way_components_are_found(
    make: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = planted()
    first = folds_of(check_folds(make(rows, folds=2, shard_rows=300), 2))
    assert folds_of(check_folds(make(rows, folds=2, shard_rows=7), 2)) == first
    for (module, name), value in BY_SHUFFLE.items():
        monkeypatch.setattr(module, name, value)
    assert folds_of(check_folds(make(rows, folds=2, shard_rows=40), 2)) == first
    other = check_folds(make(rows, folds=2, max_tokens=1000), 2)
    assert folds_of(other) == first


@pytest.mark.slow
def test_folds_of_many_parts_are_even_and_whole(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    """With large components dealt first; parts do not know of each other, and each may be off by a row of a stratum."""
    monkeypatch.setattr(deal_module, "_NEVER_CUT", NUM_ROWS)
    monkeypatch.setattr(deal_module, "ROWS_PER_PART", 60)
    monkeypatch.setattr(deal_module, "_LARGE_ROWS", 5)
    found = check_folds(make(planted(), folds=2), 2)
    check_whole(found, partition(found))
    assert np.ptp(found.fold.value_counts()) <= 25


@pytest.mark.slow
def test_an_anchor_is_in_no_fold(make: Maker) -> None:
    prepared = make(planted(), folds=2, anchor=0.2)
    found = check_folds(prepared, 2)
    rows = found.fold.value_counts()
    assert abs(rows[ANCHOR] - 60) <= 5
    assert abs(rows[0] - rows[1]) <= 5
    assert {entry.name for entry in prepared.folds.files(prepared.manifest, ANCHOR)} == set(
        found.file[found.fold == ANCHOR]
    )


@pytest.mark.slow
def test_another_seed_deals_the_same_rows_to_other_folds(make: Maker) -> None:
    prepared = make(planted(), folds=2)
    first, other = (check_folds(found, 2) for found in (prepared, make(planted(), folds=2, fold_seed=1)))
    both = first.merge(other, on=["example_id", "content_hash", "prompt", "response"])
    assert len(both) == len(first) == len(other)
    assert 0.4 < (both.fold_x == both.fold_y).mean() < 0.6
    assert other.groupby("prompt").fold.nunique().eq(1).all()
    with pytest.raises(OutputError, match=r"prepare differs in folds\.seed: null → 1"):
        make(planted(), folds=2, fold_seed=1, run=prepared.run)


@pytest.mark.slow
def test_equal_prompts_of_too_many_rows_join_none_and_that_is_counted(
    make: Maker, caplog: pytest.LogCaptureFixture
) -> None:
    rows = planted()
    long = " ".join(f"{word}0" for word in WORDS[:25])
    many = [{"prompt": "Continue.", "response": row["response"]} for row in rows[:50]]
    same = [{"prompt": row["prompt"] + f" {number}", "response": long} for number, row in enumerate(rows[50:100])]
    prepared = make([*many, *same, *rows[100:]], folds=2)
    details = prepared.manifest.details[FOLDS]
    assert (details["prompts_not_joined"], details["responses_not_joined"]) == (1, 1)
    assert "1 prompts are those of more than 15 rows each" in caplog.text
    found = check_folds(prepared, 2)
    for chosen in (found.prompt == "Continue.", found.response == long):
        assert set(found.fold[chosen]) == {0, 1}


@pytest.mark.slow
def test_rows_of_the_same_value_of_a_column_share_a_fold(make: Maker) -> None:
    draw = random.Random(1)
    rows: list[dict[str, Any]] = [{**row, "user": draw.choice([*range(40), None])} for row in planted()]
    prepared = make(rows, folds=3, fold_by="user")
    found = check_folds(prepared, 3)
    user = found.record.map(lambda record: json.loads(record)["user"])
    assert set(found.fold.groupby(user).nunique()) == {1}
    assert found.fold_key.isna().equals(user.isna())
    assert found.fold_key.groupby(user).nunique().eq(1).all()
    assert found.fold_key.nunique() == 40
    assert prepared.manifest.details[FOLDS]["components"] == 40 + user.isna().sum()
    without = make(rows, folds=3, fold_by="user", run=prepared.run)
    assert without.manifest == prepared.manifest, "complete: skipped"
    with pytest.raises(OutputError, match=r"prepare differs in folds\.by"):
        make(rows, folds=3, run=prepared.run)
    with pytest.raises(DataError, match=r"fold \d of 2 has no rows: there are 1 values of the column 'user'"):
        make([{**row, "user": 1} for row in rows], folds=2, fold_by="user")
    with pytest.raises(DataError, match=r"no row has a value in that column; correct the name"):
        make(rows, folds=2, fold_by="usr")
    with pytest.raises(DataError, match=r"prepare.anchor is 1e-06, which is no row of \d+; give more"):
        make(rows, folds=2, anchor=1e-6)


@pytest.mark.slow
def test_a_value_of_a_column_is_the_same_whatever_its_type(make: Maker) -> None:
    """As files of one corpus have it: integers, floats beside missing ones, text; an empty cell is no value."""
    values: list[Any] = [7, 7.0, "7", 8, "8", "", "", None, None, "x", "x"]
    rows = [{**row, "user": value} for row, value in zip(planted(), values, strict=False)]
    prepared = make(rows, folds=2, fold_by="user")
    found = prepared.examples()
    users = found.record.map(lambda record: str(json.loads(record)["user"] or "").removesuffix(".0"))
    assert found.fold_key[users != ""].groupby(users).nunique().eq(1).all()
    assert found.fold_key.nunique() == 3
    assert found.fold_key[users == ""].isna().all()
    assert prepared.manifest.details[FOLDS]["components"] == 3 + 4


@pytest.mark.slow
def test_a_chain_that_only_its_weakest_copies_join_is_cut_by_the_shuffle_too(
    make: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is left of it at the next threshold."""
    words = [f"w{number}" for number in range(400)]
    chain = [{"prompt": f"p{row}", "response": " ".join(words[6 * row : 6 * row + 60])} for row in range(30)]
    rows = chain + [{"prompt": f"q{row}", "response": f"answer {row}"} for row in range(60)]
    found = []
    for patches in ({}, BY_SHUFFLE):
        for (module, name), value in patches.items():
            monkeypatch.setattr(module, name, value)
        details = make(rows, folds=2).manifest.details[FOLDS]
        assert details["cut"] == 1
        found.append({name: value for name, value in details.items() if name != "of_file"})
    assert found[0] == found[1]


@pytest.mark.slow
@pytest.mark.parametrize("folds", [1, 2])
def test_of_near_duplicates_the_row_with_the_smallest_id_is_kept(folds: int, make: Maker) -> None:
    rows = planted()
    by_source = {"s": rows[:200], "t": rows[200:]}
    every = make(by_source)
    before = every.examples()
    labels = partition(before, near_only=True)
    size = Counter(labels.values())
    # The chain is larger than a tenth of all rows at none of the bounds; see the test of the cut.
    assert max(size.values()) <= NUM_ROWS / 10
    prepared = make(by_source, near_duplicates="drop", folds=folds)
    found, counts = prepared.examples(), prepared.manifest.counts
    assert set(found.example_id) == set(labels.values())
    assert counts["near_duplicates"] == NUM_ROWS - len(found) > 30
    assert counts["read"] == counts["prepared"] + counts["near_duplicates"]
    kept = before[before.example_id.isin(found.example_id)]
    sources = prepared.manifest.details["by_source"]
    for name in ("num_prompt_tokens", "num_response_tokens"):
        assert counts[name] == kept[name].sum()
        assert {source: said[name] for source, said in sources.items()} == kept.groupby("source")[name].sum().to_dict()
    assert {source: said["prepared"] for source, said in sources.items()} == kept.source.value_counts().to_dict()
    lost = before[~before.example_id.isin(found.example_id)].source.value_counts().to_dict()
    assert {source: said["near_duplicates"] for source, said in sources.items()} == lost
    columns = EXAMPLES.names
    pd.testing.assert_frame_equal(
        found[columns].sort_values("example_id", ignore_index=True),
        kept[columns].sort_values("example_id", ignore_index=True),
    )
    if folds == 1:
        assert Folds.of(prepared.manifest) is None
        assert list(found.columns) == [*columns, "file"]
    else:
        check_folds(prepared, 2, len(found))


@pytest.mark.slow
def test_a_run_without_folds_is_as_it_was(make: Maker) -> None:
    prepared = make(planted())
    assert Folds.of(prepared.manifest) is None
    assert not {"folds", "near_duplicates", "deal_version"} & prepared.manifest.fingerprint.keys()
    assert list(prepared.examples().columns) == [*EXAMPLES.names, "file"]
    assert "near_duplicates" not in prepared.manifest.counts


@pytest.mark.slow
def test_a_dealing_that_was_stopped_is_done_again(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = planted()
    run = Run.at(make.folder / "stopped")
    with monkeypatch.context() as patch:
        patch.setattr(Dealing, "_summed", stop)
        with pytest.raises(KeyboardInterrupt):
            make(rows, folds=2, run=run)
    assert run.manifest("prepare") is None
    assert (run / "examples").names()
    (run / "examples" / "left.parquet").write_bytes(b"of an attempt with other files")
    with monkeypatch.context() as patch:
        patch.setattr("davir_ray.stages.prepare._prepare_task", None)  # its tasks are done
        prepared = make(rows, folds=2, run=run)
    assert folds_of(check_folds(prepared, 2)) == folds_of(check_folds(make(rows, folds=2), 2))
    assert set((run / "examples").names()) == prepared.folds.of_file.keys()


def stop(*arguments: Any) -> None:
    raise KeyboardInterrupt


def test_a_group_has_shards_of_one_source_and_one_less_than_folds() -> None:
    entry = FileEntry(name="a", rows=1, bytes=1, sha256="")
    shards = {source: [replace(entry, name=f"{source}{number}") for number in range(5)] for source in "st"}
    groups = in_groups(shards, PrepareConfig(folds=4))
    assert [(group.source, [shard.name[1] for shard in group.shards]) for group in groups] == [
        (source, numbers) for source in "st" for numbers in (["0", "1", "2"], ["3", "4"])
    ]
