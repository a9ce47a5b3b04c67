"""The study's data: real rows, some of whose answers are exchanged or copied, in pools whose truth is known.

    class             rows in a pool       what it is
    clean             1,200                a row of the data as it is
    clean_copies      50, 4 times each     as clean: do copies alone move a score?
    rare              50                   a row of another data set, as it is: good, but of a kind that is rare here
    exchanged         100                  a row with the answer of another that is about as long
    exchanged_copies  50, 4 times each     as exchanged
    exchanged_near    50, 4 versions each  as exchanged, in versions that differ by a few words at the ends

Every replicate draws a pool of its own, and exchanges other answers, from the rows that the base was not pre-trained on
and that are not held out.
"""

import gzip
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from davir_ray.errors import DataError

PlantedClass = Literal["clean", "clean_copies", "rare", "exchanged", "exchanged_copies", "exchanged_near"]

RESPONSE_WORDS = (8, 40)
"""Fewest and most words of a response in a pool: a shorter one may be right for another prompt, a longer one costs."""

PROMPT_WORDS = 30
"""Most words of a prompt in a pool; of a rare row (and its response) twice as many."""

MOST_BASE_WORDS = 100
"""Most words of a row that the base is pre-trained on: a long one costs more than it teaches."""

NUM_COPIES = 4
_BIN_ROWS = 10
"""Rows of nearly the same response length among which answers are exchanged."""


@dataclass(frozen=True, kw_only=True)
class PoolSize:
    """Number of different rows of each class in a pool."""

    clean: int = 1200
    clean_copies: int = 50
    rare: int = 50
    exchanged: int = 100
    exchanged_copies: int = 50
    exchanged_near: int = 50


@dataclass(frozen=True, kw_only=True)
class PoolRow:
    """One row of a pool, with the truth that the scoring does not see."""

    prompt: str
    response: str
    planted_class: PlantedClass
    group: int
    """Number of the row that this one is, or is a copy or a version of."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of the study, as (prompt, response)."""

    for_base: list[tuple[str, str]]
    """The base is pre-trained on these."""
    held_out: list[tuple[str, str]]
    for_pools: list[tuple[str, str]]
    rare: list[tuple[str, str]]


def read_rows(data: Path, rare: Path, num_for_base: int, num_held_out: int) -> Rows:
    """Divide Alpaca's rows and take the rare rows from GSM8K; both are files of JSON Lines, plain or gzip.

    Rows for the base are first of all those that no pool may have because of their length.
    """
    alpaca = {_prompt(row): row["output"].strip() for row in _json_lines(data) if row["output"].strip()}
    rows = list(alpaca.items())
    order = np.random.default_rng(0).permutation(len(rows))
    fitting = [rows[at] for at in order if _fits(*rows[at])]
    others = [rows[at] for at in order if not _fits(*rows[at]) and len("".join(rows[at]).split()) <= MOST_BASE_WORDS]
    num_fitting = max(num_for_base // 10, num_for_base - len(others))
    for_base = fitting[:num_fitting] + others[: num_for_base - num_fitting]
    return Rows(
        for_base=for_base,
        held_out=fitting[num_fitting : num_fitting + num_held_out],
        for_pools=fitting[num_fitting + num_held_out :],
        rare=[
            (row["question"], row["answer"]) for row in _json_lines(rare) if _fits(row["question"], row["answer"], 2)
        ],
    )


def make_pool(rows: Rows, size: PoolSize, replicate: int) -> list[PoolRow]:
    """The pool of a replicate, in random order; DataError if there are too few rows."""
    draw = np.random.default_rng([1, replicate])
    kinds: list[tuple[PlantedClass, int]] = [
        ("clean", size.clean), ("clean_copies", size.clean_copies), ("exchanged", size.exchanged),
        ("exchanged_copies", size.exchanged_copies), ("exchanged_near", size.exchanged_near),
    ]  # fmt: skip
    num_needed = sum(count for _, count in kinds)
    if len(rows.for_pools) < num_needed or len(rows.rare) < size.rare:
        raise DataError(
            f"a pool needs {num_needed} rows and {size.rare} rare ones, and there are {len(rows.for_pools)} and "
            f"{len(rows.rare)} of a fitting length; give more data"
        )
    drawn = [rows.for_pools[at] for at in draw.permutation(len(rows.for_pools))[:num_needed]]
    classes = [kind for kind, count in kinds for _ in range(count)]
    noisy = [at for at, kind in enumerate(classes) if kind.startswith("exchanged")]
    for at, answered in zip(noisy, _exchanged([drawn[at] for at in noisy]), strict=True):
        drawn[at] = answered
    drawn += [rows.rare[at] for at in draw.permutation(len(rows.rare))[: size.rare]]
    classes += ["rare"] * size.rare
    pool = [
        PoolRow(prompt=prompt, response=response, planted_class=planted, group=group)
        for group, (row, planted) in enumerate(zip(drawn, classes, strict=True))
        for prompt, response in _versions(row, planted)
    ]
    return [pool[at] for at in draw.permutation(len(pool))]


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as JSON Lines for the format prompt_response; those of a pool have the truth in further columns."""
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    partial.replace(path)


def _exchanged(rows: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Give each row the answer of the next in its bin of rows with nearly as many words; a bin has at least two."""
    by_length = sorted(range(len(rows)), key=lambda at: len(rows[at][1].split()))
    answered = list(rows)
    num_bins = max(1, len(rows) // _BIN_ROWS)
    for members in np.array_split(np.array(by_length), num_bins):
        for at, other in zip(members, np.roll(members, 1), strict=True):
            answered[at] = (rows[at][0], rows[other][1])
    return answered


def _versions(row: tuple[str, str], planted: PlantedClass) -> list[tuple[str, str]]:
    """The row as often as its class has it; a word at the end of a text is in one 5-gram, so versions are near."""
    prompt, response = row
    if planted == "exchanged_near":
        return [
            row,
            (f"Please: {prompt}", response),
            (prompt, f"{response} Thanks."),
            (f"Now: {prompt}", f"{response} OK."),
        ]
    return [row] * (NUM_COPIES if planted.endswith("copies") else 1)


def _prompt(row: dict[str, Any]) -> str:
    parts = [row["instruction"].strip(), row["input"].strip()]
    return "".join(f"{part}\n" for part in parts if part)


def _fits(prompt: str, response: str, times: int = 1) -> bool:
    least, most = RESPONSE_WORDS
    return least <= len(response.split()) <= times * most and len(prompt.split()) <= times * PROMPT_WORDS


def _json_lines(path: Path) -> list[dict[str, Any]]:
    content = path.read_bytes()
    text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
    return [json.loads(line) for line in text.split("\n") if line.strip()]
