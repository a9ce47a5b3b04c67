"""Held-out rows that the pool holds are those that a comparison of every pair finds, however the rows are rendered."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from davir_ray.compare import copies
from davir_ray.compare.copies import LeftOut, Reason, find_left_out
from davir_ray.config.prepare import PrepareConfig
from davir_ray.config.sources import Format, Source
from davir_ray.models.checkpoint import Checkpoint
from davir_ray.run.folder import Run
from davir_ray.stages.prepare import Preparation, prepare

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session")]

CHAT = (
    "{% for m in messages %}<s>{{ m['role'] }} says the following to the other one:\n{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant says the following to the other one:\n{% endif %}"
)
QUESTION = "Natalia sold clips to 48 of her friends in April; how many did she sell?"
OTHER = "A train leaves at noon and another one at two: when do they meet, if ever?"
LONG = " ".join(f"word{number}" for number in range(100))


def talk(question: str, answer: str, system: str | None = None) -> dict[str, Any]:
    first = [] if system is None else [{"role": "system", "content": system}]
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": [*first, *turns]}


class Pools:
    """Makes runs of records and finds what is left out."""

    def __init__(self, folder: Path, base: Path) -> None:
        self.folder = folder
        self.preparation = Preparation(
            base=Checkpoint.find(str(base)), config=PrepareConfig(max_tokens=1024), chat_template=CHAT
        )

    def run(self, name: str, form: Format, records: list[dict[str, Any]], **changes: Any) -> tuple[Run, list[Source]]:
        file = self.folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
        source, run = Source(name=name, path=str(file), format=form), Run.at(self.folder / f"{name}-run")
        preparation = replace(self.preparation, **changes)
        prepare(replace(run, overwrite=True), [source], preparation, max_bad_fraction=0)
        return run, [source]

    def found(self, pool: tuple[Run, list[Source]], heldout: tuple[Run, list[Source]]) -> LeftOut:
        sources = {"run": pool[1], "heldout": heldout[1]}
        place = Run.at(self.folder).folder / "left_out.parquet"
        place.remove()
        return find_left_out(place, pool[0], heldout[0], sources, self.preparation.config)


@pytest.fixture
def pools(tmp_path: Path, base_folder: Path) -> Pools:
    return Pools(tmp_path, base_folder)


def reasons(found: LeftOut) -> dict[int, str]:
    rows = found.rows.to_pylist()
    assert sum(found.counts.values()) == len(rows)
    return {row["source_row"]: row["reason"] for row in rows}


def test_a_question_is_found_in_every_rendering_and_a_row_is_named_with_its_reason(pools: Pools) -> None:
    near = f"{LONG} and a little more"
    heldout = pools.run("heldout", "gsm8k", [
        {"question": QUESTION, "answer": "#### 48"},  # 0: another answer, in chat
        {"question": OTHER, "answer": "#### 2"},
        {"question": "Nobody asked this of anybody before.", "answer": f"So: {near}"},
        {"question": "This one is only here, is it not?", "answer": "#### 3"},
    ])  # fmt: skip
    asked = [
        talk(f"  {QUESTION.upper()} \n", "Forty-eight, I think.", system="Be brief."),
        talk("What is this all about, if not that?", LONG),
        talk("Nobody asked this of anybody before?!", LONG),
    ]
    chat = pools.found(pools.run("chat", "messages", asked), heldout)
    assert reasons(chat) == {0: Reason.SAME_PROMPT, 2: Reason.SAME_PROMPT}
    plain = [
        {"instruction": OTHER, "output": "At three."},
        {"instruction": "Nobody asked them.", "input": "", "output": f"So: {LONG} and more"},
        {"instruction": "Nobody asked them.", "input": "", "output": f"{LONG} is less similar"},
    ]
    found = pools.found(pools.run("alpaca", "alpaca", plain), heldout)
    assert reasons(found) == {1: Reason.SAME_PROMPT, 2: Reason.NEAR_COPY}
    of_pool = pd.read_parquet(pools.folder / "alpaca-run" / "examples").set_index("source_row")
    table = found.rows.to_pandas().set_index("source_row")
    ours = "nobody asked this of anybody before so " + near
    theirs = f"nobody asked them so {LONG} and more"
    assert table.loc[2, "jaccard"] == jaccard(ours.split(), theirs.split())
    assert pd.isna(table.loc[1, "jaccard"])
    assert table["pool_example_id"].to_dict() == {row: of_pool.loc[row - 1, "example_id"] for row in (1, 2)}
    assert table.loc[2, "source_file"] == "heldout.jsonl"
    same = pools.found(pools.run("same", "gsm8k", [{"question": OTHER, "answer": "#### 2"}]), heldout)
    assert reasons(same) == {1: Reason.WORD_FOR_WORD}
    assert same.counts == {"word_for_word": 1, "same_prompt": 0, "near_copy": 0}


def grams(words: list[str]) -> set[tuple[str, ...]]:
    return {tuple(words[at : at + 5]) for at in range(len(words) - 4)} or {tuple(words)}


def jaccard(one: list[str], other: list[str]) -> float:
    return len(grams(one) & grams(other)) / len(grams(one) | grams(other))


@pytest.mark.parametrize("seed", range(2))
def test_what_is_found_is_what_all_pairs_have(pools: Pools, seed: int) -> None:
    draw = random.Random(seed)

    def row(num_prompt: int, num_response: int) -> dict[str, str]:
        words = [f"w{draw.randrange(60)}" for _ in range(num_prompt + num_response)]
        return {"prompt": " ".join(words[:num_prompt]), "response": " ".join(words[num_prompt:])}

    records = [row(draw.randrange(8), draw.randrange(1, 40)) for _ in range(60)]
    changed = []
    for record in records:
        words = record["response"].split()
        for _ in range(draw.randrange(3)):
            words[draw.randrange(len(words))] = "x"
        prompt = record["prompt"] if draw.random() < 0.5 else record["prompt"].upper() + "!"
        changed.append({"prompt": prompt, "response": " ".join(words)})
        if draw.random() < 0.3:
            changed.append({"prompt": record["prompt"], "response": "Something else, and not that."})
    draw.shuffle(changed)
    heldout = pools.run("heldout", "prompt_response", records)
    pool = pools.run("pool", "prompt_response", changed, config=PrepareConfig(max_tokens=1024, shard_rows=7))

    def words_of(record: dict[str, str], *names: str) -> list[str]:
        return (
            " ".join(record[name] for name in names)
            .lower()
            .replace("!", " ")
            .replace(",", " ")
            .replace(".", " ")
            .split()
        )

    expected = {}
    for number, record in enumerate(records):
        prompt = words_of(record, "prompt")
        best = max(
            jaccard(words_of(record, "prompt", "response"), words_of(other, "prompt", "response")) for other in changed
        )
        if record in changed:
            expected[number] = (Reason.WORD_FOR_WORD, None)
        elif len(prompt) >= 5 and any(words_of(other, "prompt") == prompt for other in changed):
            expected[number] = (Reason.SAME_PROMPT, None)
        elif best >= 0.7:
            expected[number] = (Reason.NEAR_COPY, best)
    found = pools.found(pool, heldout)
    rows = found.rows.to_pylist()
    assert {row["source_row"]: (row["reason"], row["jaccard"]) for row in rows} == expected
    assert all(count > 3 for count in found.counts.values())


def test_prompts_that_say_nothing_are_no_reason(pools: Pools) -> None:
    """Empty ones, those of fewer than five words, and one that stands before more than ten held-out rows."""
    for prompts, is_reason in (
        ([""] * 3, False),
        (["?!"] * 3, False),
        (["Continue this text:"] * 3, False),
        (["Continue this text, please, now:"] * 10, True),
        (["Continue this text, please, now:"] * 11, False),
    ):
        records = [
            {
                "prompt": prompt,
                "response": f"own{number} " * 20 if not prompt else f"Own {number} and no more {number}.",
            }
            for number, prompt in enumerate(prompts)
        ]
        heldout = pools.run("heldout", "prompt_response", records)
        other = pools.run("pool", "prompt_response", [{"prompt": prompts[0], "response": "It is another text."}])
        found = reasons(pools.found(other, heldout))
        assert found == (dict.fromkeys(range(len(prompts)), Reason.SAME_PROMPT) if is_reason else {})


def test_a_text_of_fewer_than_five_words_is_a_near_copy_of_the_same_words_only(pools: Pools) -> None:
    heldout = pools.run("heldout", "prompt_response", [
        {"prompt": "Say it", "response": "Yes!"}, {"prompt": "Say it", "response": "No, yes."},
        {"prompt": "", "response": "…"},
    ])  # fmt: skip
    pool = pools.run("pool", "prompt_response", [
        {"prompt": "say it:", "response": "yes"}, {"prompt": "say", "response": "no yes"},
        {"prompt": "", "response": "!"},
    ])  # fmt: skip
    assert reasons(pools.found(pool, heldout)) == {0: Reason.NEAR_COPY}


def test_without_records_plain_text_loses_its_frame_and_chats_are_counted(pools: Pools) -> None:
    plain = [
        {"instruction": QUESTION, "input": "", "output": "48"},
        {"instruction": "Say:", "input": LONG, "output": "y"},
    ]
    heldout = pools.run("heldout", "messages", [talk(QUESTION, "Many."), talk(f"Tell: {LONG}", "Yes.")])
    kept = pools.found(pools.run("alpaca", "alpaca", plain), heldout)
    dropped = pools.found(pools.run("dropped", "alpaca", plain, keep_record=False), heldout)
    assert reasons(dropped) == reasons(kept) == {0: Reason.SAME_PROMPT, 1: Reason.NEAR_COPY}
    assert dropped.rows["jaccard"].equals(kept.rows["jaccard"])
    chats = [talk(QUESTION, "Many."), talk(f"Tell: {LONG}", "Yes!"), talk(QUESTION, "Few.")]
    found = pools.found(pools.run("chats", "messages", chats, keep_record=False), heldout)
    assert reasons(found) == {0: Reason.WORD_FOR_WORD}
    assert found.num_not_read == 3
    assert kept.num_not_read == dropped.num_not_read == 0


def test_the_template_is_no_part_of_a_near_copy(pools: Pools) -> None:
    """Short rows share most of what a template or Alpaca's prompt writes."""
    heldout = pools.run("heldout", "alpaca", [{"instruction": "Name a red fruit", "output": "The cherry is red."}])
    pool = pools.run("pool", "alpaca", [{"instruction": "Name a big animal", "output": "The whale is big."}])
    assert reasons(pools.found(pool, heldout)) == {}


def test_a_pool_is_read_once_while_it_does_not_change(pools: Pools, monkeypatch: pytest.MonkeyPatch) -> None:
    heldout = pools.run("heldout", "prompt_response", [{"prompt": QUESTION, "response": "Some."}])
    pool = pools.run("pool", "messages", [talk(QUESTION, "None.")], keep_record=False)
    sources = {"run": pool[1], "heldout": heldout[1]}
    place = Run.at(pools.folder).folder / "left_out.parquet"
    first = find_left_out(place, pool[0], heldout[0], sources, pools.preparation.config)
    assert first.num_not_read == 1
    monkeypatch.setattr(copies, "collect", None)
    again = find_left_out(place, pool[0], heldout[0], sources, pools.preparation.config)
    assert again.rows.equals(first.rows)
    assert again.num_not_read == 1
    monkeypatch.undo()
    pool = pools.run("pool", "messages", [talk(QUESTION, "None.")])
    changed = find_left_out(place, pool[0], heldout[0], sources, pools.preparation.config)
    assert (reasons(first), reasons(changed)) == ({}, {0: Reason.SAME_PROMPT})
