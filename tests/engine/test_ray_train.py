"""What Ray Train left in a run's folder: continued from where it is whole, removed where it is torn."""

import json
from pathlib import Path

import pytest

from davir_ray.engine.ray_train import _SNAPSHOT, _remove_torn_state
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
