"""Rows for a clone without DAVIR_TEST_DATA: real ones of GSM8K, and the same text in the forms of other formats."""

import gzip
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

ROWS = Path(__file__).parent / "rows"

TASKS = (
    ("Solve the problem.", "{question}", "{answer}"),
    ("{question}", "", "{answer}"),
    ("Which number is the answer to this problem?", "{question}", "{number}"),
    ("Name the first step of the solution.", "{question}", "{first}"),
    ("Repeat the last sentence of the text.", "{question}", "{last}"),
    ("Write the text without its last sentence.", "{question}", "{begin}"),
    ("How many words has this text?\n\n{question}", "", "It has {words} words."),
    ("Write the problem that this is the solution of.", "{answer}", "{question}"),
)
"""Instruction, input and output of the instructions made of one row."""


def write_rows(folder: Path) -> None:
    """Write files of the names that DAVIR_TEST_DATA has."""
    for name in ("gsm8k_train", "gsm8k_test"):
        shutil.copy(ROWS / f"{name}.jsonl.gz", folder)
    problems = list(read_lines(ROWS / "gsm8k_train.jsonl.gz"))
    _write(folder / "alpaca_9k.jsonl.gz", _instructions(problems))
    _write(folder / "hh_harmless_pairs_1k.jsonl.gz", _pairs(problems))


def read_lines(file: Path) -> Iterator[dict[str, str]]:
    """The rows of a compressed file of JSON lines."""
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def _write(file: Path, rows: Iterable[dict[str, str]]) -> None:
    with gzip.open(file, "wt", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows)


def _instructions(problems: list[dict[str, str]]) -> Iterator[dict[str, str]]:
    """Every task for every problem; neighbours have different tasks and problems. One has no output, as in Alpaca."""
    for turn in range(len(TASKS)):
        for number, problem in enumerate(problems):
            question, answer = problem["question"], problem["answer"]
            sentences = question.split(". ")
            values = {
                "question": question, "answer": answer, "number": answer.rpartition("#### ")[2],
                "first": answer.split("\n")[0], "last": sentences[-1], "begin": ". ".join(sentences[:-1]) or question,
                "words": len(question.split()),
            }  # fmt: skip
            task = TASKS[(turn + number) % len(TASKS)]
            instruction, context, output = (part.format(**values) for part in task)
            yield {"instruction": instruction, "input": context, "output": output}
    yield {"instruction": "Say nothing.", "input": "", "output": ""}


def _pairs(problems: list[dict[str, str]]) -> Iterator[dict[str, str]]:
    """Dialogues in HH's form that differ in the last answer, which is another problem's; one answer is empty."""
    for number, problem in enumerate(problems):
        following = problems[(number + 1) % len(problems)]
        before = ""
        if number % 3 == 0:  # an exchange before it, which both have
            before = f"\n\nHuman: {following['question']}\n\nAssistant: {following['answer']}"
        prompt = f"{before}\n\nHuman: {problem['question']}\n\nAssistant:"
        yield {"chosen": f"{prompt} {problem['answer']}", "rejected": f"{prompt} {problems[number - 1]['answer']}"}
    yield {"chosen": "\n\nHuman: Hello?\n\nAssistant: Hello.", "rejected": "\n\nHuman: Hello?\n\nAssistant:"}
