"""Running a function on Ray Train's workers; it continues from a checkpoint after a worker or the driver died."""

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.fs
import ray.train
from ray import cloudpickle
from ray.train.torch import TorchTrainer

from davir_ray import errors
from davir_ray.config.training import SAVE_MEMORY, FinetuneConfig
from davir_ray.engine.connect import own_errors, own_interrupts
from davir_ray.engine.console import configure_worker_logging
from davir_ray.engine.resources import has_gpu
from davir_ray.errors import ClusterError, DavirError, StorageError, TrainingError
from davir_ray.run.location import Location
from davir_ray.run.storage_errors import storage_errors

log = logging.getLogger(__name__)

_OUTCOME = "outcome.json"
"""What rank 0 returned, or the DavirError that ended training. A worker does not raise it, because Ray Train
would treat the worker as lost and start training again."""

_SNAPSHOT = "checkpoint_manager_snapshot.json"
"""Ray Train's list of checkpoints."""


def trains_on_gpus(config: FinetuneConfig) -> bool:
    """Whether each worker has a GPU."""
    return has_gpu() if config.use_gpu is None else config.use_gpu


def with_workers(config: FinetuneConfig) -> FinetuneConfig:
    """The settings with the number of workers and their device, where they follow the cluster."""
    use_gpu = trains_on_gpus(config)
    room = room_for_workers(config.num_cpus, use_gpu=True) if use_gpu else 1
    return replace(config, use_gpu=use_gpu, num_workers=config.num_workers or max(1, room))


def room_for_workers(num_cpus: int, *, use_gpu: bool) -> int:
    """The number of training workers that fit the nodes."""
    wanted = {"CPU": num_cpus} | ({"GPU": 1} if use_gpu else {})
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(min(int(node.get(name, 0) // size) for name, size in wanted.items()) for node in nodes)


def check_workers(config: FinetuneConfig) -> None:
    """Raise ClusterError if the nodes cannot hold the workers."""
    config = with_workers(config)
    num_workers, room = config.num_workers or 1, room_for_workers(config.num_cpus, use_gpu=bool(config.use_gpu))
    if num_workers > room:
        resources = ray.cluster_resources()
        gpu = ", each with a GPU," if config.use_gpu else ""
        raise ClusterError(
            f"{num_workers} training workers of {config.num_cpus} CPUs{gpu} do not fit a cluster of "
            f"{resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} GPUs, whose nodes have room for {room}; "
            "lower --finetune.num_workers or --finetune.num_cpus, or give --finetune.use_gpu false"
        )


def run_on_workers(
    work: Callable[[], dict[str, Any]], config: FinetuneConfig, storage: Location, name: str
) -> dict[str, Any]:
    """Call `work` on every worker; returns what rank 0 returned, or raises the DavirError that it raised.

    `config` is one of `with_workers`. Checkpoints are kept in `storage` in a folder of this name: work of the same name
    continues from the last one.
    """
    check_workers(config)
    if storage.is_local:
        with storage_errors(storage):
            Path(storage.path).mkdir(parents=True, exist_ok=True)
    _remove_torn_state(storage / name)
    filesystem = None if storage.is_local else pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(storage.fs))
    trainer = TorchTrainer(
        _run,
        # As bytes, which the workers alone unpickle: Ray Train's controller would import all that the work does, too.
        train_loop_config={"work": cloudpickle.dumps(work), "outcome": storage / _OUTCOME},
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.num_workers or 1,
            use_gpu=bool(config.use_gpu),
            resources_per_worker={"CPU": config.num_cpus} | ({"GPU": 1} if config.use_gpu else {}),
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=storage.path,
            storage_filesystem=filesystem,
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
            failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
        ),
    )
    try:
        with own_errors(wrapper=ray.train.TrainingFailedError), own_interrupts():
            trainer.fit()
    except ray.train.WorkerGroupError as error:
        if "OutOfMemoryError" not in str(error):
            raise
        times = config.max_failures + 1
        raise TrainingError(f"training ran out of memory on a device {times} times; {SAVE_MEMORY}") from error
    except ray.train.ControllerError as error:  # the controller writes Ray Train's list of checkpoints to the storage
        failure = error.controller_failure
        if isinstance(failure, TimeoutError | ConnectionError):  # the cluster's; a store's have other classes
            raise
        with storage_errors(storage):
            raise failure from error
    outcome: dict[str, Any] = json.loads((storage / _OUTCOME).read_bytes())
    if "error" in outcome:
        raise getattr(errors, outcome["error"])(outcome["message"])
    return outcome


def _run(settings: dict[str, Any]) -> None:
    """Do the work on one worker; rank 0 writes the outcome for the driver."""
    configure_worker_logging()
    try:
        outcome = cloudpickle.loads(settings["work"])()
    except StorageError:  # on one rank, perhaps: Ray Train ends the others, and restarts all up to max_failures times
        raise
    except DavirError as error:  # from the model, a checkpoint or the loss, so on every rank: all of them end here
        outcome = {"error": type(error).__name__, "message": str(error)}
    if ray.train.get_context().get_world_rank() == 0:
        settings["outcome"].write_text(json.dumps(outcome))


def _remove_torn_state(folder: Location) -> None:
    """Remove a folder that Ray Train cannot continue from.

    It overwrites its list of checkpoints in place (2.60): a driver that dies while writing leaves half of it, and every
    later start would fail.
    """
    try:
        listed = json.loads((folder / _SNAPSHOT).read_bytes())
        whole = all((folder / result["checkpoint_dir_name"]).exists() for result in listed["checkpoint_results"])
    except FileNotFoundError:
        return
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        log.warning("%s was left half-written by a driver that died; training starts over", folder)
        folder.remove()
