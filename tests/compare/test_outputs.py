"""outputs.json: every instruction once, in order, as AlpacaEval documents it."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pandas as pd
import pytest

from davir_ray.compare.generation import generate
from davir_ray.compare.outputs import prepare_instructions, write_outputs
from davir_ray.config.prepare import PrepareConfig
from davir_ray.config.run import GenerateConfig
from davir_ray.config.scoring import ScoreConfig
from davir_ray.data.formats import ALPACA_PROMPT_WITH_INPUT, ALPACA_PROMPT_WITHOUT_INPUT
from davir_ray.errors import DataError, OutputError
from davir_ray.models.checkpoint import Checkpoint
from davir_ray.run.files import read_parquet
from davir_ray.run.folder import Run
from davir_ray.stages.prepare import Preparation

pytestmark = pytest.mark.usefixtures("ray_session")

# AlpacaEval's README, "model_outputs": a JSON path to a list of dictionaries with `instruction` and `output`, optional
# `input`, `generator` (utils.get_generator_name wants one name) and `dataset`.
SCHEMA = {
    "type": "array",
    "items": {
        "type": "object",
        "required": ["dataset", "instruction", "output", "generator"],
        "properties": {name: {"type": "string"} for name in ("dataset", "instruction", "input", "output", "generator")},
        "additionalProperties": False,
    },
}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INSTRUCTIONS: list[dict[str, Any]] = [
    *({"instruction": f"Write {n} words.", "dataset": "helpful_base"} for n in range(20)),
    {"instruction": "Translate it.", "input": "Guten Tag, Ærø", "dataset": "koala"},
    {"instruction": "Write 3 words.", "output": "one two three", "generator": "text_davinci_003"},
]


def prepared(folder: Path, base: Path, rows: list[dict[str, Any]], **options: Any) -> Run:
    run, file = Run.at(folder / "list"), folder / "instructions.json"
    file.write_text(json.dumps(rows))
    settings = Preparation(
        base=Checkpoint.find(str(base)),
        config=PrepareConfig(max_tokens=128, shard_rows=8),
        **options.pop("settings", {}),
    )
    prepare_instructions(run, str(file), settings, **options)
    return run


def examples_of(run: Run) -> list[dict[str, Any]]:
    return [row for name in (run / "examples").names() for row in read_parquet(run / "examples" / name).to_pylist()]


@pytest.mark.slow
def test_every_instruction_once_in_order_as_alpaca_eval_reads_it(base_folder: Path, tmp_path: Path) -> None:
    source = prepared(tmp_path, base_folder, INSTRUCTIONS)
    model, run = Checkpoint.find(str(base_folder)), Run.at(tmp_path / "run")
    generate(
        run, model, GenerateConfig(max_new_tokens=5), ScoreConfig(num_actors=2, precision="float32"), examples=source
    )
    assert write_outputs(run, "tiny llama", examples=source).counts == {"outputs": len(INSTRUCTIONS)}
    text = (run / "outputs.json").read_bytes().decode()
    outputs = json.loads(text)
    jsonschema.validate(outputs, SCHEMA)
    assert [row["instruction"] for row in outputs] == [row["instruction"] for row in INSTRUCTIONS]
    assert [row.get("input") for row in outputs] == [row.get("input") for row in INSTRUCTIONS]
    assert [row["dataset"] for row in outputs] == ["helpful_base"] * 20 + ["koala", "instructions"]
    assert {row["generator"] for row in outputs} == {"tiny llama"}
    assert outputs[3]["output"] == outputs[-1]["output"] != "one two three"
    assert all(row["output"] == row["output"].strip() for row in outputs)
    assert "Ærø" in text
    assert len(pd.read_json(tmp_path / "run" / "outputs.json")) == len(INSTRUCTIONS)
    other = write_outputs(run, "another name", examples=source)
    assert other.fingerprint["generator"] == "another name"
    assert json.loads((run / "outputs.json").read_bytes())[0]["generator"] == "another name"


def test_the_prompts_are_those_of_training_without_a_response(base_folder: Path, tmp_path: Path) -> None:
    rows = examples_of(prepared(tmp_path, base_folder, INSTRUCTIONS))
    tokenizer = Checkpoint.find(str(base_folder)).tokenizer()
    for row, record in zip(rows, INSTRUCTIONS, strict=True):
        template = ALPACA_PROMPT_WITH_INPUT if record.get("input") else ALPACA_PROMPT_WITHOUT_INPUT
        prompt = template.format(instruction=record["instruction"], input=record.get("input"))
        assert row["prompt"] == prompt
        assert row["input_ids"] == [tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
        assert (row["response"], row["response_spans"], row["num_response_tokens"]) == ("", [], 0)


def test_a_chat_model_gets_a_turn(base_folder: Path, tmp_path: Path) -> None:
    source = prepared(tmp_path, base_folder, INSTRUCTIONS, chat=True, settings={"chat_template": CHATML})
    rows = examples_of(source)
    assert rows[0]["prompt"] == "<|im_start|>user\nWrite 0 words.</s>\n<|im_start|>assistant\n"
    assert "\nTranslate it.\n\nGuten Tag, Ærø</s>\n" in rows[20]["prompt"]
    tokenizer = Checkpoint.find(str(base_folder)).tokenizer()
    assert rows[0]["input_ids"] == tokenizer(rows[0]["prompt"], add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"instruction": "word " * 200}, "prompt_too_long"),
        ({"prompt": "no instruction"}, "missing_column"),
        ({"instruction": "a</s>b"}, "special_token_in_text"),
    ],
)
def test_an_instruction_that_cannot_be_a_prompt_stops_it(
    base_folder: Path, tmp_path: Path, row: dict[str, Any], reason: str
) -> None:
    with pytest.raises(DataError, match=reason):
        prepared(tmp_path, base_folder, [*INSTRUCTIONS, row], chat=True, settings={"chat_template": CHATML})


@pytest.mark.slow
def test_the_texts_must_be_of_this_list(base_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "other").mkdir()
    one = prepared(tmp_path / "one", base_folder, INSTRUCTIONS[:2])
    other = prepared(tmp_path / "other", base_folder, INSTRUCTIONS[:3])
    run = Run.at(tmp_path / "run")
    generate(
        run,
        Checkpoint.find(str(base_folder)),
        GenerateConfig(max_new_tokens=1),
        ScoreConfig(num_actors=1),
        examples=one,
    )
    with pytest.raises(OutputError, match="from other examples"):
        write_outputs(run, "m", examples=other)
