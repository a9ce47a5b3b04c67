"""The study's pools: their classes, exchanged answers and versions, counted from the rows themselves."""

import json
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from davir_ray.errors import DataError
from davir_ray.study.pools import PoolRow, PoolSize, Rows, make_pool, read_rows

SIZE = PoolSize(clean=30, clean_copies=5, rare=4, exchanged=12, exchanged_copies=6, exchanged_near=7)
WORDS = [f"word{number}" for number in range(40)]


def made_rows(num_rows: int) -> Rows:
    """Rows whose response names its own number, and has as many words as the number says."""
    rows = [
        (f"Prompt {number} {' '.join(WORDS[:12])}\n", f"answer{number} {' '.join(WORDS[: 19 + number % 20])}")
        for number in range(num_rows)
    ]
    rare = [(f"Rare {number}\n", f"rare{number}") for number in range(9)]
    return Rows(for_base=[], held_out=[], for_pools=rows, rare=rare)


@pytest.fixture(scope="module")
def pool() -> list[PoolRow]:
    return make_pool(made_rows(80), SIZE, replicate=0)


def answers_itself(row: PoolRow) -> bool:
    number = next(word for word in row.prompt.split() if word.isdigit())
    return row.response.startswith((f"answer{number} ", f"rare{number}"))


def test_a_pool_has_every_class_with_its_copies(pool: list[PoolRow]) -> None:
    assert Counter(row.planted_class for row in pool) == {
        "clean": 30, "clean_copies": 20, "rare": 4, "exchanged": 12, "exchanged_copies": 24, "exchanged_near": 28,
    }  # fmt: skip
    groups = defaultdict(list)
    for row in pool:
        groups[row.group].append(row)
    assert len(groups) == 30 + 5 + 4 + 12 + 6 + 7
    for rows in groups.values():
        assert len({row.planted_class for row in rows}) == 1
        num_texts = len({(row.prompt, row.response) for row in rows})
        assert num_texts == (4 if rows[0].planted_class == "exchanged_near" else 1)


def test_exchanged_rows_have_the_answer_of_another_about_as_long_and_others_their_own(pool: list[PoolRow]) -> None:
    for row in pool:
        assert answers_itself(row) == (not row.planted_class.startswith("exchanged"))
    exchanged = [row for row in pool if row.planted_class in ("exchanged", "exchanged_copies")]
    assert len({row.response.split()[0] for row in exchanged}) == len({row.group for row in exchanged})
    for row in exchanged:
        own = next(int(word) for word in row.prompt.split() if word.isdigit())
        assert abs(len(row.response.split()) - (20 + own % 20)) <= 12


def test_versions_have_nearly_the_same_5_grams(pool: list[PoolRow]) -> None:
    def grams(row: PoolRow) -> set[tuple[str, ...]]:
        words = f"{row.prompt} {row.response}".lower().replace(".", "").replace(":", "").split()
        return {tuple(words[at : at + 5]) for at in range(len(words) - 4)}

    near = [row for row in pool if row.planted_class == "exchanged_near"]
    for row in near:
        others = [grams(other) for other in near if other.group == row.group]
        assert all(len(grams(row) & other) / len(grams(row) | other) >= 0.7 for other in others)


def test_replicates_differ_and_one_is_the_same_again(pool: list[PoolRow]) -> None:
    rows = made_rows(80)
    assert make_pool(rows, SIZE, replicate=0) == pool
    assert {row.prompt for row in make_pool(rows, SIZE, replicate=1)} != {row.prompt for row in pool}


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(DataError, match="a pool needs 60 rows and 4 rare ones, and there are 59 and 9"):
        make_pool(made_rows(59), SIZE, replicate=0)


def test_the_rows_of_base_held_out_set_and_pools_are_different_and_fit(tmp_path: Path) -> None:
    rows = [
        {"instruction": f"Say {number}", "input": "now" * (number % 2), "output": "yes " * (1 + number % 50)}
        for number in range(300)
    ]
    (tmp_path / "alpaca.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rare = [{"question": "How many?", "answer": "word " * 79}, {"question": "And?", "answer": "word " * 81}]
    (tmp_path / "rare.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rare))
    found = read_rows(tmp_path / "alpaca.jsonl", tmp_path / "rare.jsonl", num_for_base=120, num_held_out=10)
    assert (len(found.for_base), len(found.held_out), len(found.rare)) == (120, 10, 1)
    parts = [{prompt for prompt, _ in part} for part in (found.for_base, found.held_out, found.for_pools)]
    assert sum(map(len, parts)) == len(set.union(*parts))
    assert all(8 <= len(response.split()) <= 40 for _, response in found.held_out + found.for_pools)
    assert sum(8 <= len(response.split()) <= 40 for _, response in found.for_base) == max(12, 120 - 102)
