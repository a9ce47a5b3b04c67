"""Exports of small made runs, read by those who would read them: datasets, TRL's trainer, yaml, json."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml
from hub_server import HubServer
from huggingface_hub import DatasetCard, snapshot_download
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from davir_ray.config.export import ExportOptions
from davir_ray.config.run import RunConfig
from davir_ray.config.selection import Part, RankConfig, SelectConfig
from davir_ray.config.sources import Source
from davir_ray.config.yaml import dump
from davir_ray.errors import ConfigError, DataError, OutputError
from davir_ray.export import job
from davir_ray.export.hub import licence_of
from davir_ray.export.job import export
from davir_ray.run.files import FileEntry, in_folder
from davir_ray.run.folder import Run
from davir_ray.run.manifest import Manifest
from davir_ray.schema import SELECTED
from davir_ray.stages.rank import rank
from davir_ray.stages.select.rule import select

pytestmark = pytest.mark.usefixtures("ray_session", "small_bins")

ROWS = 60
MakeRun = Callable[..., Run]


@pytest.fixture
def small_bins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "BIN_ROWS", 25)


@pytest.fixture
def make_run(make_scores: Callable[..., Run]) -> MakeRun:
    """A ranked and selected run whose records are `record_of(number)`, of which every seventh has no score."""

    def make(record_of: Callable[[int], dict[str, Any]] | None, format: str, **config: Any) -> Run:
        draw = np.random.default_rng(3)
        davir = [None if at % 7 == 0 else float(value) for at, value in enumerate(draw.normal(0.3, 0.4, ROWS))]
        ids = draw.permutation(10**6)[:ROWS] + 2**60
        sources = [Source(name="one", path="/home/me/rows.jsonl", format=format)]  # type: ignore[arg-type]
        select_config = config.pop("select", SelectConfig(top_k=30))
        run = make_scores(
            davir, name=config.pop("name", "run"), example_id=ids,
            source=["one"] * ROWS, num_prompt_tokens=[3] * ROWS, base_nll=[2.0] * ROWS,
            reference_nll=[1.0] * ROWS, rho_sum=[0.5] * ROWS, rho_mean=[0.25] * ROWS,
            record=[record_of and json.dumps(record_of(at)) for at in range(ROWS)],
        )  # fmt: skip
        entries = [
            FileEntry(name=path.name, rows=pq.read_metadata(path).num_rows, bytes=path.stat().st_size, sha256="")
            for path in sorted(Path(str(run / "examples")).iterdir())
        ]
        counts = {"read": ROWS + 2, "prepared": ROWS, "rejected": 2}
        Manifest(stage="prepare", fingerprint={}, counts=counts, files=in_folder("examples", entries)).write(run.folder)
        rank(run, RankConfig())
        select(run, RankConfig(), select_config)
        run.remember(dump(RunConfig(output=str(run), base="org/base", sources=sources, select=select_config, **config)))
        return run

    return make


def alpaca(at: int) -> dict[str, Any]:
    return {"instruction": f"Do {at}.", "input": "" if at % 2 else f"with {at}", "output": f"done {at}"}


def chat(at: int) -> dict[str, Any]:
    turns = [{"role": "user", "content": f"Say {at}."}, {"role": "assistant", "content": f"{at}!"}]
    return {"messages": [{"role": "system", "content": "Be brief."}, *turns] if at % 2 else turns}


def loaded(folder: Path) -> pd.DataFrame:
    """As anybody loads a folder of rows."""
    rows = datasets.load_dataset(str(folder), split="train", cache_dir=str(folder.parent / "cache"))
    return pd.DataFrame(rows.to_list())


def ranked(run: Run) -> pd.DataFrame:
    return pd.read_parquet(str(run / "ranked")).sort_values("rank")


def test_the_selection_by_rank_and_at_random(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(alpaca, "alpaca")
    expected = pd.read_parquet(str(run / "selected")).sort_values("rank")
    export(ExportOptions(run=str(run), to="trl", output=str(tmp_path / "ordered")))
    found = loaded(tmp_path / "ordered")
    assert found["rank"].tolist() == expected["rank"].tolist() == list(range(1, 31))
    assert found["completion"].tolist() == expected["response"].tolist()
    for name in ("prompt", "davir", "base_nll", "reference_nll", "rho_sum", "example_id", "source"):
        assert found[name].tolist() == expected[name].tolist(), name
    orders = []
    for seed in (1, 1, 2):
        export(ExportOptions(run=str(run), to="trl", output=str(tmp_path / "random"), shuffle=True, seed=seed))
        orders.append([json.loads(line) for file in sorted((tmp_path / "random" / "data").iterdir())
                       for line in file.read_text().splitlines()])  # fmt: skip
    assert orders[0] == orders[1] != orders[2]
    ranks = [row["rank"] for row in orders[0]]
    assert ranks != sorted(ranks)
    assert sorted(ranks) == list(range(1, 31))


@pytest.mark.parametrize(("shuffle", "bin_rows"), [(False, 25), (True, 25), (False, 1)])
def test_every_ranked_row_has_its_own_text(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shuffle: bool, bin_rows: int
) -> None:
    """With bins of one row, some of the parts in which ranks and texts meet have no row with a rank."""
    monkeypatch.setattr(job, "BIN_ROWS", bin_rows)
    run = make_run(chat, "messages")
    output = export(
        ExportOptions(run=str(run), to="parquet", output=str(tmp_path / "out"), rows="scored", shuffle=shuffle)
    )
    files = sorted(Path(str(output / "data")).iterdir())
    assert len(files) == -(-(ROWS - len(range(0, ROWS, 7))) // bin_rows)
    table = pd.concat([pd.read_parquet(file) for file in files])
    assert pq.read_schema(files[0]).equals(SELECTED, check_metadata=False)
    texts = pd.read_parquet(str(run / "examples")).set_index("example_id")
    wanted = ranked(run)
    ranks = table["rank"].tolist()
    assert sorted(ranks) == wanted["rank"].tolist()
    assert (ranks == sorted(ranks)) is not shuffle
    for row in table.to_dict("records"):
        assert (row["prompt"], row["record"]) == tuple(texts.loc[row["example_id"], ["prompt", "record"]])
    assert table.set_index("rank").sort_index()["davir"].tolist() == wanted["davir"].tolist()


def test_the_mixture_as_it_is(make_run: MakeRun, tmp_path: Path) -> None:
    mixture = SelectConfig(mixture=[Part(source="one", top_fraction=0.5, repeat=2)])
    run = make_run(alpaca, "alpaca", select=mixture)
    export(ExportOptions(run=str(run), to="sharegpt", output=str(tmp_path / "out"), rows="mixture"))
    expected = pd.read_parquet(str(run / "mixture"))
    found = loaded(tmp_path / "out")
    assert found["example_id"].tolist() == expected["example_id"].tolist()
    records = [json.loads(record) for record in expected["record"]]
    for turns, record in zip(found["conversations"], records, strict=True):
        assert [turn["from"] for turn in turns] == ["human", "gpt"]
        assert turns[1]["value"] == record["output"]


def test_trl_trains_on_both_forms(
    make_run: MakeRun, base_folder: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    for number, (record_of, format) in enumerate(((alpaca, "alpaca"), (chat, "messages"))):
        run = make_run(record_of, format, name=f"run{number}")
        output = tmp_path / f"out{number}"
        export(ExportOptions(run=str(run), to="trl", output=str(output), shuffle=True))
        names: dict[str, Any] = {}
        exec((output / "load.py").read_text(), names)
        args = SFTConfig(
            output_dir=str(tmp_path / "trained"), max_steps=1, per_device_train_batch_size=4, use_cpu=True, bf16=False,
            report_to="none", save_strategy="no", disable_tqdm=True, max_length=128,
        )  # fmt: skip
        trainer = SFTTrainer(str(base_folder), args=args, train_dataset=names["rows"], processing_class=tokenizer)
        assert math.isfinite(trainer.train().training_loss)
        text = tokenizer.decode(trainer.train_dataset[0]["input_ids"])
        row = names["rows"][0]
        assert (row["completion"] if number == 0 else row["messages"][-1]["content"]) in text


def test_what_axolotl_and_llama_factory_load_by(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(alpaca, "alpaca")
    for trainer in ("axolotl", "llamafactory"):
        export(ExportOptions(run=str(run), to=trainer, output=str(tmp_path / trainer)))
        found = loaded(tmp_path / trainer)
        records = [json.loads(record) for record in pd.read_parquet(str(run / "selected"))["record"]]
        assert found[["instruction", "input", "output"]].to_dict("records") == records
    assert yaml.safe_load((tmp_path / "axolotl" / "axolotl.yaml").read_text()) == {
        "datasets": [{"path": str(tmp_path / "axolotl" / "data"), "split": "train", "type": "alpaca"}]
    }
    assert json.loads((tmp_path / "llamafactory" / "dataset_info.json").read_text()) == {
        "llamafactory": {
            "file_name": "data",
            "formatting": "alpaca",
            "columns": {"prompt": "instruction", "query": "input", "response": "output"},
        }
    }


def test_rows_without_a_place_in_the_form_are_counted_and_kept(
    make_run: MakeRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def record_of(at: int) -> dict[str, Any]:
        record = chat(at)
        record["messages"] += [{"role": "user", "content": "And?"}] if at % 3 == 0 else []
        return record

    run = make_run(record_of, "messages")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "export.json").write_text('{"unfinished": {}}')  # of a driver that died
    export(ExportOptions(run=str(run), to="llamafactory", output=str(tmp_path / "out")))
    selected = pd.read_parquet(str(run / "selected"))
    is_bad = selected["record"].map(lambda record: json.loads(record)["messages"][-1]["role"] == "user")
    assert 0 < is_bad.sum() < len(selected)
    found, rejects = loaded(tmp_path / "out"), pd.read_parquet(tmp_path / "out" / "rejects")
    assert found["rank"].tolist() == selected["rank"][~is_bad].tolist()
    assert sorted(rejects["source_row"]) == sorted(selected["source_row"][is_bad])
    assert set(rejects["reason"]) == {"bad_conversation"}
    assert f"bad_conversation {is_bad.sum()}" in caplog.text
    assert f"{is_bad.sum()} rows are left out" in (tmp_path / "out" / "README.md").read_text()
    info = json.loads((tmp_path / "out" / "dataset_info.json").read_text())["out"]
    assert (info["formatting"], info["columns"]) == (
        "sharegpt",
        {"messages": "conversations", "tools": "tools"},
    )
    tool = make_run(lambda at: {"messages": [{"role": "critic", "content": "x"}]}, "messages", name="tool")
    with pytest.raises(DataError, match="no row has a place in the form of sharegpt: bad_conversation 30"):
        export(ExportOptions(run=str(tool), to="sharegpt", output=str(tmp_path / "none")))


def test_what_cannot_be_exported_is_refused_before_anything_is_written(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(None, "messages", keep_record=False)
    for trainer in ("trl", "axolotl", "llamafactory", "messages", "sharegpt"):
        with pytest.raises(ConfigError, match=f"to is {trainer}, which needs the records of the sources"):
            export(ExportOptions(run=str(run), to=trainer, output=str(tmp_path / "out")))
    with pytest.raises(ConfigError, match=r"rows is mixture, but .* has no mixture/"):
        export(ExportOptions(run=str(run), to="parquet", output=str(tmp_path / "out"), rows="mixture"))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="holds files but no export"):
        export(ExportOptions(run=str(run), to="parquet", output=str(tmp_path / "taken")))
    with pytest.raises(OutputError, match="holds files but no export"):
        export(ExportOptions(run=str(run), to="parquet", output=str(run)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": "mixture", "shuffle": True}, "--shuffle has no effect"),
        ({"seed": 3}, "--seed has no effect"),
        ({"public": True}, "--public has no effect"),
        ({"license": "mit"}, "--license has no effect"),
        ({"push_to_hub": "name"}, "push_to_hub is 'name'; it must be a name on the hub"),
        ({"push_to_hub": "org/name", "output": "s3://b/x"}, "give a local output"),
        ({"output": "s3://key:secret@b/x"}, "with a password in it"),
    ],
)
def test_options_that_contradict_each_other_are_refused(changes: dict[str, Any], message: str) -> None:
    options: dict[str, Any] = {"run": "r", "to": "trl", "output": "o"}
    with pytest.raises(ConfigError, match=message):
        ExportOptions(**options | changes)


def test_a_data_set_on_the_hub_is_private_unless_it_is_to_be_public(
    make_run: MakeRun, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", hub.TOKEN)
    run, name = make_run(alpaca, "alpaca"), "datasets/org/best"
    options: dict[str, Any] = {"run": str(run), "to": "axolotl", "output": str(tmp_path / "out"), "license": "mit"}
    hub.publish(name, {"data/part-00009.jsonl": b"of an earlier export"})
    with pytest.raises(ConfigError, match="org/best, which everybody can see"):
        export(ExportOptions(**options, push_to_hub="org/best"))
    export(ExportOptions(**options, push_to_hub="org/mine"))
    export(ExportOptions(**options, push_to_hub="org/best", public=True))
    assert name not in hub.private
    assert "datasets/org/mine" in hub.private
    folder = Path(snapshot_download("org/best", repo_type="dataset"))
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == {
        "README.md", "axolotl.yaml", "export.json",
        *(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out" / "data").iterdir()),
    }  # fmt: skip
    assert loaded(folder)["rank"].tolist() == list(range(1, 31))
    assert yaml.safe_load((folder / "axolotl.yaml").read_text())["datasets"][0]["path"] == "org/best"
    card = DatasetCard.load(folder / "README.md")
    card.data.to_dict()
    assert card.data.license == "mit"
    davir = pd.read_parquet(str(run / "selected"))["davir"]
    assert f"{((davir >= 0.6) & (davir < 0.7)).sum():,}" in next(
        line for line in card.text.splitlines() if line.startswith("+0.6 to")
    )
    for said in (
        "rows.jsonl` (alpaca)",
        "rows here | 30 |",
        "top_k `30`",
        "--push_to_hub org/best --public",
        "by rank",
    ):
        assert said in card.text, said
    assert "/home/me" not in card.text
    assert str(tmp_path) not in card.text
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(ConfigError, match="push_to_hub is org/mine, which cannot be written to"):
        export(ExportOptions(**options, push_to_hub="org/mine"))


def test_the_licence_of_a_source_on_the_hub_is_that_of_its_card(hub: HubServer, tmp_path: Path) -> None:
    hub.publish("datasets/org/mit", {"README.md": b"---\nlicense: mit\n---\n# Rows\n"})
    hub.publish("datasets/org/none", {"README.md": b"# Rows\n"})
    mit, none, gone = (Source(name=name, path=f"org/{name}", format="alpaca") for name in ("mit", "none", "gone"))
    assert licence_of([mit]) == "mit"
    assert licence_of([mit, none]) is None
    assert licence_of([none]) is None
    assert licence_of([gone]) is None
    assert licence_of([mit, Source(name="here", path=str(tmp_path), format="alpaca")]) is None
