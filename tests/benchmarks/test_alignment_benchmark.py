"""The benchmark of preference training: both ways compute the same losses, and what it says is complete."""

import json
import math
from pathlib import Path

import pytest

from davir_ray.benchmarks.alignment import AlignmentBenchmark, run
from davir_ray.errors import ConfigError, DataError

RECORDS = [
    {"prompt": f"Name a city, please: number {n}.", "chosen": " Paris it is." * (1 + n % 3), "rejected": f" No {n}."}
    for n in range(6)
]


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, RECORDS)))
    return str(tmp_path / "pairs.jsonl")


@pytest.mark.slow
def test_every_way_has_the_same_losses(pairs: str) -> None:
    found = run(AlignmentBenchmark(data=pairs, pairs=5, batch_size=2, repeats=1))
    assert found["largest_difference_of_losses"] < 1e-4
    assert min(abs(loss - math.log(2)) for loss in found["losses"]) > 1e-3, "the policy has not moved"
    assert (
        found["seconds"].keys() == found["extra_memory_mib"].keys() == {"davir_ray", "trl", "trl_with_frozen_forward"}
    )
    assert found["speedup_vs_trl"] == pytest.approx(found["seconds"]["trl"] / found["seconds"]["davir_ray"])
    assert found["pairs"]["pairs"] == 5
    json.dumps(found)


def test_what_cannot_be_measured_is_told(pairs: str) -> None:
    with pytest.raises(DataError, match="has 6 pairs"):
        run(AlignmentBenchmark(data=pairs, pairs=7))
    with pytest.raises(ConfigError, match="batch_size is 0"):
        AlignmentBenchmark(batch_size=0)
