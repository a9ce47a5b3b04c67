"""How many workers train, and what Ray Train left in a run's folder: continued where it is whole, else removed."""

import json
from pathlib import Path

import pytest
import ray

from davir_ray.config.training import FinetuneConfig
from davir_ray.engine.ray_train import _SNAPSHOT, _remove_torn_state, with_workers
from davir_ray.run.location import Location

WHOLE = json.dumps({"checkpoint_results": [{"checkpoint_dir_name": "checkpoint_1"}]})


@pytest.fixture
def state(tmp_path: Path) -> Path:
    (tmp_path / "state" / "checkpoint_1").mkdir(parents=True)
    (tmp_path / "state" / "checkpoint_1" / "training_state.pt").write_bytes(b"weights")
    (tmp_path / "state" / _SNAPSHOT).write_text(WHOLE)
    return tmp_path / "state"


def test_a_whole_list_of_checkpoints_is_left_alone(state: Path) -> None:
    _remove_torn_state(Location.of(state))
    assert (state / "checkpoint_1" / "training_state.pt").read_bytes() == b"weights"


def test_a_folder_that_ray_train_has_not_written_is_left_alone(tmp_path: Path) -> None:
    _remove_torn_state(Location.of(tmp_path / "state"))
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize(
    "content", [WHOLE[:20], "", "{}", '{"checkpoint_results": 3}', WHOLE.replace("checkpoint_1", "checkpoint_2")]
)
def test_a_torn_list_of_checkpoints_is_removed_with_its_folder(state: Path, content: str) -> None:
    (state / _SNAPSHOT).write_text(content)
    _remove_torn_state(Location.of(state))
    assert not state.exists()


@pytest.mark.parametrize(
    ("num_gpus", "given", "num_workers", "use_gpu"),
    [
        (0, {}, 1, False),
        (8, {}, 8, True),
        (8, {"num_workers": 2}, 2, True),
        (8, {"use_gpu": False}, 1, False),
        (8, {"use_gpu": False, "num_workers": 3}, 3, False),
    ],
)
def test_a_fine_tune_takes_every_gpu_of_the_cluster_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, num_gpus: int, given: dict[str, int], num_workers: int, use_gpu: bool
) -> None:
    resources = {"CPU": 64.0} | ({"GPU": float(num_gpus)} if num_gpus else {})
    monkeypatch.setattr(ray, "cluster_resources", lambda: resources)
    found = with_workers(FinetuneConfig(**given))  # type: ignore[arg-type]
    assert (found.num_workers, found.use_gpu) == (num_workers, use_gpu)
