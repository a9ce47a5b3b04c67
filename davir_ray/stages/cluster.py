"""What the Ray cluster has, and what is asked of it."""

import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

import ray
import ray.train
from ray.data import DataContext
from ray.data.exceptions import ExecutionTimeoutError

from davir_ray import errors
from davir_ray.access import CONTINUES, explain_text
from davir_ray.errors import ClusterError, ProgressError, StorageError
from davir_ray.text import terminal_handler

log = logging.getLogger(__name__)

_OWN_ERROR = re.compile(r"davir_ray\.errors\.(\w+): (.+)")

LOG_LEVEL = "DAVIR_RAY_LOG_LEVEL"
"""Environment variable of the workers: DEBUG makes them tell of every shard."""

SUBMITTED_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Environment variable that Ray sets for the entry point of a submitted job."""


@contextmanager
def connected() -> Iterator[None]:
    """Connect to Ray for a block; a connection that is there already is used, and stays.

    The end of the block is the end of the workers' output, so that the reason of a failure is the last line. Left to
    Ray's own handler at exit, a job that is complete ends with status 1 where a node died on the way (2.60). Within the
    block standard output goes to standard error: Ray prints there what workers, nodes and the autoscaler say, among
    them warnings, and a job's standard output is its result alone.
    """
    _quieten()
    if ray.is_initialized():
        yield
        return
    with redirect_stdout(sys.stderr):
        _start()
        try:
            yield
        finally:
            ray.shutdown()


def ensure_started() -> None:
    """Connect to Ray as the jobs do, unless that has been done; the connection stays until the process ends."""
    if not ray.is_initialized():
        _start()


def _start() -> None:
    """Connect to the cluster of RAY_ADDRESS or of the submitted job, else start Ray here.

    A local start is never another cluster that happens to run on this machine. It counts one CPU more than the machine
    has: reading and writing wait for storage most of their time, and leave the real ones to the actors.
    """
    if os.environ.get("RAY_ADDRESS") or os.environ.get(SUBMITTED_JOB):
        ray.init(logging_level=logging.WARNING)
        return
    ray.init(
        "local",
        num_cpus=(os.cpu_count() or 1) + 1,
        include_dashboard=False,
        logging_level=logging.WARNING,
        runtime_env={"worker_process_setup_hook": _silence_cleaner},
    )


def _silence_cleaner() -> None:
    """Ray Train's cleaner warns every second that it cannot ask the dashboard, which a local start does without."""
    logging.getLogger("ray.train.v2._internal.execution.controller.placement_group_cleaner").setLevel(logging.ERROR)


def configure_worker_logging() -> None:
    """Let a worker's log lines at INFO reach the driver; Ray's workers drop them by default."""
    logging.basicConfig(level=logging.WARNING, handlers=[terminal_handler()])
    logging.getLogger("davir_ray").setLevel(os.environ.get(LOG_LEVEL, "INFO"))
    _quieten()


def _quieten() -> None:
    """Leave out what says nothing about the run: plans of small datasets, placement of workers."""
    logging.getLogger("aiobotocore").setLevel(logging.WARNING)
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    DataContext.get_current().enable_progress_bars = False  # progress.py tells of stages, not of operators


@contextmanager
def own_errors() -> Iterator[None]:
    """Raise an error of ours that a worker raised as itself, out of Ray's wrappings."""
    try:
        yield
    except ExecutionTimeoutError as error:
        raise ProgressError(
            f"the run is stuck (score.no_progress_timeout_s): {' '.join(str(error).split())} Look for a worker or node "
            f"that hangs, or raise the limit if one shard takes longer. {CONTINUES}"
        ) from error
    except (ray.exceptions.RayError, ray.train.TrainingFailedError) as error:
        # Of an error in a user function or an actor's constructor Ray keeps only the traceback's text (2.60).
        text = str(error)
        if told := [found for found in _OWN_ERROR.findall(text) if hasattr(errors, found[0])]:
            name, message = told[-1]
            raise getattr(errors, name)(message) from error
        if reason := explain_text(text):
            raise StorageError(f"{reason}. {CONTINUES}") from error
        raise


@contextmanager
def own_interrupts() -> Iterator[None]:
    """Ctrl-C in a training is one as at any other time, and so it is after it.

    Ray Train makes it an exit with status 0, and leaves its handler behind (2.60), which goes on taking Ctrl-C for a
    wish to end the training, and keeps its controller alive: 0.7 GB with its helpers, as long as the driver lives.
    """
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as ended:
        raise KeyboardInterrupt from ended
    finally:
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)


def num_nodes() -> int:
    """Nodes that are alive."""
    return sum(bool(node["Alive"]) for node in ray.nodes())


def num_cpus() -> float:
    """CPUs of the cluster."""
    return float(ray.cluster_resources().get("CPU", 1))


def has_gpu() -> bool:
    """Whether the cluster has any GPU."""
    return float(ray.cluster_resources().get("GPU", 0)) >= 1


def accelerators() -> list[str]:
    """Ray's names of the kinds of GPU in the cluster, such as A100."""
    start = "accelerator_type:"
    return sorted(name.removeprefix(start) for name in ray.cluster_resources() if name.startswith(start))


def pool_size(wanted: int | None, num_cpus: float, num_gpus: float) -> int:
    """Actors for a pool: as wanted, else as many as the cluster holds. ClusterError if they do not fit."""
    most = room_for(num_cpus, num_gpus)
    if most < max(1, wanted or 1):
        resources = ray.cluster_resources()
        raise ClusterError(
            f"{wanted or 1} actors of {num_cpus:g} CPUs and {num_gpus:g} GPUs do not fit a cluster of "
            f"{resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} GPUs with one CPU left for reading and "
            "writing; ask for fewer or smaller actors"
        )
    return wanted or most


def room_for(num_cpus: float, num_gpus: float) -> int:
    """Actors of this size that the nodes there are now can hold, each on one node.

    On one node there is room left for a task of `side_cpus`: an actor pool that takes all starves reads and writes, and
    the run hangs without an error (tried on 2.60).
    """
    nodes: list[dict[str, float]] = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    rooms = [_room_on(node, num_cpus, num_gpus) for node in nodes]
    left = [node.get("CPU", 0.0) - num_cpus * room for node, room in zip(nodes, rooms, strict=True)]
    return sum(rooms) - (max(left, default=0.0) < side_cpus(num_cpus))  # the place of one actor is enough


def side_cpus(num_cpus: float) -> float:
    """CPUs of a task that writes beside actors of this size: it fits where one of them would. One that reads has half,
    since with equal ones Ray fuses reading into the actor, and nothing overlaps.
    """
    return min(1.0, num_cpus)


def _room_on(node: dict[str, float], num_cpus: float, num_gpus: float) -> int:
    wanted = {"CPU": num_cpus, "GPU": num_gpus}
    return min(int(node.get(name, 0.0) / size + 1e-9) for name, size in wanted.items() if size)


def whole_block_context(no_progress_timeout_s: int) -> DataContext:
    """A context in which a block is never split and a stuck run ends.

    Blocks above 1.5 x target_max_block_size would be split, and a shard must stay one block.
    """
    context = DataContext.get_current().copy()
    context.target_max_block_size = None
    context.execution_no_progress_timeout_s = no_progress_timeout_s
    return context
