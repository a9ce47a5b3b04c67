"""A repeated id is found wherever the two rows lie."""

from collections.abc import Callable

import numpy as np
import pytest

from davir_ray.errors import IntegrityError
from davir_ray.run.folder import Run
from davir_ray.stages import ids as module
from davir_ray.stages.ids import check_ids

MakeScores = Callable[..., Run]

pytestmark = pytest.mark.usefixtures("ray_session")


def check(run: Run) -> None:
    scored = run.manifest("score")
    assert scored is not None
    check_ids(run / "scores", scored.files_in("scores"))


@pytest.mark.parametrize("ids_per_part", [50, 10**6])
@pytest.mark.parametrize("rows", [5, 300])
def test_two_rows_with_the_same_id_are_found_whatever_their_values(
    make_scores: MakeScores, monkeypatch: pytest.MonkeyPatch, rows: int, ids_per_part: int
) -> None:
    monkeypatch.setattr(module, "_IDS_PER_PART", ids_per_part)
    ids = np.random.default_rng(0).integers(0, 2**63 - 1, rows).tolist()
    check(make_scores(np.linspace(1, 0, rows), example_id=ids, name="distinct"))
    ids[-1] = ids[0]
    with pytest.raises(IntegrityError, match=f"the same example_id {ids[0]}"):
        check(make_scores(np.linspace(1, 0, rows), example_id=ids, name="repeated"))
