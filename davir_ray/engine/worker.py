"""What a worker of a Ray that a job starts does first. Every worker imports this file, so it imports little."""

import gc
import logging
import os

import ray


def prepare_worker() -> None:
    """Prepare a worker: its imports, and Ray Train's placement group cleaner.

    The cleaner is pointed to this Ray, even if others run on the machine, and silenced: it would warn every second that
    it cannot reach the dashboard, which a local start does not have.
    """
    gc.set_threshold(10_000)  # as in cli.py: looking for garbage took a sixth of the imports' time
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    logging.getLogger("ray.train.v2._internal.execution.controller.placement_group_cleaner").setLevel(logging.ERROR)
