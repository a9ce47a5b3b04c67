"""IFD against a loop over transformers' own forward in float64, and what a row without a value is told."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
import torch
from families import EXPERTS, PACKABLE, UNPACKABLE, Example, config_of, draw_examples, make
from scoring_tables import scoring_table
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from davir_ray.models import response_scorer
from davir_ray.models.base_cache import BaseCache
from davir_ray.models.checkpoint import Checkpoint
from davir_ray.models.response_scorer import ResponseScorer, start_id_of
from davir_ray.models.scorer import ScorerSettings
from davir_ray.run.location import Location
from davir_ray.schema import IFD

START = 1
Floats = npt.NDArray[np.float64]


def loss(model: Any, ids: list[int], scored: list[int]) -> float:
    """Summed nats of the tokens at these positions, one after the other."""
    with torch.no_grad():
        logits_TV = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double()
    logprobs_TV = torch.log_softmax(logits_TV, dim=-1)
    return sum(-float(logprobs_TV[at - 1, ids[at]]) for at in scored)


def written_out(folder: Path, examples: list[Example], attention: str) -> tuple[Floats, Floats, Floats]:
    """Losses with and without the prompt, and scored tokens, of each example, by a float64 copy of the model."""
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention, dtype=torch.float64).eval()
    rows = []
    for ids_T, spans in examples:
        ids = [int(token) for token in ids_T]
        scored = [
            at for at in range(len(ids)) if any(a <= at < b for a, b in zip(spans[::2], spans[1::2], strict=True))
        ]
        alone = [START] + [ids[at] for at in scored]
        rows.append((loss(plain, ids, scored), loss(plain, alone, list(range(1, len(alone)))), len(scored)))
    with_prompt, without, counts = np.array(rows, dtype=np.float64).T
    return with_prompt, without, counts


def scored_table(examples: Any, base_nll: Any, status: list[str] | None = None) -> pa.Table:
    table = scoring_table(examples)
    table = table.append_column("base_nll", pa.array(base_nll, pa.float64(), from_pandas=True))
    return table.append_column("status", pa.array(status or ["ok"] * len(examples)))


def values(table: pa.Table, name: str) -> Floats:
    return np.array(table[name].to_pylist(), dtype=np.float64)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    def save(family: str) -> Path:
        folder = tmp_path_factory.mktemp(family)
        make(config_of(family)).save_pretrained(folder)
        return folder

    return save


@pytest.mark.parametrize("family", [name for name in (*PACKABLE, "Bloom") if name not in EXPERTS])
def test_ifd_is_that_of_a_float64_loop(folder_of: Callable[[str], Path], family: str) -> None:
    """For examples of one and of several spans, of one scored token, and with and without a token after the last."""
    assert family in PACKABLE | UNPACKABLE
    folder, examples = folder_of(family), draw_examples()
    assert len({len(spans) for _, spans in examples}) > 1
    with_prompt, without, counts = written_out(folder, examples, "eager")
    assert np.ptp(with_prompt / without) > 0.1, "else a wrong token would not show"
    scorer = ResponseScorer(Checkpoint.find(str(folder)), ScorerSettings(precision="float64"), START)
    table = scorer(scored_table(examples, with_prompt))
    assert table.schema.equals(IFD)
    assert set(table["status"].to_pylist()) == {"ok"}
    np.testing.assert_allclose(values(table, "alone_nll"), without, rtol=1e-6)  # eager has a float32 softmax within
    np.testing.assert_allclose(values(table, "ifd"), (with_prompt / counts) / (without / counts), rtol=1e-6)
    perplexities = np.exp(with_prompt / counts) / np.exp(without / counts)
    np.testing.assert_allclose(values(table, "ifd_perplexity"), perplexities, rtol=1e-5)


def test_float64_is_exact(base_folder: Path) -> None:
    draw = np.random.default_rng(0)
    examples = [(draw.integers(3, 700, n, dtype=np.int32), (n // 3, n // 2, n - 2, n)) for n in (9, 40, 200)]
    with_prompt, without, _ = written_out(base_folder, examples, "sdpa")
    base = Checkpoint.find(str(base_folder))
    table = ResponseScorer(base, ScorerSettings(precision="float64"), START)(scored_table(examples, with_prompt))
    np.testing.assert_allclose(values(table, "alone_nll"), without, rtol=1e-10)
    np.testing.assert_allclose(values(table, "ifd"), with_prompt / without, rtol=1e-10)


def test_a_response_without_a_prompt_has_the_ratio_one(base_folder: Path) -> None:
    """Behind BOS alone nothing is conditioned on; where not even BOS is there, its first token has no loss."""
    ids, base = np.arange(3, 20, dtype=np.int32), Checkpoint.find(str(base_folder))
    example = (np.concatenate([np.array([START], np.int32), ids]), (1, 18))
    (with_prompt,), _, _ = written_out(base_folder, [example], "sdpa")
    scorer = ResponseScorer(base, ScorerSettings(precision="float64"), START)
    table = scorer(scored_table([example, (ids, (0, 17))], [with_prompt, None], ["ok", "no_predictor"]))
    np.testing.assert_allclose(values(table, "ifd")[0], 1, rtol=1e-12)
    assert table["status"].to_pylist() == ["ok", "no_predictor"]
    assert [table[name][1].as_py() for name in ("alone_nll", "ifd", "ifd_perplexity")] == [None] * 3


def test_a_response_begins_behind_bos_else_eos_else_not_at_all(
    base_folder: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    plain = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    assert start_id_of(tokenizer) == tokenizer.bos_token_id
    assert start_id_of(plain) is None
    plain.eos_token = tokenizer.eos_token
    assert start_id_of(plain) == tokenizer.eos_token_id != tokenizer.bos_token_id
    examples = draw_examples()
    table = ResponseScorer(Checkpoint.find(str(base_folder)), ScorerSettings(), None)(scored_table(examples, [9.0] * 6))
    assert table["status"].to_pylist() == ["no_predictor"] * 6
    assert table["ifd"].null_count == 6


def test_a_row_without_a_value_says_why(base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Found:
        numerics: ClassVar[dict[str, Any]] = {}

        def __init__(self, *_: Any) -> None:
            pass

        def base_nll(self, *_: Any) -> tuple[Floats, npt.NDArray[Any]]:
            statuses = ["ok", "ok", "non_finite_nll", "out_of_memory", "ok", "ok"]
            return np.array([2.0, 0.0, np.nan, np.nan, 2.0, 4.0]), np.array(statuses, dtype=object)

    monkeypatch.setattr(response_scorer, "Scorer", Found)
    scorer = ResponseScorer(Checkpoint.find(str(base_folder)), ScorerSettings(), START)
    examples = [(np.array([5, 6, 7], np.int32), (1, 3))] * 6
    before = ["ok", "ok", "ok", "ok", "out_of_memory", "non_finite_nll"]  # the last one: of the reference alone
    table = scorer(scored_table(examples, [1.0, 1.0, 1.0, 1.0, None, 1.0], before))
    found = ["ok", "zero_alone_nll", "non_finite_nll", "out_of_memory", "out_of_memory", "ok"]
    assert table["status"].to_pylist() == found
    assert table["ifd"].to_pylist() == [0.5, None, None, None, None, 0.25]
    assert table["alone_nll"].to_pylist() == [2.0, 0.0, None, None, 2.0, 4.0]
    assert table["ifd_perplexity"].to_pylist() == [np.exp(-0.5), None, None, None, None, np.exp(-1.5)]


def test_a_table_without_rows_has_the_schema(base_folder: Path) -> None:
    table = scored_table([], [], []).cast(
        pa.schema([*scoring_table([]).schema, ("base_nll", "float64"), ("status", "string")])
    )
    assert ResponseScorer(Checkpoint.find(str(base_folder)), ScorerSettings(), START)(table).equals(IFD.empty_table())


def test_the_losses_are_cached_as_those_of_the_base_are(base_folder: Path, tmp_path: Path) -> None:
    base, cache = Checkpoint.find(str(base_folder)), BaseCache(Location.of(tmp_path / "cache"), "base")
    table = scored_table(draw_examples(), [9.0] * 6)
    first, again = (ResponseScorer(base, ScorerSettings(), START, cache) for _ in range(2))
    expected = first(table)
    again._scorer._base.register_forward_hook(lambda *_: pytest.fail("a pass of what the cache has"))
    assert again(table).equals(expected)
