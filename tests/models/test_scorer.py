"""The scorer: one row for every example whatever it is, the same scores however they are packed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
import torch
import transformers
from scoring_tables import scoring_table
from transformers import AutoModelForCausalLM

from davir_ray.models.checkpoint import Checkpoint
from davir_ray.models.kernel.likelihood import Likelihood, Pack
from davir_ray.models.scorer import INPUT_COLUMNS, Scorer, ScorerSettings, is_sampled
from davir_ray.schema import SCORES
from davir_ray.versions import NUMERICS_VERSION

RARE = 700
"""A token that only the examples of one test hold."""
SCORED = ["base_nll", "reference_nll", "davir", "rho_sum", "rho_mean", "status"]

Sequence = tuple[npt.NDArray[np.int32], list[int]]
MakeScorer = Callable[..., Scorer]


@pytest.fixture(scope="module")
def make_scorer(base_folder: Path, reference_folder: Path) -> MakeScorer:
    def make(**settings: Any) -> Scorer:
        base, reference = (Checkpoint.find(str(folder)) for folder in (base_folder, reference_folder))
        return Scorer(base, reference, ScorerSettings(**settings))

    return make


def draw_sequences(count: int = 40, seed: int = 0) -> list[Sequence]:
    """Short and long examples, some of one response token, some of several spans; none holds the rare token."""
    draw = np.random.default_rng(seed)
    sequences: list[Sequence] = []
    for row in range(count):
        length = int(draw.integers(6, 120))
        ids = draw.integers(3, RARE, length, dtype=np.int32)
        spans = [[length - 1, length], [1, length], [2, 4, 5, length], [length // 2, length]][row % 4]
        sequences.append((ids, spans))
    return sequences


def one_at_a_time(folder: Path, sequences: list[Sequence], attention: str = "eager") -> npt.NDArray[np.float64]:
    """Summed nats by a float64 copy, one example at a time, in a Python loop."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention, dtype=torch.float64).eval()
    sums = []
    for ids, spans in sequences:
        with torch.no_grad():
            logits_TV = model(input_ids=torch.tensor(ids[None].astype(np.int64)), use_cache=False).logits[0]
        logprobs_TV = torch.log_softmax(logits_TV, dim=-1)
        scored = [at for start, end in zip(spans[::2], spans[1::2], strict=True) for at in range(start, end)]
        sums.append(sum(-float(logprobs_TV[at - 1, int(ids[at])]) for at in scored))
    return np.array(sums)


def values(table: pa.Table, name: str) -> npt.NDArray[np.float64]:
    return np.array(table[name].to_pylist(), dtype=np.float64)


def test_scores_are_those_of_a_float64_loop_over_the_models_own_forward(
    make_scorer: MakeScorer, base_folder: Path, reference_folder: Path
) -> None:
    sequences = draw_sequences()
    scores = make_scorer()(scoring_table(sequences))
    base, reference = one_at_a_time(base_folder, sequences), one_at_a_time(reference_folder, sequences)
    tokens = values(scores, "num_response_tokens")
    np.testing.assert_allclose(values(scores, "base_nll"), base, rtol=1e-5)
    np.testing.assert_allclose(values(scores, "reference_nll"), reference, rtol=1e-5)
    np.testing.assert_allclose(values(scores, "davir"), 1 - reference / base, rtol=0, atol=1e-5)
    np.testing.assert_allclose(values(scores, "rho_sum"), base - reference, rtol=0, atol=1e-5 * base.max())
    np.testing.assert_allclose(values(scores, "rho_mean"), (base - reference) / tokens, rtol=0, atol=1e-4)


def test_float64_scores_are_exact(make_scorer: MakeScorer, base_folder: Path) -> None:
    sequences = draw_sequences(count=8)
    scores = make_scorer(precision="float64")(scoring_table(sequences))
    # Not eager: that takes its softmax in float32, even in a float64 model.
    np.testing.assert_allclose(values(scores, "base_nll"), one_at_a_time(base_folder, sequences, "sdpa"), rtol=1e-10)


def test_the_columns_agree_with_each_other(make_scorer: MakeScorer) -> None:
    scores = make_scorer()(scoring_table(draw_sequences()))
    base, reference = values(scores, "base_nll"), values(scores, "reference_nll")
    np.testing.assert_array_equal(values(scores, "davir"), (base - reference) / base)
    np.testing.assert_array_equal(values(scores, "rho_sum"), base - reference)
    np.testing.assert_array_equal(
        values(scores, "rho_mean"), (base - reference) / values(scores, "num_response_tokens")
    )


def test_every_example_has_one_row_in_its_place(make_scorer: MakeScorer) -> None:
    draw = np.random.default_rng(4)
    long = draw.integers(3, RARE, 900, dtype=np.int32)
    twin = draw.integers(3, RARE, 20, dtype=np.int32)
    sequences: list[Sequence] = [
        (np.array([5, 6], np.int32), [1, 2]),
        (np.array([5, 6, 7], np.int32), [0, 3]),
        (np.array([5], np.int32), [0, 1]),
        (long, [1, 900]),
        (twin, [4, 20]),
        (twin, [5, 20]),
        (twin.copy(), [4, 20]),
        (np.array([9, 9], np.int32), []),
    ]
    table = scoring_table(sequences)
    scores = make_scorer(tokens_per_pack=256)(table)
    assert scores.schema.equals(SCORES)
    for name in INPUT_COLUMNS[:6]:
        assert scores[name].to_pylist() == table[name].to_pylist()
    unpredicted = {1, 2, 7}
    for row, found in enumerate(scores.to_pylist()):
        assert found["status"] == ("no_predictor" if row in unpredicted else "ok")
        assert all((found[name] is None) == (row in unpredicted) for name in SCORED[:-1])
    rows = scores.select(SCORED).to_pylist()
    assert rows[4] == rows[6]
    assert rows[4]["base_nll"] > rows[5]["base_nll"]  # the same tokens, one more of them scored


@pytest.mark.parametrize("sequences", [[], [(np.array([5, 6], np.int32), [0, 2])]])
def test_a_table_with_nothing_to_score_keeps_its_rows(make_scorer: MakeScorer, sequences: list[Sequence]) -> None:
    scores = make_scorer()(scoring_table(sequences))
    assert scores.schema.equals(SCORES)
    assert scores["status"].to_pylist() == ["no_predictor"] * len(sequences)


def test_no_token_budget_changes_a_score(make_scorer: MakeScorer) -> None:
    table = scoring_table(draw_sequences())
    expected = make_scorer(tokens_per_pack=1)(table)
    for budget in (256, 1024, 4096):
        scores = make_scorer(tokens_per_pack=budget)(table)
        assert scores["example_id"].equals(expected["example_id"])
        for name in ("base_nll", "reference_nll"):
            np.testing.assert_allclose(values(scores, name), values(expected, name), rtol=1e-6)


def test_the_order_of_the_rows_changes_no_bit(make_scorer: MakeScorer) -> None:
    table = scoring_table(draw_sequences())
    scorer = make_scorer(tokens_per_pack=512, keep_token_nll="all")
    order = np.random.default_rng(9).permutation(table.num_rows)
    shuffled = scorer(table.take(order))
    assert shuffled.equals(scorer(table).take(order).combine_chunks())


def test_slices_and_chunks_of_a_table_are_read_in_place(make_scorer: MakeScorer) -> None:
    table = scoring_table(draw_sequences(count=12))
    scorer = make_scorer(tokens_per_pack=1)
    whole = scorer(table)
    assert scorer(table.slice(3, 5)).equals(whole.slice(3, 5))
    assert scorer(pa.concat_tables([table.slice(0, 4), table.slice(4)])).equals(whole)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("which", ["_base", "_reference"])
def test_a_loss_that_is_not_finite_gives_a_status_and_nulls(make_scorer: MakeScorer, which: str, poison: float) -> None:
    draw = np.random.default_rng(2)
    rare: Sequence = (np.array([5, RARE, 6, 7], np.int32), [2, 4])
    sequences = [rare, *[(draw.integers(3, RARE, 9, dtype=np.int32), [3, 9]) for _ in range(3)]]
    scorer = make_scorer()
    clean = scorer(scoring_table(sequences)).to_pylist()
    with torch.no_grad():
        getattr(scorer, which).model.get_input_embeddings().weight[RARE] = poison
    first, *others = scorer(scoring_table(sequences)).to_pylist()
    assert first["status"] == "non_finite_nll"
    assert first["davir"] is first["rho_sum"] is first["rho_mean"] is None
    assert (first["base_nll"] is None, first["reference_nll"] is None) == (which == "_base", which == "_reference")
    assert others == clean[1:]


def test_a_base_loss_of_zero_gives_a_status_and_no_made_up_score(
    make_scorer: MakeScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = make_scorer()
    monkeypatch.setattr(Likelihood, "forward", lambda _self, pack: torch.zeros(sum(pack.num_scored)))
    for row in scorer(scoring_table(draw_sequences(count=5))).to_pylist():
        assert row["status"] == "zero_base_nll"
        assert row["davir"] is None
        assert row["base_nll"] == row["reference_nll"] == row["rho_sum"] == row["rho_mean"] == 0


def limit_memory(monkeypatch: pytest.MonkeyPatch, fits: Callable[[Pack], bool]) -> None:
    forward = Likelihood.forward

    def limited(self: Likelihood, pack: Pack) -> torch.Tensor:
        if not fits(pack):
            raise torch.OutOfMemoryError("no room")
        return forward(self, pack)

    monkeypatch.setattr(Likelihood, "forward", limited)


def test_a_pack_that_does_not_fit_is_halved_until_it_does(
    make_scorer: MakeScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = scoring_table(draw_sequences())
    scorer = make_scorer()
    expected = scorer(table)
    limit_memory(monkeypatch, lambda pack: len(pack.sequence_lengths) <= 3)
    scores = scorer(table)
    assert scores["status"].to_pylist() == ["ok"] * table.num_rows
    for name in ("base_nll", "reference_nll"):
        np.testing.assert_allclose(values(scores, name), values(expected, name), rtol=1e-6)


def test_a_budget_that_was_too_large_once_is_not_tried_again(
    make_scorer: MakeScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused: list[int] = []

    def fits(pack: Pack) -> bool:
        if sum(pack.sequence_lengths) <= 300:
            return True
        refused.append(sum(pack.sequence_lengths))
        return False

    scorer = make_scorer(tokens_per_pack=1000)
    limit_memory(monkeypatch, fits)
    scorer(scoring_table(draw_sequences()))
    assert refused
    refused.clear()
    scorer(scoring_table(draw_sequences(seed=1)))
    assert not refused


def test_an_example_that_does_not_fit_alone_is_named_and_costs_no_other(
    make_scorer: MakeScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequences = draw_sequences()
    longest = max(len(ids) for ids, _ in sequences)
    scorer = make_scorer(keep_token_nll="all")
    limit_memory(monkeypatch, lambda pack: max(pack.sequence_lengths) < longest)
    for (ids, _), row in zip(sequences, scorer(scoring_table(sequences)).to_pylist(), strict=True):
        assert row["status"] == ("out_of_memory" if len(ids) == longest else "ok")
        assert (row["base_nll"] is None) == (row["davir"] is None) == (len(ids) == longest)
        assert (row["base_token_nll"] is None) == (len(ids) == longest)


def test_kept_token_losses_are_as_many_as_tokens_and_sum_to_the_loss(make_scorer: MakeScorer) -> None:
    for row in make_scorer(keep_token_nll="all")(scoring_table(draw_sequences())).to_pylist():
        for model in ("base", "reference"):
            kept = row[f"{model}_token_nll"]
            assert len(kept) == row["num_response_tokens"]
            assert sum(kept) == pytest.approx(row[f"{model}_nll"], rel=1e-12)


def test_no_token_losses_are_kept_unless_wanted(make_scorer: MakeScorer) -> None:
    scores = make_scorer(keep_token_nll="none", sample_share=1.0)(scoring_table(draw_sequences(count=5)))
    assert scores["base_token_nll"].null_count == scores["reference_token_nll"].null_count == 5


def test_a_sample_keeps_the_same_rows_in_every_run(make_scorer: MakeScorer) -> None:
    table = scoring_table(draw_sequences())
    settings = {"keep_token_nll": "sample", "sample_share": 0.4}
    kept = [make_scorer(**settings)(part) for part in (table, table.slice(0, 17), table.slice(17))]
    ids = [set(scores.filter(scores["base_token_nll"].is_valid())["example_id"].to_pylist()) for scores in kept]
    assert ids[0] == ids[1] | ids[2]
    assert 0 < len(ids[0]) < table.num_rows
    assert all(scores["base_token_nll"].is_valid().equals(scores["reference_token_nll"].is_valid()) for scores in kept)


def test_a_sample_has_about_the_wanted_share_and_grows_with_it() -> None:
    ids = range(10_000)
    small, large = ({i for i in ids if is_sampled(i, share)} for share in (0.1, 0.3))
    assert small < large
    assert len(small) == pytest.approx(1000, abs=150)
    assert all(is_sampled(i, 1.0) for i in ids)
    assert not any(is_sampled(i, 0.0) for i in ids)


def test_equal_models_score_zero(base_folder: Path) -> None:
    base = Checkpoint.find(str(base_folder))
    scores = Scorer(base, base, ScorerSettings())(scoring_table(draw_sequences(count=8)))
    assert scores["davir"].to_pylist() == [0.0] * 8


def test_the_numerics_are_named(make_scorer: MakeScorer) -> None:
    assert make_scorer(num_threads=1).numerics == {
        "version": NUMERICS_VERSION,
        "device": "cpu",
        "device_name": torch.backends.cpu.get_cpu_capability(),
        "weights": "float32",
        "autocast": False,
        "logits": "float32",
        "sums": "float64",
        "threads": 1,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "base_attention": "packed",
        "reference_attention": "packed",
        "fell_back": False,
    }
