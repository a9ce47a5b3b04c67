"""What joins rows is what their records say, whatever was written around it."""

import json
from typing import Any

import pyarrow as pa
import pytest

from davir_ray.config.prepare import PrepareConfig
from davir_ray.config.sources import Format, Source
from davir_ray.data.formats import ALPACA_PROMPT_WITHOUT_INPUT
from davir_ray.stages.joins import MIN_RESPONSE_TOKENS, NONE, Texts

QUESTION, ANSWER = "Name three rivers of Europe, please!", "The Danube, the Rhine and the Elbe are three of them."
TALK = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]


def keys(
    form: Format, prompt: str, response: str, record: Any = None, *, num_tokens: int = 30, options: Any = None
) -> tuple[dict[str, Any], int]:
    """The keys of one row, and the number of those whose text is known only as it was rendered."""
    texts = Texts(
        sources=[Source(name="s", path="unused", format=form)],
        options=PrepareConfig(**(options or {})),
        needs_text=True,
    )
    text = None if record is None else json.dumps(record)
    row = {"example_id": 7, "source": "s", "num_response_tokens": num_tokens}
    table = pa.Table.from_pylist([row | {"prompt": prompt, "response": response, "record": text}])
    table = table.set_column(2, "num_response_tokens", table["num_response_tokens"].cast(pa.int32()))
    found, num_not_read = texts.keys(table.set_column(5, "record", table["record"].cast(pa.string())))
    return found.to_pylist()[0], num_not_read


def test_a_frame_and_a_template_are_no_text_of_the_row() -> None:
    bare, _ = keys("prompt_response", QUESTION, ANSWER)
    framed = ALPACA_PROMPT_WITHOUT_INPUT.format(instruction=QUESTION)
    alpaca = {"instruction": QUESTION, "input": "", "output": ANSWER}
    assert keys("alpaca", framed, ANSWER) == (bare, 0)
    assert keys("alpaca", framed, ANSWER, alpaca) == (bare, 0)
    assert keys("messages", f"<user>{QUESTION}<assistant>", ANSWER, {"messages": TALK}) == (bare, 0)
    rendered, num_not_read = keys("messages", f"<user>{QUESTION}<assistant>", ANSWER)
    assert num_not_read == 1
    assert rendered["response"] == bare["response"]
    assert rendered["prompt"] != bare["prompt"]


def test_case_and_punctuation_make_no_other_text() -> None:
    bare, _ = keys("prompt_response", QUESTION, ANSWER)
    assert keys("prompt_response", QUESTION.upper().replace(",", " "), ANSWER.replace(".", "?!"))[0] == bare
    assert keys("prompt_response", QUESTION.replace("three", "four"), ANSWER)[0]["prompt"] != bare["prompt"]


def test_what_says_too_little_joins_nothing() -> None:
    for num_tokens, joins in ((MIN_RESPONSE_TOKENS, True), (MIN_RESPONSE_TOKENS - 1, False)):
        found, _ = keys("prompt_response", QUESTION, ANSWER, num_tokens=num_tokens)
        assert (found["response"] != NONE) == joins
        assert found["prompt"] != NONE
    empty, _ = keys("prompt_response", " ?!", ANSWER)
    assert empty["prompt"] == NONE
    nothing, _ = keys("prompt_response", "", "…")
    assert nothing["copy"] == nothing["response"] == NONE
    assert nothing["grams"] == nothing["bands"] == []


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 4, 7, 8, 1000, 1024])
def test_lengths_of_as_many_bits_are_one_stratum(num_tokens: int) -> None:
    assert keys("prompt_response", QUESTION, ANSWER, num_tokens=num_tokens)[0]["stratum"] == num_tokens.bit_length()
