"""The anchor's rows under each reference: the bits that a scorer with that reference gives, and why a row has none."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from scoring_tables import scoring_table

from davir_ray.models.anchor_scorer import EXAMPLE_COLUMNS, AnchorScorer
from davir_ray.models.checkpoint import Checkpoint
from davir_ray.models.scorer import FOLD, Scorer, ScorerSettings
from davir_ray.schema import ANCHORED

SETTINGS = ScorerSettings()


def with_scores(examples: pa.Table, fold: int, base_nll: pa.Array, status: list[str]) -> pa.Table:
    table = examples.select(EXAMPLE_COLUMNS).append_column("base_nll", base_nll)
    table = table.append_column("status", pa.array(status))
    return table.append_column(FOLD, pa.array([fold] * table.num_rows, pa.int8()))


def drawn(num_rows: int = 8) -> pa.Table:
    draw = np.random.default_rng(0)
    lengths = draw.integers(6, 60, num_rows)
    return scoring_table([(draw.integers(3, 700, length), [int(length) // 2, int(length)]) for length in lengths])


def test_a_reference_gives_the_anchor_the_bits_that_it_gives_its_own_fold(
    base_folder: Path, make_checkpoint: Callable[[int], Path]
) -> None:
    base = Checkpoint.find(str(base_folder))
    references = {fold: Checkpoint.find(str(make_checkpoint(20 + fold))) for fold in range(3)}
    scorer, examples = AnchorScorer(base, references, SETTINGS), drawn()
    for fold in (1, 2, 1):
        expected = Scorer(base, references[fold], SETTINGS)(examples)
        found = scorer(with_scores(examples, fold, expected["base_nll"], ["ok"] * 8))
        assert found.select(ANCHORED.names).schema.equals(ANCHORED)
        for name in ("example_id", "num_response_tokens", "base_nll", "reference_nll", "davir", "status"):
            assert found[name].equals(expected[name]), name
        assert found["scored_by"].to_pylist() == [fold] * 8


def test_a_row_without_a_score_says_why(base_folder: Path, make_checkpoint: Callable[[int], Path]) -> None:
    """What the base found stays; a failure of the first reference is none of another."""
    references = {fold: Checkpoint.find(str(make_checkpoint(20 + fold))) for fold in range(2)}
    scorer = AnchorScorer(Checkpoint.find(str(base_folder)), references, SETTINGS)
    given = [(2.0, "ok"), (None, "non_finite_nll"), (0.0, "zero_base_nll"), (3.0, "non_finite_nll")]
    base_nll, status = zip(*given, strict=True)
    found = scorer(with_scores(drawn(4), 1, pa.array(base_nll, pa.float64()), list(status)))
    assert found["status"].to_pylist() == ["ok", "non_finite_nll", "zero_base_nll", "ok"]
    assert [value is None for value in found["davir"].to_pylist()] == [False, True, True, False]
    nll = found["reference_nll"].to_pylist()
    assert found["davir"].to_pylist()[3] == pytest.approx(1 - nll[3] / 3)
