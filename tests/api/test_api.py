"""The Python API: the jobs' scores beside the user's own rows, an exact order, the same cuts; Ray Data and datasets."""

import hashlib
import inspect
import json
import shutil
import textwrap
import uuid
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import ray.data
from transformers import AutoTokenizer

import davir_ray
from davir_ray import api
from davir_ray.api import ranking as row_ranking
from davir_ray.api import scoring as row_scoring
from davir_ray.api import selection as row_selection
from davir_ray.api.scoring import ScoreRows
from davir_ray.config.prepare import PrepareConfig
from davir_ray.config.scoring import ScoreConfig
from davir_ray.config.sources import Source
from davir_ray.errors import ConfigError, DataError, ModelError
from davir_ray.models.checkpoint import Checkpoint
from davir_ray.run.files import read_parquet
from davir_ray.run.folder import Run
from davir_ray.stages import prepare as prepare_stage
from davir_ray.stages import score as scoring

pytestmark = pytest.mark.usefixtures("ray_session")

ONE_ACTOR = ScoreConfig(num_actors=1, precision="float32")
SCORE_COLUMNS = [
    "content_hash", "num_prompt_tokens", "num_response_tokens", "truncated",
    "base_nll", "reference_nll", "davir", "rho_sum", "rho_mean", "status",
]  # fmt: skip
BAD = {
    "no response": ({"prompt": "p", "response": None}, "missing_column"),
    "blank": ({"prompt": "p", "response": "  "}, "empty_response"),
    "long": ({"prompt": "word " * 400, "response": "r"}, "prompt_too_long"),
}


def plain_rows(data_folder: Path, num_rows: int) -> list[dict[str, Any]]:
    table = pd.read_json(data_folder / "alpaca_9k.jsonl.gz", lines=True, nrows=num_rows)
    return [
        {"mine": i, "prompt": row.instruction, "response": row.output, "tags": ["a"] * (i % 3)}
        for i, row in enumerate(table.itertuples())
    ]


@pytest.fixture(scope="module")
def rows(data_folder: Path) -> list[dict[str, Any]]:
    """Real rows with bad ones among them."""
    rows = plain_rows(data_folder, 40)
    for at, (bad, _) in zip((0, 17, 43), BAD.values(), strict=True):
        rows.insert(at, {"mine": 100 + at, **bad, "tags": []})
    return rows


@pytest.fixture(scope="module")
def models(base_folder: Path, reference_folder: Path) -> dict[str, Any]:
    return {"base": str(base_folder), "reference": str(reference_folder), "max_tokens": 256}


@pytest.fixture(scope="module")
def scored(rows: list[dict[str, Any]], models: dict[str, Any], ray_session: None) -> ray.data.Dataset:
    dataset = ray.data.from_items(rows, override_num_blocks=1)
    return davir_ray.score(dataset, **models, config=ONE_ACTOR, keep_token_nll=True).materialize()


def frame(dataset: ray.data.Dataset) -> pd.DataFrame:
    return pa.concat_tables(table for table in ray.get(dataset.to_arrow_refs()) if table.num_rows).to_pandas()


def by_row(dataset: ray.data.Dataset) -> dict[int, dict[str, Any]]:
    return {row["mine"]: row for table in ray.get(dataset.to_arrow_refs()) for row in table.to_pylist()}


# --- score -----------------------------------------------------------------------------------------------------------


def test_every_row_comes_back_once_with_its_columns_and_bad_ones_with_their_reason(
    scored: ray.data.Dataset, rows: list[dict[str, Any]]
) -> None:
    found = by_row(scored)
    token_losses = ["base_token_nll", "reference_token_nll"]
    assert scored.schema().names == [*rows[0], *SCORE_COLUMNS, *token_losses]
    assert scored.count() == len(found) == len(rows)
    for row in rows:
        assert {name: found[row["mine"]][name] for name in row} == row
    for at, (_, reason) in zip((0, 17, 43), BAD.values(), strict=True):
        bad = found.pop(100 + at)
        assert bad["status"] == reason
        assert {bad[name] for name in [*SCORE_COLUMNS[:-1], *token_losses]} == {None}
    for good in found.values():
        assert good["status"] == "ok"
        assert len(good["base_token_nll"]) == good["num_response_tokens"]
        assert np.sum(good["base_token_nll"], dtype=np.float64) == good["base_nll"]


def test_scores_have_the_bits_of_the_job(
    scored: ray.data.Dataset, rows: list[dict[str, Any]], models: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    run, base = Run.at(tmp_path / "run"), Checkpoint.find(models["base"])
    preparation = prepare_stage.Preparation(base=base, config=PrepareConfig(max_tokens=256))
    source = Source(name="mine", path=str(tmp_path / "rows.jsonl"), format="prompt_response")
    prepare_stage.prepare(run, [source], preparation, max_bad_fraction=1)
    scoring.score(run, base, Checkpoint.find(models["reference"]), ONE_ACTOR)
    ours, compared = by_row(scored), 0
    for name in (run / "scores").names():
        examples, scores = (read_parquet(run / folder / name).to_pylist() for folder in ("examples", "scores"))
        for example, score in zip(examples, scores, strict=True):
            row = ours[json.loads(example["record"])["mine"]]
            assert {name: row[name] for name in SCORE_COLUMNS} == {name: score[name] for name in SCORE_COLUMNS}
            compared += 1
    assert compared == 40


@pytest.mark.slow
def test_datasets_go_in_and_come_out_in_their_order(
    scored: ray.data.Dataset, rows: list[dict[str, Any]], models: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_scoring, "BLOCK_ROWS", 10)
    features = datasets.Features(
        mine=datasets.Value("int16"), prompt=datasets.Value("string"), response=datasets.Value("large_string"),
        tags=datasets.List(datasets.ClassLabel(names=["a"])),
    )  # fmt: skip
    labelled = [{**row, "tags": [0] * len(row["tags"])} for row in rows]
    dataset = datasets.Dataset.from_list(labelled, features=features).shuffle(seed=3)
    found = davir_ray.score(dataset, **models, config=ScoreConfig(num_actors=2, precision="float32"))
    assert {name: found.features[name] for name in features} == features
    assert found.column_names == [*features, *SCORE_COLUMNS]
    assert found.remove_columns(SCORE_COLUMNS).to_list() == dataset.to_list()
    expected = frame(scored).set_index("mine").loc[dataset["mine"]]
    np.testing.assert_allclose(np.array(found["base_nll"], float), expected["base_nll"].to_numpy(float), rtol=1e-6)
    assert found["status"] == expected["status"].tolist()
    ranked = davir_ray.rank(found)
    assert ranked.column_names == [*features, *SCORE_COLUMNS, "rank"]
    assert ranked["rank"] == list(range(1, 41))
    assert ranked["davir"] == sorted(ranked["davir"], reverse=True)
    assert {name: ranked.features[name] for name in features} == features
    best = davir_ray.select(ranked, top_fraction=0.29)
    assert best["mine"] == ranked["mine"][:11]


@pytest.mark.slow
def test_messages_that_datasets_keeps_as_json_are_messages(models: dict[str, Any]) -> None:
    """Tool calls have no one type. Every row has the text that the messages have."""
    template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }};{{ m.calls | tojson if m.calls else '' }}{% endfor %}"
    )
    talks = [
        [{"role": "user", "content": f"q{i}", **more}, {"role": "assistant", "content": f"a{i}"}]
        for i, more in enumerate([{}, {"calls": [{"x": [1, "a"]}]}, {"calls": {"city": "Oslo"}}])
    ]
    dataset = datasets.Dataset.from_dict({"messages": talks}, on_mixed_types="use_json")
    assert "Json" in str(dataset.features)
    options = {**models, "format": "messages", "chat_template": "\ufeff" + template, "config": ONE_ACTOR}
    found = davir_ray.score(dataset, **options)
    assert found["status"] == ["ok"] * 3
    expected = [
        json.dumps([f"user:q{i};{calls}", f"a{i}"])
        for i, calls in enumerate(["", '[{"x": [1, "a"]}]', '{"city": "Oslo"}'])
    ]
    hashes = [int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1 for text in expected]
    assert found["content_hash"] == hashes


@pytest.mark.slow
def test_five_lines_of_the_docstring(rows: list[dict[str, Any]], models: dict[str, Any], tmp_path: Path) -> None:
    source, written = tmp_path / "instructions.jsonl", tmp_path / "best"
    source.write_text("\n".join(json.dumps(row) for row in rows))
    doc = (api.__doc__ or "").split("\n\n")
    lines = textwrap.dedent(next(part for part in doc if "import davir_ray" in part))
    assert len(lines.splitlines()) == 5
    places = {"instructions.jsonl": source, "best": written}
    places |= {"org/model-finetuned": models["reference"], "org/model": models["base"]}
    for told, place in places.items():
        lines = lines.replace(f'"{told}"', repr(str(place)))
    exec(lines, {})
    best = pd.concat(map(pd.read_parquet, sorted(written.glob("*.parquet"))))
    assert best["rank"].tolist() == [1, 2]
    assert best["davir"].is_monotonic_decreasing
    assert {"mine", "tags", *SCORE_COLUMNS} <= set(best)


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"format": "alpaca"}, ConfigError, "needs the column 'instruction'.*has mine, prompt, response"),
        ({"format": "parquet"}, ConfigError, "format is 'parquet'"),
        ({"response_column": "answer"}, ConfigError, "needs the column 'answer'"),
        ({"max_tokens": 4096}, ConfigError, "has 1024 positions"),
        ({"base": "/nowhere"}, ModelError, "is not a folder"),
        ({"config": ScoreConfig(num_actors=99)}, Exception, "do not fit"),
        ({"format": "messages", "messages_column": "tags"}, ModelError, "no chat template"),
    ],
)
def test_mistakes_are_told_by_the_call(
    models: dict[str, Any], options: dict[str, Any], error: type[Exception], told: str
) -> None:
    dataset = ray.data.from_items([{"mine": 1, "prompt": "p", "response": "r"}])
    with pytest.raises(error, match=told):
        davir_ray.score(dataset, **(models | options))


@pytest.mark.parametrize("role", ["base", "reference"])
def test_a_token_without_an_embedding_is_told_by_the_call(models: dict[str, Any], tmp_path: Path, role: str) -> None:
    folder = shutil.copytree(models[role], tmp_path / role)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.save_pretrained(folder)
    dataset = ray.data.from_items([{"prompt": "p", "response": "r"}])
    with pytest.raises(ModelError, match=rf"{role} has the token '<.im_start.>' with the id 1024.*has 1024 embedding"):
        davir_ray.score(dataset, **(models | {role: str(folder)}))


def test_a_name_that_is_taken_is_refused(models: dict[str, Any]) -> None:
    taken = {"prompt": ["p"], "response": ["r"], "davir": [0.5]}
    for dataset in (ray.data.from_arrow(pa.table(taken)), datasets.Dataset.from_dict(taken)):
        with pytest.raises(ConfigError, match="a column 'davir' already"):
            davir_ray.score(dataset, **models)


def test_other_things_than_datasets_are_refused(models: dict[str, Any]) -> None:
    for thing in ([{"prompt": "p"}], datasets.DatasetDict()):
        with pytest.raises(ConfigError, match=r"must be a ray.data.Dataset or a datasets.Dataset"):
            davir_ray.score(thing, **models)


def test_a_large_block_is_cut(models: dict[str, Any]) -> None:
    one = ray.data.from_arrow(pa.table({"prompt": ["p"] * 2500, "response": ["r"] * 2500}))
    sizes = [
        row["rows"]
        for row in one.repartition(target_num_rows_per_block=row_scoring.BLOCK_ROWS)
        .map_batches(lambda block: pa.table({"rows": [block.num_rows]}), batch_size=None, batch_format="pyarrow")
        .take_all()
    ]
    assert sorted(sizes) == [452, 1024, 1024]


# --- every argument -------------------------------------------------------------------------------------------------

CHAT = (
    "{{% for turn in messages %}}{{{{ turn['role'] }}}}{0} {{{{ turn['content'] }}}}{{{{ eos_token }}}}{{% endfor %}}"
)
AS_MESSAGES = {"format": "messages", "chat_template": CHAT.format(":")}
EVERY_COLUMN = {
    "prompt": ["Say one", "Say two"], "response": ["one and one", "two and two"],
    "question": ["Well?", "So?"], "answer": ["1", "2"],
    "instruction": ["Count", "Sum"], "output": ["uno", "due"],
    "messages": [[{"role": "user", "content": "a"}, {"role": "assistant", "content": text}] for text in ("b", "c")],
    "conversation": [[{"role": "user", "content": "d"}, {"role": "assistant", "content": text}] for text in ("e", "f")],
    "davir": [0.1, 0.2], "rho_sum": [4.0, 3.0], "num_response_tokens": [5, 6], "status": ["ok", "ok"],
    "content_hash": [7, 8],
}  # fmt: skip
SCORED = ("davir", "rho_sum", "num_response_tokens", "status", "content_hash")
CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class Config(LlamaConfig):
    model_type = "of_its_own"

class Model(LlamaForCausalLM):
    config_class = Config
"""


@pytest.fixture(scope="module")
def coded_folder(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base as a model that transformers does not know, with its code."""
    folder = tmp_path_factory.mktemp("coded") / "model"
    shutil.copytree(base_folder, folder)
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "of_its_own"}
    config["auto_map"] = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(CODE)
    return folder


def outcome(function: Any, dataset: datasets.Dataset, options: dict[str, Any]) -> Any:
    """What a call gives, as plain values; a refusal is one, too."""
    try:
        found = function(dataset, **options)
    except ModelError as error:
        return str(error)
    return found.to_dict() if isinstance(found, datasets.Dataset) else found.to_pydict()


ARGUMENTS: dict[Any, dict[str, tuple[dict[str, Any], dict[str, Any]]]] = {
    davir_ray.score: {
        "base": ({}, {"base": "reference"}),
        "reference": ({}, {"reference": "base"}),
        "format": ({}, {"format": "alpaca"}),
        "prompt_column": ({}, {"prompt_column": "question"}),
        "response_column": ({}, {"response_column": "answer"}),
        "messages_column": (AS_MESSAGES, {"messages_column": "conversation"}),
        "chat_template": (AS_MESSAGES, {"chat_template": CHAT.format("!")}),
        "max_tokens": ({}, {"max_tokens": 10}),
        "config": ({}, {"config": ScoreConfig(precision="float64")}),
        "keep_token_nll": ({}, {"keep_token_nll": True}),
        "trust_remote_code": ({"base": "coded"}, {"trust_remote_code": True}),
    },
    davir_ray.rank: {
        "order": ({}, {"order": "rho_sum"}),
        "lowest": ({}, {"lowest": True}),
        "seed": ({"order": "random"}, {"seed": 3}),
    },
    davir_ray.select: {
        "top_k": ({"top_k": 1}, {"top_k": 2}),
        "top_fraction": ({"top_fraction": 0.5}, {"top_fraction": 1.0}),
        "top_tokens": ({"top_tokens": 6}, {"top_tokens": 11}),
        "min_score": ({"min_score": 0.1}, {"min_score": 0.15}),
        "order": ({"min_score": 0.15}, {"order": "rho_sum"}),
        "lowest": ({"min_score": 0.15}, {"lowest": True}),
    },
}
"""For each argument a call, and what is added to it for another result."""


@pytest.mark.parametrize("function", ARGUMENTS)
def test_every_argument_has_a_case(function: Any) -> None:
    assert list(inspect.signature(function).parameters)[1:] == list(ARGUMENTS[function])


@pytest.mark.parametrize(("function", "name"), [(f, name) for f, cases in ARGUMENTS.items() for name in cases])
def test_every_argument_changes_the_result(
    function: Any, name: str, base_folder: Path, reference_folder: Path, coded_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Rows are scored by the pool's own worker, in this process."""
    monkeypatch.setattr(
        row_scoring, "_score_here", lambda dataset, scoring: ScoreRows(scoring, None)(dataset.data.table)
    )
    dataset = datasets.Dataset.from_dict(EVERY_COLUMN)
    given: dict[str, Any] = {}
    if function is davir_ray.score:
        dataset, given = dataset.remove_columns([*SCORED]), {"base": "base", "reference": "reference"}
    elif function is davir_ray.select:
        dataset = davir_ray.rank(dataset)
    before, added = ARGUMENTS[function][name]
    folders = {"base": base_folder, "reference": reference_folder, "coded": coded_folder}
    first, second = (
        {key: str(folders[value]) if key in ("base", "reference") else value for key, value in options.items()}
        for options in (given | before, given | before | added)
    )
    found = outcome(function, dataset, second)
    assert outcome(function, dataset, first) != found
    assert isinstance(found, dict), found
    assert "ok" in found["status"]
    if name == "trust_remote_code":
        assert "add --trust_remote_code" in outcome(function, dataset, first)
    if name == "messages_column":
        renamed = dataset.remove_columns("messages").rename_column("conversation", "messages")
        assert outcome(function, renamed, first)["base_nll"] == found["base_nll"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            {"format": "preference"},
            "format is 'preference'; it must be one of alpaca, .*, prompt_completion$",
        ),
        ({"messages_column": "conversation"}, "messages_column .* the format prompt_response does not read it"),
        ({"format": "alpaca", "prompt_column": "question"}, "prompt_column .* the format alpaca does not read it"),
        ({"chat_template": CHAT.format(":")}, "chat_template is given"),
        ({"base": Checkpoint(uri="/m"), "trust_remote_code": True}, "for /m, pass it to Checkpoint.find"),
    ],
)
def test_an_argument_without_effect_is_refused(models: dict[str, Any], options: dict[str, Any], told: str) -> None:
    for dataset in (datasets.Dataset.from_dict(EVERY_COLUMN), ray.data.from_arrow(pa.table(EVERY_COLUMN))):
        with pytest.raises(ConfigError, match=told):
            davir_ray.score(dataset, **(models | options))


# --- rank ------------------------------------------------------------------------------------------------------------

NUM_ROWS = 300


def made_scores(seed: int = 0) -> pa.Table:
    """Ties of every kind, NaN, null, rows that could not be prepared, and a nested column."""
    draw = np.random.default_rng(seed)
    davir: list[float | None] = draw.integers(-2, 3, NUM_ROWS).astype(float).tolist()
    status = ["ok"] * NUM_ROWS
    for at, value in {3: None, 50: float("nan"), 80: float("inf"), 81: float("-inf"), 82: -0.0, 290: None}.items():
        davir[at] = value
        status[at] = "ok" if value is not None else "empty_response"
    hashes = draw.integers(0, 2**62, NUM_ROWS) * 2 + 1
    hashes[100:110] = hashes[100]
    hashes[120:140] = hashes[120]  # in two blocks of seven
    known = [value is not None for value in davir]
    return pa.table(
        {
            "content_hash": pa.array(hashes, pa.int64(), mask=~np.array(known)),
            "davir": pa.array(davir, pa.float64(), from_pandas=False),
            "num_response_tokens": pa.array(draw.integers(1, 40, NUM_ROWS), pa.int32(), mask=~np.array(known)),
            "status": status,
            "mine": np.arange(NUM_ROWS),
            "nested": [{"a": [i] * (i % 3)} for i in range(NUM_ROWS)],
        }
    )


def in_blocks(table: pa.Table, num_blocks: int) -> ray.data.Dataset:
    cuts = np.linspace(0, table.num_rows, num_blocks + 1).astype(int)
    return ray.data.from_arrow([table.slice(a, b - a) for a, b in pairwise(cuts)])


def expected_order(table: pa.Table, lowest: bool = False) -> list[int]:
    values, hashes = table["davir"].to_numpy(), table["content_hash"].to_pandas(integer_object_nulls=True).to_numpy()
    known = np.flatnonzero(~np.isnan(values))
    keys = values[known] + 0.0 if lowest else -values[known] + 0.0
    return [int(row) for row in known[np.lexsort((known, hashes[known].astype(np.int64), keys))]]


@pytest.fixture
def small_bins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bins so small that a few hundred rows fall into many."""
    monkeypatch.setattr(row_ranking, "BIN_ROWS", 40)
    monkeypatch.setattr(row_selection, "BIN_RANKS", 40)


@pytest.fixture(scope="module")
def ranked(ray_session: None) -> ray.data.Dataset:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_ranking, "BIN_ROWS", 40)
        return davir_ray.rank(in_blocks(made_scores(), 7))


@pytest.mark.usefixtures("small_bins")
@pytest.mark.parametrize("lowest", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_ranks_are_those_of_one_plain_sort(ranked: ray.data.Dataset, lowest: bool) -> None:
    table = made_scores()
    expected = expected_order(table, lowest)
    if lowest:
        ranked = davir_ray.rank(in_blocks(table, 7), lowest=True)
    assert ranked.num_blocks() > 4
    found = frame(ranked)
    assert found["mine"].tolist() == expected
    assert found["rank"].tolist() == list(range(1, len(expected) + 1))
    assert [len(nested["a"]) for nested in found["nested"]] == [row % 3 for row in expected]
    assert list(found) == [*table.column_names, "rank"]
    here = davir_ray.rank(datasets.Dataset(table), lowest=lowest)
    assert here["mine"] == expected
    assert here["rank"] == found["rank"].tolist()


@pytest.mark.slow
@pytest.mark.usefixtures("small_bins")
@pytest.mark.parametrize("order", ["length", "random"])
def test_other_orders_agree_between_both_kinds_of_dataset(order: Any) -> None:
    table = made_scores(1)
    here = davir_ray.rank(datasets.Dataset(table), order, seed=5)
    there = frame(davir_ray.rank(in_blocks(table, 3), order, seed=5))
    assert here["mine"] == there["mine"].tolist()
    assert len(there) == NUM_ROWS - 2
    if order == "length":
        assert there["num_response_tokens"].is_monotonic_decreasing


def test_what_cannot_be_ranked_is_told() -> None:
    table = made_scores()
    for dataset in (in_blocks(table, 2), datasets.Dataset(table)):
        with pytest.raises(ConfigError, match="no column 'base_nll'"):
            davir_ray.rank(dataset, "base_nll")
        with pytest.raises(ConfigError, match="order is 'best'"):
            davir_ray.rank(dataset, "best")  # type: ignore[arg-type]
    empty = table.slice(3, 1)
    for dataset in (in_blocks(empty, 1), datasets.Dataset(empty)):
        with pytest.raises(DataError, match="no row can be ranked by davir"):
            davir_ray.rank(dataset)
    with pytest.raises(ConfigError, match="'rank' already"):
        davir_ray.rank(davir_ray.rank(datasets.Dataset(table)))


@pytest.mark.slow
def test_ranking_runs_the_dataset_once(tmp_path: Path) -> None:
    def noted(block: pa.Table) -> pa.Table:
        (tmp_path / f"{block['mine'][0]}-{uuid.uuid4()}").touch()
        return block

    dataset = in_blocks(made_scores(), 3).map_batches(noted, batch_size=None, batch_format="pyarrow")
    davir_ray.select(davir_ray.rank(dataset), top_k=100)
    assert len(list(tmp_path.iterdir())) == 3


# --- select ----------------------------------------------------------------------------------------------------------

RULES: list[tuple[dict[str, Any], Callable[[pd.DataFrame], int]]] = [
    ({"top_k": 40}, lambda ranked: 40),
    ({"top_k": 137}, lambda ranked: 137),
    ({"top_fraction": 0.579}, lambda ranked: 171),
    ({"top_tokens": 1500}, lambda ranked: int((ranked["num_response_tokens"].cumsum() <= 1500).sum())),
    ({"top_tokens": 10**9}, lambda ranked: 297),
    ({"min_score": 1.0}, lambda ranked: int((ranked["davir"] >= 1).sum())),
]


@pytest.mark.usefixtures("small_bins")
@pytest.mark.parametrize(("rule", "expected"), RULES, ids=[str(rule) for rule, _ in RULES])
def test_a_rule_takes_the_prefix_that_it_means(
    ranked: ray.data.Dataset, rule: dict[str, Any], expected: Callable[[pd.DataFrame], int]
) -> None:
    table = frame(ranked)
    num_rows = expected(table)
    assert frame(davir_ray.select(ranked, **rule))["rank"].tolist() == list(range(1, num_rows + 1))
    here = datasets.Dataset.from_pandas(table.sample(frac=1, random_state=0), preserve_index=False)
    assert davir_ray.select(here, **rule)["rank"] == list(range(1, num_rows + 1))


@pytest.mark.usefixtures("small_bins")
def test_rows_left_out_since_the_ranking_count_for_no_rule(ranked: ray.data.Dataset) -> None:
    odd = ranked.filter(lambda row: row["rank"] % 2 == 1)
    found = frame(davir_ray.select(odd, top_k=50))
    assert sorted(found["rank"]) == list(range(1, 100, 2))


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        ({}, "no selection rule"),
        ({"top_k": 3, "top_fraction": 0.5}, "exactly one rule"),
        ({"top_k": 0}, "at least 1"),
        ({"top_k": 298}, "only 297 rows"),
        ({"top_fraction": 1.5}, "top_fraction"),
        ({"min_score": float("nan")}, "a number"),
        ({"min_score": 1.0, "order": "random"}, "no meaning"),
        ({"top_tokens": 0}, "top_tokens"),
        ({"min_score": 1e9, "order": "length"}, "no row"),
    ],
)
def test_what_a_rule_cannot_mean_is_refused(ranked: ray.data.Dataset, rule: dict[str, Any], told: str) -> None:
    for dataset in (ranked, datasets.Dataset.from_pandas(frame(ranked), preserve_index=False)):
        with pytest.raises(ConfigError, match=told):
            davir_ray.select(dataset, **rule)


def test_a_rank_that_stands_twice_is_refused(ranked: ray.data.Dataset) -> None:
    with pytest.raises(ConfigError, match="two rows have the rank"):
        davir_ray.select(ranked.union(ranked), top_k=5)
