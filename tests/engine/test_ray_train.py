"""How many workers train, and what Ray Train left in a run's folder: continued where it is whole, else removed."""

import json
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.train import WorkerGroupError

from davir_ray.config.training import FinetuneConfig
from davir_ray.engine import ray_train
from davir_ray.engine.ray_train import _SNAPSHOT, _remove_torn_state, check_workers, run_on_workers, with_workers
from davir_ray.errors import ClusterError, TrainingError
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
    ("nodes", "given", "num_workers", "use_gpu"),
    [
        ([(64, 0)], {}, 1, False),
        ([(64, 8)], {}, 8, True),
        ([(64, 8), (64, 4)], {}, 12, True),
        ([(64, 8)], {"num_workers": 2}, 2, True),
        ([(32, 8)], {"num_cpus": 8}, 4, True),
        ([(64, 8)], {"use_gpu": False}, 1, False),
        ([(64, 8)], {"use_gpu": False, "num_workers": 3}, 3, False),
    ],
)
def test_a_fine_tune_takes_every_gpu_of_the_cluster_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch,
    nodes: list[tuple[int, int]],
    given: dict[str, Any],
    num_workers: int,
    use_gpu: bool,
) -> None:
    cluster(monkeypatch, nodes)
    found = with_workers(FinetuneConfig(**given))
    assert (found.num_workers, found.use_gpu) == (num_workers, use_gpu)


def cluster(monkeypatch: pytest.MonkeyPatch, nodes: list[tuple[int, int]]) -> None:
    """A cluster whose nodes have so many CPUs and GPUs."""
    alive = [{"Alive": True, "Resources": {"CPU": cpus} | ({"GPU": gpus} if gpus else {})} for cpus, gpus in nodes]
    total = {name: float(sum(node["Resources"].get(name, 0) for node in alive)) for name in ("CPU", "GPU")}
    monkeypatch.setattr(ray, "nodes", lambda: alive)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {name: count for name, count in total.items() if count})


@pytest.mark.parametrize(
    ("nodes", "given"),
    [
        ([(8, 0)], {"num_workers": 9}),
        ([(8, 0)], {"use_gpu": True}),
        ([(4, 8), (60, 0)], {"num_workers": 8}),  # its CPUs are on another node than its GPUs
    ],
)
def test_workers_that_no_nodes_can_hold_are_refused(
    monkeypatch: pytest.MonkeyPatch, nodes: list[tuple[int, int]], given: dict[str, Any]
) -> None:
    cluster(monkeypatch, nodes)
    with pytest.raises(ClusterError, match="do not fit"):
        check_workers(FinetuneConfig(**given))


def test_a_training_that_runs_out_of_memory_for_good_says_what_to_change(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class OutOfMemory:
        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def fit(self) -> None:
            raise WorkerGroupError("torch.OutOfMemoryError: CUDA out of memory", worker_failures={})

    cluster(monkeypatch, [(8, 0)])
    monkeypatch.setattr(ray_train, "TorchTrainer", OutOfMemory)
    with pytest.raises(TrainingError, match=r"ran out of memory on a device 3 times; give --finetune.lora_rank 16"):
        run_on_workers(dict, FinetuneConfig(num_workers=1, max_failures=2), Location.of(tmp_path), "name")
