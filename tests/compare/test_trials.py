"""How many fine-tunes of a comparison run side by side, and what one that fails means for the others."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from davir_ray.compare.trials import plan_trials, run_trials
from davir_ray.config.scoring import ScoreConfig
from davir_ray.config.training import FinetuneConfig
from davir_ray.engine.trackers import EVENTS, Step
from davir_ray.errors import ConfigError, StorageError, TrainingError
from davir_ray.run.folder import Run


def cluster(monkeypatch: pytest.MonkeyPatch, num_nodes: int, **of_a_node: float) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": of_a_node}] * num_nodes)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {name: num_nodes * n for name, n in of_a_node.items()})


@pytest.mark.parametrize(
    ("nodes", "node", "workers", "at_once", "actors"),
    [
        (1, {"CPU": 3.0}, 1, 2, 1),  # one CPU is left for reading and writing
        (1, {"CPU": 9.0}, 4, 2, 4),
        (2, {"CPU": 64.0, "GPU": 8.0}, 8, 2, 8),
        (2, {"CPU": 64.0, "GPU": 8.0}, 1, 16, 1),
        (1, {"CPU": 2.0}, 2, 1, 1),
    ],
)
def test_arms_run_side_by_side_where_training_and_scoring_have_room(
    monkeypatch: pytest.MonkeyPatch, nodes: int, node: dict[str, float], workers: int, at_once: int, actors: int
) -> None:
    cluster(monkeypatch, nodes, **node)
    recipe = FinetuneConfig(num_workers=workers)
    found, pool = plan_trials(recipe, ScoreConfig(autoscale=[1, 8]), None)
    assert (found, pool.num_actors, pool.autoscale) == (at_once, actors, None)
    assert plan_trials(recipe, ScoreConfig(), 1)[0] == 1
    with pytest.raises(ConfigError, match=f"arms_at_once is {at_once + 1}, but the cluster has room for {at_once}:"):
        plan_trials(recipe, ScoreConfig(), at_once + 1)


def trials(*errors: Exception | None, folder: str = "memory://trials") -> list[Any]:
    """Stand-ins that end at once, each with an error or without."""

    @dataclass
    class Ending:
        name: str
        error: Exception | None
        run: Run
        steps: Any = None

        def completed(self) -> None:
            return None

        def train_and_measure(self) -> None:
            for step in (1, 2):
                if self.steps is not None:
                    self.steps.add(Step(self.name, step, {"train/loss": 1 / step}))
            if self.error:
                raise self.error

    return [Ending(f"arm-{at}", error, Run.at(f"{folder}/arm-{at}")) for at, error in enumerate(errors)]


def test_a_fine_tune_that_diverges_lets_the_others_end_and_is_named(ray_session: None) -> None:
    complete: list[int] = []
    with pytest.raises(TrainingError, match=r"1 of 3 fine-tunes failed.*arm-0: the loss is nan.*out of --arms"):
        run_trials(trials(TrainingError("the loss is nan"), None, None), 1, complete.append)
    assert complete == [0, 1, 2]


def test_a_failure_that_is_not_an_arms_own_ends_all(ray_session: None) -> None:
    complete: list[int] = []
    with pytest.raises(StorageError, match="arm-1: the store is away"):
        run_trials(trials(None, StorageError("the store is away"), None), 1, complete.append)
    assert complete == [0, 1]


def test_each_trial_has_a_tracking_run_of_its_own(ray_session: None, tmp_path: Path) -> None:
    made = trials(None, TrainingError("the loss is nan"), None, folder=str(tmp_path))
    with pytest.raises(TrainingError):
        run_trials(made, 2, lambda done: None, "tensorboard")
    for number in range(3):
        (folder,) = (tmp_path / f"arm-{number}" / EVENTS).iterdir()
        events = EventAccumulator(str(folder))
        events.Reload()
        assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 1.0), (2, 0.5)]
