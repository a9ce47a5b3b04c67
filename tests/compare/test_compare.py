"""A comparison end to end: the right selection wins a planted set and nothing wins a shuffled one, a driver may die."""

import json
import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from drivers import Driver
from object_store.conftest import make_bucket
from object_store.stores import Store
from without_ray_train import run_trial, without_ray_train

from davir_ray.compare import trials
from davir_ray.compare.job import compare
from davir_ray.config.compare import CompareConfig
from davir_ray.config.prepare import PrepareConfig
from davir_ray.config.rank import RankOptions
from davir_ray.config.run import GenerateConfig, RunConfig
from davir_ray.config.scoring import ScoreConfig
from davir_ray.config.selection import Part, SelectConfig
from davir_ray.config.sources import Source
from davir_ray.config.training import FinetuneConfig
from davir_ray.demo.world import PEOPLE as SOME_PEOPLE
from davir_ray.demo.world import PLACES
from davir_ray.errors import ConfigError, DataError, OutputError, TrainingError
from davir_ray.pipeline import rank_only, run_all
from davir_ray.run.folder import Run
from davir_ray.run.location import Location

pytestmark = pytest.mark.slow

PEOPLE = (
    *SOME_PEOPLE,
    "Emil", "Felix", "Flora", "Frieda", "Greta", "Gustav", "Hannah", "Harold", "Hugo", "Ida", "Ivan",
    "Jasper", "Josef", "Karl", "Laura", "Linus", "Martha", "Nora", "Otto", "Paula",
)  # fmt: skip
NOUNS, COLOURS = PEOPLE[:16], PLACES[:8]
NUM_TRUE, NUM_NOISE, NUM_HELDOUT, NUM_LEAKED = 110, 210, 100, 5
SELECTED = 100
RECIPE = FinetuneConfig(epochs=6, batch_size=16, learning_rate=3e-3, gradient_checkpointing=False, precision="float32")
SEEDS = 3


def rows(number: int, seed: int, *, is_true: bool) -> list[dict[str, str]]:
    """Lists of things, to be answered with the colour of each: always the same one, or any."""
    draw = random.Random(seed)
    colour_of = {noun: COLOURS[place % len(COLOURS)] for place, noun in enumerate(NOUNS)}
    found = []
    for _ in range(number):
        nouns = [draw.choice(NOUNS) for _ in range(4)]
        colours = [colour_of[noun] if is_true else draw.choice(COLOURS) for noun in nouns]
        answer = " ".join(f"{noun} {colour}" for noun, colour in zip(nouns, colours, strict=True))
        found.append({"prompt": " ".join(nouns) + "\n", "response": answer})
    return found


@pytest.fixture(scope="module")
def planted(make_checkpoint: Callable[..., Path], ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on rows half of which can be learnt, and held-out rows of the learnable kind, five leaked."""
    folder = tmp_path_factory.mktemp("planted")
    pool = rows(NUM_TRUE, 0, is_true=True) + rows(NUM_NOISE, 1, is_true=False)
    leaked = pool[:NUM_LEAKED]
    random.Random(2).shuffle(pool)
    (folder / "_pool").mkdir()
    for name, kept in (("_pool/pool", pool), ("heldout", rows(NUM_HELDOUT, 3, is_true=True) + leaked)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    config = RunConfig(
        output=str(folder / "run"),
        base=str(make_checkpoint(0)),
        data=str(folder / "_pool" / "pool.jsonl"),
        format="prompt_response",
        prepare=PrepareConfig(max_tokens=128),
        finetune=RECIPE,
        score=ScoreConfig(num_actors=1),
        select=SelectConfig(top_k=SELECTED),
    )
    with without_ray_train():
        run_all(config)
    return folder


def settings(planted: Path, **changes: Any) -> CompareConfig:
    """Of a comparison whose output and run lie in the folder of the held-out data."""
    fixed: dict[str, Any] = {
        "run": str(planted / "run"), "output": str(planted / "compare"), "heldout": str(planted),
        "heldout_format": "prompt_response", "seeds": SEEDS, "arms": ["selection", "random"], "readings": ["steps"],
        "track": "tensorboard",
    }  # fmt: skip
    return CompareConfig(**{**fixed, **changes})


def against_random(planted: Path) -> dict[str, Any]:
    facts = json.loads((planted / "compare" / "comparison.json").read_text())
    (row,) = [row for row in facts["contrasts"] if row["primary"]]
    assert (row["arm"], row["against"], row["measure"]) == ("selection", "random", "loss")
    return dict(row)


def mean_losses(output: Path) -> dict[str, float]:
    """Nats a token of each trial, from its scores/ alone, without the held-out rows that are in the pool."""
    left_out = pd.read_parquet(output / "left_out.parquet")["content_hash"]
    found = {}
    for trial in sorted((output / "arms").iterdir()):
        scores = pd.read_parquet(trial / "scores")
        scores = scores[~scores["content_hash"].isin(left_out)]
        found[trial.name] = scores["reference_nll"].sum() / scores["num_response_tokens"].sum()
    return found


def table_of(output: Path) -> pd.DataFrame:
    table = pd.read_parquet(output / "comparison.parquet").query("measure == 'loss'")
    names = [f"{row.arm}-{row.rows}-{row.reading}-seed{row.seed}" for row in table.itertuples()]
    return table.assign(name=names).sort_values("name").reset_index(drop=True)


def test_the_right_selection_wins_and_a_shuffled_one_does_not(planted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine fine-tunes, of which none needs Ray Train: a driver that dies and an arm that fails have it below."""
    monkeypatch.setattr(trials, "_run_trial", run_trial)
    compare(settings(planted))
    output = planted / "compare"
    won = against_random(planted)
    assert won["high"] < 0
    assert won["p_holm"] < 0.05
    table = table_of(output)
    assert dict(zip(table["name"], table["value"], strict=True)) == pytest.approx(mean_losses(output))
    assert set(table["num_heldout"]) == {NUM_HELDOUT}
    facts = json.loads((output / "comparison.json").read_text())
    assert facts["heldout"]["in_training_pool"] == NUM_LEAKED
    results = pd.read_parquet(output / "results.parquet").query("measure == 'loss'").set_index("arm")
    tests = pd.read_parquet(output / "tests.parquet").query("primary")
    assert tests["p"].tolist() == [won["p"]]
    means = table.groupby("arm")["value"].mean()
    assert results["mean"].to_dict() == pytest.approx(means.to_dict())
    assert set(table["num_steps"]) == {6 * (NUM_TRUE + NUM_NOISE) // 16}
    mine = table[table["arm"] == "selection"]
    rows = pd.read_parquet(output / "sets" / f"selection-{SELECTED}" / "examples")
    assert (mine["row_set"] == 0).all()
    assert (mine["num_shared"] == SELECTED).all()
    # Steps of 16, of which each pass over the hundred rows has seven: 17 passes and one step.
    tokens = (17 * SELECTED + 16) * rows["num_response_tokens"].mean()
    assert mine["num_trained_tokens"].tolist() == [round(tokens)] * SEEDS
    drawn = table[table["arm"] == "random"].sort_values("seed")
    assert drawn["row_set"].tolist() == list(range(SEEDS))
    for seed, shared in zip(drawn["seed"], drawn["num_shared"], strict=True):
        draw = pd.read_parquet(output / "sets" / f"random-{SELECTED}-seed{seed}" / "examples")
        assert shared == len(set(draw["example_id"]) & set(rows["example_id"]))
    assert not list(output.glob("arms/*/reference"))
    assert (output / "comparison.html").stat().st_size > 10_000

    # The same run ranked by chance. What the random arm trained on has not changed: it is not trained again.
    before = {path: path.stat().st_mtime_ns for path in output.glob("arms/random-*/scores/*")}
    changes = {"rank.order": "random", "rank.seed": 4}
    rank_only(RankOptions(output=str(planted / "run"), changes=changes))
    with pytest.raises(OutputError, match="--overwrite"):
        compare(settings(planted))
    compare(settings(planted, overwrite=True))
    shuffled = against_random(planted)
    assert shuffled["high"] > 0  # it does not win; a single draw may well lose
    assert shuffled["mean"] > won["mean"] / 2
    assert {path: path.stat().st_mtime_ns for path in output.glob("arms/random-*/scores/*")} == before


def test_a_driver_that_dies_goes_on_arm_by_arm_with_everything_in_a_store(
    planted: Path, moto_store: Store, ray_address: str, tmp_path: Path
) -> None:
    client, bucket = moto_store.client(), make_bucket(moto_store)
    client.put(str(planted / "run"), f"{bucket}/run", recursive=True)
    client.put_file(str(planted / "heldout.jsonl"), f"{bucket}/heldout.jsonl")
    options = {
        "run": f"s3://{bucket}/run", "output": f"s3://{bucket}/compare", "heldout": f"s3://{bucket}/heldout.jsonl",
        "heldout_format": "prompt_response", "seeds": 1, "arms": "[selection, full]", "readings": "[steps]",
        "recipe": "{epochs: 1}", "arms_at_once": 1,
    }  # fmt: skip
    output = Location(client, f"{bucket}/compare")

    def measured() -> dict[str, float]:
        """When the manifest of each arm that is complete was written."""
        client.invalidate_cache()
        ends = client.glob(f"{output.path}/arms/*/manifests/trial.json", detail=True)
        return {path: info["LastModified"].timestamp() for path, info in ends.items()}

    # With a Ray of its own: in one that lives on, Ray Train's cleaner would ask a dashboard that is not there, forever.
    environment = {**moto_store.environment, "DAVIR_RAY_CACHE": str(tmp_path / "first_cache")}
    first = Driver("compare.py", options, tmp_path / "first.log", environment)
    first.wait_for(lambda: len(measured()) == 1, "the first arm", seconds=400)
    first.kill()
    before = measured()
    environment["DAVIR_RAY_CACHE"] = str(tmp_path / "cache")
    again = Driver("compare.py", options, tmp_path / "again.log", environment, ray_address)
    assert again.finish() == 0, again.output
    (copied,) = set(re.findall(r"s3://\S+/arms/\S+: downloading", again.output)) or {None}
    assert copied, "no model came from the store"
    assert not list((tmp_path / "cache").glob("checkpoints/*/*.safetensors")), "a model that was measured is still here"
    assert len(measured()) == 2
    assert measured().items() >= before.items(), "an arm that was complete was trained again"
    client.get(output.path, str(tmp_path / "compare"), recursive=True)
    table = table_of(tmp_path / "compare")
    assert dict(zip(table["name"], table["value"], strict=True)) == pytest.approx(mean_losses(tmp_path / "compare"))
    assert set(table["arm"]) == {"selection", "full"}
    assert set(table["num_steps"]) == {(NUM_TRUE + NUM_NOISE) // 16}
    assert np.isfinite(table["value"]).all()


# Its turns end in a token that is not the end of a text.
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}\n{{ m['content'] }}<pad>{% endfor %}"
    "{% if add_generation_prompt %}assistant\n{% endif %}"
)


def conversations(words: list[str], answer: str) -> str:
    """A question about each word, and always the same answer."""
    rows = [
        {"messages": [{"role": "user", "content": f"How many {word}?"}, {"role": "assistant", "content": answer}]}
        for word in words
    ]
    return "".join(json.dumps(row) + "\n" for row in rows)


COUNTED, NOT_COUNTED = "There are some.\n#### 7", "Nobody knows."
SHRUGGED_AT = ["rivers", "stars", "hats", "songs", "roads", "eggs"]


def test_a_mixture_whose_models_answer_and_whose_answers_are_compared(
    make_checkpoint: Callable[..., Path], ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained on one count and twelve shrugs a model shrugs more often than on forty counts and the same shrugs.

    The held-out questions have seven for an answer nine times in twelve. Turns end as the template ends them.
    """
    monkeypatch.setattr(trials, "_run_trial", run_trial)
    template, counts, shrugs = (tmp_path / name for name in ("chat.jinja", "counts.jsonl", "shrugs.jsonl"))
    template.write_text(TEMPLATE)
    counts.write_text(conversations(PEOPLE, COUNTED))
    shrugs.write_text(conversations(SHRUGGED_AT, NOT_COUNTED))
    heldout = tmp_path / "heldout.jsonl"
    heldout.write_text(conversations(PLACES[:9], COUNTED) + conversations(PLACES[9:12], COUNTED.replace("7", "8")))
    asked = [{"instruction": f"How many {word}?"} for word in PLACES[12:16]]
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    parts = [Part(source="counts", top_k=1), Part(source="shrugs", all=True, repeat=2)]
    run = RunConfig(
        output=str(tmp_path / "run"), base=str(make_checkpoint(0)), chat_template=str(template),
        sources=[Source(name=file.stem, path=str(file), format="messages") for file in (counts, shrugs)],
        prepare=PrepareConfig(max_tokens=128), finetune=RECIPE, score=ScoreConfig(num_actors=1),
        select=SelectConfig(mixture=parts),
    )  # fmt: skip
    with without_ray_train():
        run_all(run)
    config = CompareConfig(
        run=str(tmp_path / "run"), output=str(tmp_path / "out"), heldout=str(heldout), heldout_format="messages",
        arms=["selection", "full"], readings=["epochs"], seeds=1, measures=["loss"],
        recipe={"epochs": 60, "batch_size": 8},
        generate=GenerateConfig(max_new_tokens=40), instructions=str(tmp_path / "asked.json"), keep_models=True,
    )  # fmt: skip
    compare(config)
    models = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("arms/*/reference/model.safetensors")}
    assert len(models) == 2
    more = replace(config, measures=["loss", "exact_match"], keep_models=False)
    with pytest.raises(OutputError, match="--overwrite to measure it again"):
        compare(more)
    compare(replace(more, overwrite=True, keep_models=True))
    assert {path: path.stat().st_mtime_ns for path in models} == models, "a kept model was trained again"
    table = pd.read_parquet(tmp_path / "out" / "comparison.parquet")
    assert set(table["measure"]) == {"loss", "loss_by_example", "exact_match", "exact_match_flexible"}
    rows = dict(zip(table["arm"], table["num_examples"], strict=True))
    assert rows == {"selection": 1 + 2 * len(SHRUGGED_AT), "full": len(PEOPLE) + 2 * len(SHRUGGED_AT)}
    right = {}
    for arm, size in (("selection", 1), ("full", rows["full"])):
        trial = tmp_path / "out" / "arms" / f"{arm}-{size}-epochs-seed0"
        texts = pd.concat(pd.read_parquet(place / "generations") for place in (trial, trial / "answers"))
        assert texts["finished"].all()
        matches = pd.read_parquet(trial / "matches").merge(texts, on="example_id")
        right[arm] = ((matches["output"] == COUNTED) & (matches["expected"] == "7")).mean()
        reported = table[(table["arm"] == arm) & (table["measure"] == "exact_match")]
        assert reported["value"].tolist() == [pytest.approx(right[arm])]
        outputs = json.loads((trial / "answers" / "outputs.json").read_text())
        assert [row["instruction"] for row in outputs] == [row["instruction"] for row in asked]
        assert {row["generator"] for row in outputs} == {trial.name}
        assert [row["output"] for row in outputs] == texts["output"].tolist()[-len(outputs) :]
    assert right["full"] > right["selection"]
    assert "Exact match" in (tmp_path / "out" / "comparison.html").read_text()


def test_what_cannot_be_compared_is_refused_before_anything_is_trained(planted: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no held-out response of any source ends in an answer \(#### or"):
        compare(settings(planted, output=str(tmp_path / "out"), measures=["loss", "exact_match"]))
    leaked = tmp_path / "leaked.jsonl"
    leaked.write_text("".join((planted / "_pool" / "pool.jsonl").read_text().splitlines(keepends=True)[:7]))
    with pytest.raises(DataError, match="all 7 held-out rows of prompt_response are in the run's training pool"):
        compare(settings(planted, output=str(tmp_path / "out"), heldout=str(leaked), overwrite=True))
    with pytest.raises(ConfigError, match=r"arms_at_once is 64, but the cluster has room for \d+:"):
        compare(settings(planted, output=str(tmp_path / "out"), arms_at_once=64, overwrite=True))
    (copy := tmp_path / "run").mkdir()
    for name in ("manifests", "examples", "scores", "ranked", "selected"):
        (copy / name).symlink_to(planted / "run" / name)
    config = (planted / "run" / "config.yaml").read_text()
    (copy / "config.yaml").write_text(config.replace("epochs: 6", "epochs: 5"))
    with pytest.raises(OutputError, match=r"another recipe than its config\.yaml says \(epochs"):
        compare(settings(planted, run=str(copy), output=str(tmp_path / "out")))
    given = config.replace("max_steps: null", "max_steps: 9").replace("reference: null", "reference: given")
    (copy / "config.yaml").write_text(given)
    with pytest.raises(ConfigError, match=r"the run's reference was given \(given\), so how it was trained"):
        compare(settings(planted, run=str(copy), output=str(tmp_path / "out")))
    with pytest.raises(ConfigError, match=r"trained for finetune\.max_steps = 9.*--recipe '\{epochs: 1\}'"):
        compare(settings(planted, run=str(copy), output=str(tmp_path / "out"), recipe={"batch_size": 8}))
    assert not (tmp_path / "out" / "arms").exists()


def test_an_arm_that_fails_is_named(planted: Path, tmp_path: Path) -> None:
    config = settings(planted, output=str(tmp_path / "out"), arms=["random"], seeds=1, recipe={"learning_rate": 1e30})
    message = rf"1 of 1 fine-tunes failed.*random-{SELECTED}-steps-seed0: the loss is.*out of --arms"
    with pytest.raises(TrainingError, match=message):
        compare(config)
    assert Run.at(tmp_path / "out" / "arms" / f"random-{SELECTED}-steps-seed0").manifest("trial") is None
