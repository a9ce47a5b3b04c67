"""Fine-tunes in the process that starts them, for tests that need only what one makes: Ray Train starts six others."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import ray.train
from ray import cloudpickle

from davir_ray.compare.trials import Trial
from davir_ray.config.training import FinetuneConfig
from davir_ray.engine.progress import ProgressCounter
from davir_ray.run.location import Location
from davir_ray.run.manifest import Manifest
from davir_ray.stages import finetune, training_worker
from davir_ray.stages.fold_training import FoldTraining

# By name a worker could not import it.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


class OnlyRank:
    """The context of a group of one."""

    def get_world_rank(self) -> int:
        return 0


def _run_here(
    work: Callable[[], dict[str, Any]], config: FinetuneConfig, storage: Location, name: str
) -> dict[str, Any]:
    assert config.num_workers == 1
    result: dict[str, Any] = json.loads(json.dumps(work()))  # as it comes from the workers
    return result


@contextmanager
def without_ray_train() -> Iterator[None]:
    """A fine-tune with one worker takes its steps in this process, from the first one and without a checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune, "run_on_workers", _run_here)
        patch.setattr(ray.train, "get_checkpoint", lambda: None)
        patch.setattr(ray.train, "get_context", OnlyRank)
        patch.setattr(training_worker.Checkpoints, "is_due", lambda *_: False)
        yield


def run_trial(trial: Trial) -> None:
    """In place of the function that is a trial's task."""
    with without_ray_train():
        trial.train_and_measure()


def train_fold(training: FoldTraining, counter: ProgressCounter) -> tuple[int, Manifest]:
    """In place of the function that is the task of a fold's training."""
    with without_ray_train():
        return training.fold, training(counter)
