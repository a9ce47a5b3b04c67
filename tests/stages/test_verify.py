"""verify: by how much a stored loss may differ from a plain one. What it finds in a run is in test_pipeline.py."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from davir_ray.errors import IntegrityError
from davir_ray.run.manifest import Manifest
from davir_ray.stages.verify import Verification, _compare

TOKENS = np.array([10, 4, 1])
BASE = np.array([30.0, 9.0, 2.5])
REFERENCE = np.array([20.0, 7.0, 1.0])


def compared(weights: list[str], base: Any = BASE, reference: Any = REFERENCE) -> Verification:
    """Stored losses beside the plain ones BASE and REFERENCE, with the dtypes that shards were computed in."""
    rows = {
        "example_id": [1, 2, 3],
        "num_response_tokens": TOKENS,
        "base_nll": base,
        "reference_nll": reference,
        "davir": 1 - reference / base,
    }
    numerics = {"numerics": [{"weights": name} for name in weights]}
    scored = Manifest(stage="score", fingerprint={}, counts={"scored": 3}, files=[], details=numerics)
    return _compare(pa.table(rows), (BASE, REFERENCE), scored, 7, 0.5)


@pytest.mark.parametrize("which", ["base", "reference"])
@pytest.mark.parametrize(
    ("weights", "most"),
    [(["float64"], 2e-3), (["float32"], 2e-3), (["bfloat16"], 0.3), (["bfloat16", "float32"], 0.3)],
    ids=["float64", "float32", "bfloat16", "some shards in bfloat16"],
)
def test_a_loss_may_differ_by_the_rounding_of_the_coarsest_dtype_for_each_token(
    which: str, weights: list[str], most: float
) -> None:
    plain = {"base": BASE, "reference": REFERENCE}[which]
    for row, tokens in enumerate(TOKENS):
        for sign in (-1, 1):
            change = np.zeros(3)
            change[row] = sign * most * tokens
            found = compared(weights, **{which: plain + 0.9 * change})
            assert found.largest_nll_difference == pytest.approx(0.9 * most)
            with pytest.raises(IntegrityError, match=rf"of example {row + 1} differ by .* \(more than {most:g} for "):
                compared(weights, **{which: plain + 1.1 * change})


def test_a_loss_that_is_nan_is_found() -> None:
    with pytest.raises(IntegrityError, match="of example 2 differ by nan"):
        compared(["bfloat16"], reference=np.where(TOKENS == 4, np.nan, REFERENCE))


def test_equal_losses_agree_in_everything() -> None:
    found = compared(["float32"])
    assert (found.num_files, found.num_rows, found.top_k) == (7, 3, 2)
    assert found.largest_nll_difference == 0
    assert found.largest_davir_difference < 1e-15
    assert found.rank_correlation == pytest.approx(1)
    assert found.overlap == 1


def test_the_best_that_are_others_by_plain_losses_are_counted() -> None:
    found = compared(["bfloat16"], reference=REFERENCE + np.array([2.9, -1.1, 0]))  # the first two change places
    assert (found.top_k, found.overlap) == (2, 0.5)
    assert found.rank_correlation == pytest.approx(0.5)
