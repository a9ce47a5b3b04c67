"""The demo's data holds the truth that it claims, and nothing but the pairing tells its classes apart."""

import json
import random
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from davir_ray.demo import base, truth, world
from davir_ray.demo.world import InstructionRow
from davir_ray.run.folder import Run

SEEDS = (0, 1)


@pytest.fixture(scope="module", params=SEEDS)
def seed(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module")
def rows(seed: int) -> list[InstructionRow]:
    return world.instruction_rows(seed)


@pytest.fixture(scope="module")
def texts(seed: int) -> list[str]:
    return world.pretraining_texts(seed)


def by_class(rows: list[InstructionRow]) -> dict[str, list[InstructionRow]]:
    classes: dict[str, list[InstructionRow]] = defaultdict(list)
    for row in rows:
        classes[row.planted_class].append(row)
    return classes


def test_a_seed_gives_the_same_data_and_another_seed_does_not(seed: int, rows: list[InstructionRow]) -> None:
    assert world.instruction_rows(seed) == rows
    assert world.instruction_rows(seed + 1) != rows
    assert world.pretraining_texts(seed, 50) == world.pretraining_texts(seed, 50)
    assert world.pretraining_texts(seed, 50) != world.pretraining_texts(seed + 1, 50)


def test_fewer_texts_are_the_beginning_of_more(seed: int, texts: list[str]) -> None:
    assert world.pretraining_texts(seed, 50) == texts[:50]


def test_class_counts(rows: list[InstructionRow]) -> None:
    assert Counter(row.planted_class for row in rows) == {
        "known": world.NUM_KNOWN,
        "learnable": world.NUM_LEARNABLE,
        "noise": world.NUM_NOISE,
        "noise_duplicates": world.NUM_DUPLICATED * world.NUM_COPIES,
    }


def test_rows_of_a_class_are_spread_over_the_file(rows: list[InstructionRow]) -> None:
    for half in (rows[: len(rows) // 2], rows[len(rows) // 2 :]):
        for planted, members in by_class(half).items():
            share = len(members) / sum(row.planted_class == planted for row in rows)
            assert 0.4 < share < 0.6


def test_every_world_gives_each_place_equally_many_people(seed: int) -> None:
    true = world.make_world(seed)
    for places in (true.home, true.sunday):
        assert set(places) == set(world.PEOPLE)
        assert set(Counter(places.values()).values()) == {len(world.PEOPLE) // len(world.PLACES)}


def test_true_classes_are_true_and_noise_never_keeps_its_answer(seed: int, rows: list[InstructionRow]) -> None:
    true = world.make_world(seed)
    for row in rows:
        places = true.home if row.subject == "home" else true.sunday
        assert row.truth == tuple(places[person] for person in row.people)
        assert (row.answer == row.truth) == (row.planted_class in ("known", "learnable"))


def test_text_says_what_the_fields_say(rows: list[InstructionRow]) -> None:
    for row in rows:
        assert row.prompt.endswith("\n")
        assert ("Sundays" in row.prompt) == (row.subject == "sunday")
        parts = row.response.removesuffix(".").split(", ")
        assert tuple(part.split()[1] for part in parts) == row.people
        assert tuple(part.split()[-1] for part in parts) == row.answer
        assert [
            person for person in world.PEOPLE if person in row.prompt.replace(",", " ").replace(".", " ").split()
        ] == sorted(row.people)


def test_noise_answers_are_a_permutation_of_true_answers(rows: list[InstructionRow]) -> None:
    noisy = by_class(rows)
    for subject in ("home", "sunday"):
        answers, truths = Counter[tuple[str, ...]](), Counter[tuple[str, ...]]()
        for planted, copies in (("noise", world.NUM_COPIES), ("noise_duplicates", 1)):  # a common denominator
            for row in noisy[planted]:
                if row.subject == subject:
                    answers[row.answer] += copies
                    truths[row.truth] += copies
        assert answers == truths


def test_noise_hits_single_places_no_oftener_than_chance(rows: list[InstructionRow]) -> None:
    hits = [
        place == true
        for row in rows
        if row.planted_class == "noise"
        for place, true in zip(row.answer, row.truth, strict=True)
    ]
    assert sum(hits) / len(hits) < 2 / len(world.PLACES)


def test_duplicates_are_exact_and_stem_from_both_subjects(rows: list[InstructionRow]) -> None:
    copies = Counter((row.prompt, row.response) for row in rows if row.planted_class == "noise_duplicates")
    assert len(copies) == world.NUM_DUPLICATED
    assert set(copies.values()) == {world.NUM_COPIES}
    subjects = Counter(row.subject for row in rows if row.planted_class == "noise_duplicates")
    assert subjects["home"] == subjects["sunday"]


def test_lengths_are_the_same_in_every_class(rows: list[InstructionRow], texts: list[str]) -> None:
    tokenizer = base.train_tokenizer(texts)
    for members in by_class(rows).values():
        people = Counter(len(row.people) for row in members)
        assert set(people) == set(range(1, 7))
        assert len(set(people.values())) == 1
        for row in members:
            assert len(tokenizer.encode(row.response, add_special_tokens=False)) == 6 * len(row.people)


def test_pretraining_never_asks_about_sundays(rows: list[InstructionRow], texts: list[str]) -> None:
    corpus = "".join(texts)
    assert "Sundays" in corpus  # the word is known
    assert not any("Sundays" in text and "\n" in text for text in texts)
    assert not any(row.prompt in corpus for row in rows if row.planted_class == "learnable")


def test_pretraining_tells_homes_mostly_right_and_other_days_at_random(seed: int, texts: list[str]) -> None:
    home = world.make_world(seed).home
    found: dict[bool, list[bool]] = {True: [], False: []}
    for text in texts:
        prompt, _, listed = text.removesuffix(".").rpartition("\n")
        if prompt.count("\n") == 1:
            about_home = prompt.split("\n")[0] in world.HOME_QUESTIONS
            found[about_home] += [home[words[1]] == words[-1] for words in map(str.split, listed.split(", "))]
    right = {about_home: sum(hits) / len(hits) for about_home, hits in found.items()}
    assert right[True] == pytest.approx(1 - world.WRONG_SHARE, abs=0.02)
    assert right[False] == pytest.approx(1 / len(world.PLACES), abs=0.01)


def test_shuffle_answers_changes_rows_that_keep_theirs() -> None:
    draw = random.Random(0)
    truths = [("mill",)] * 5 + [("castle",)] * 3 + [("forest",)] * 2
    for _ in range(200):
        answers = world.shuffle_answers(truths, draw)
        assert Counter(answers) == Counter(truths)
        assert all(answer != truth for answer, truth in zip(answers, truths, strict=True))


def test_shuffle_answers_refuses_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="over half of 3 rows"):
        world.shuffle_answers([("mill",), ("mill",), ("castle",)], random.Random(0))


def test_written_rows_read_back(rows: list[InstructionRow], tmp_path: Path) -> None:
    path = tmp_path / "instructions.jsonl"
    world.write_instructions(path, rows)
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [(record["prompt"], record["response"]) for record in records] == [
        (row.prompt, row.response) for row in rows
    ]
    assert {record["planted_class"] for record in records} == set(world.CLASSES)


def test_base_is_a_llama_checkpoint_with_its_tokenizer(tmp_path: Path) -> None:
    texts = world.pretraining_texts(0, 2000)
    tokenizer = base.train_tokenizer(texts)
    tokenizer.save_pretrained(tmp_path)
    model = base.new_model(tokenizer, seed=0)
    model.save_pretrained(tmp_path)
    loaded, loaded_tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded).__name__ == "LlamaForCausalLM"
    assert (tmp_path / "model.safetensors").exists()
    assert loaded_tokenizer.encode(texts[0]) == tokenizer.encode(texts[0])
    assert loaded_tokenizer.decode(tokenizer.encode(texts[0])) == texts[0]
    assert loaded.config.eos_token_id == loaded_tokenizer.eos_token_id
    assert None not in (loaded_tokenizer.bos_token_id, loaded_tokenizer.eos_token_id, loaded_tokenizer.pad_token_id)


def test_prompt_and_response_encode_apart_as_they_do_together(rows: list[InstructionRow]) -> None:
    tokenizer = base.train_tokenizer(world.pretraining_texts(0, 2000))
    for row in rows[:200]:
        prompt, response, both = (
            tokenizer.encode(text, add_special_tokens=False)
            for text in (row.prompt, row.response, row.prompt + row.response)
        )
        assert prompt + response == both


def test_new_model_depends_on_its_seed_alone() -> None:
    tokenizer = base.train_tokenizer(world.pretraining_texts(0, 500))
    state = torch.random.get_rng_state()
    first, again, other = (base.new_model(tokenizer, seed).lm_head.weight for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_class_shares() -> None:
    planted = ["known"] * 6 + ["learnable"] * 4
    davir = [0.0, 0.1, None, 0.3, 0.0, -0.4, 0.8, 0.9, 0.7, 0.6]
    known, learnable = truth.class_shares(planted, davir, [False] * 6 + [True] * 3 + [False], seed=0)
    assert (known.name, known.rows, known.share_of_all, known.share_of_selected) == ("known", 6, 0.6, 0.0)
    assert known.mean_davir == pytest.approx(0.0)
    assert (learnable.name, learnable.rows, learnable.share_of_selected) == ("learnable", 4, 1.0)
    assert learnable.mean_davir == pytest.approx(0.75)
    assert known.share_of_random + learnable.share_of_random == pytest.approx(1)


def test_random_control_is_seeded_and_takes_no_row_without_a_score() -> None:
    planted = ["known"] * 50 + ["noise"] * 50
    davir = [None] * 50 + [0.1] * 50
    selected = [False] * 50 + [True] * 20 + [False] * 30
    shares = truth.class_shares(planted, davir, selected, seed=3)
    assert shares == truth.class_shares(planted, davir, selected, seed=3)
    assert [share.share_of_random for share in shares] == [0.0, 1.0]
    assert shares[0].mean_davir is None


def test_random_control_has_the_composition_of_the_whole_on_average() -> None:
    planted = ["known"] * 300 + ["learnable"] * 100
    draws = [
        truth.class_shares(planted, [0.0] * 400, [True] * 80 + [False] * 320, seed)[1].share_of_random
        for seed in range(200)
    ]
    assert sum(draws) / len(draws) == pytest.approx(0.25, abs=0.02)


def test_class_shares_refuses_an_empty_selection() -> None:
    with pytest.raises(ValueError, match="no row is selected"):
        truth.class_shares(["known"], [0.1], [False], seed=0)


def test_the_table_shows_every_class_by_every_way() -> None:
    planted, davir = ["known", "noise", "learnable"], [0.1, None, 0.5]
    ways = [
        truth.Way(
            title=title,
            run=Run.at(f"/somewhere/{title}"),
            shares=truth.class_shares(planted, davir, [at == chosen for at in range(3)], seed=0),
            auroc=auroc,
        )
        for title, chosen, auroc in (("seen", 0, 0.25), ("unseen", 2, 1.0))
    ]
    table = truth.format_truth(ways, 12.3)
    lines = [line.split() for line in table.splitlines() if line.strip()]
    assert lines[0] == ["class", "rows", "random", "seen", "unseen"]
    assert sorted(words[2] for words in lines[1:4]) == ["0.0%", "0.0%", "100.0%"], "one row is drawn at random"
    assert [[*words[:2], *words[3:]] for words in lines[1:4]] == [
        ["known", "1", "100.0%", "0.0%"],
        ["learnable", "1", "0.0%", "100.0%"],
        ["noise", "1", "0.0%", "0.0%"],
    ]
    assert lines[4][-2:] == ["0.25", "1.00"]
    assert "/somewhere/seen/report.html" in table
    assert "/somewhere/unseen/report.html" in table
