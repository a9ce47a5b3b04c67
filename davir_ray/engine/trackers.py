"""What follows a training's curves: TensorBoard, Weights & Biases or MLflow, each through its own client.

tracking.json in the run keeps the id of the tracking run and the last step that it has, so that a resumed run goes on
in it and no step is logged twice.
"""

import json
import logging
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple, Protocol

from davir_ray.config.run import Tracker
from davir_ray.errors import ConfigError
from davir_ray.run.folder import Run
from davir_ray.text import one_line

log = logging.getLogger(__name__)

STATE_FILE = "tracking.json"
"""For each tracker: the id of the tracking run, the training whose steps it has, the last of them, and the results."""

EVENTS = "tensorboard"
"""Folder of a run with TensorBoard's files."""

_PROJECT = "davir_ray"
"""Project of Weights & Biases and experiment of MLflow, unless WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME is set."""

_MAX_METRICS = 1000
"""MLflow's limit for the values of one request."""


class Step(NamedTuple):
    """What one step of a training measured."""

    training: str
    """Names the training: another recipe or other data have another name."""
    step: int
    values: dict[str, float]


def check_tracker(tracker: Tracker | None, run: Run) -> None:
    """Raise ConfigError if the tracker's package is not installed, or it cannot write to the run's store."""
    if tracker is None:
        return
    found = find_spec(tracker)
    if found is None or found.origin is None:  # without origin it is a folder of that name, such as wandb's own
        raise ConfigError(
            f"track is {tracker}, but the package {tracker} is not installed; pip install 'davir_ray[{tracker}]', or "
            "leave --track out"
        )
    if tracker == "tensorboard" and not run.folder.is_local:
        raise ConfigError(
            f"track is tensorboard, which writes to local files, but output is {run}; give a local output, or --track "
            "wandb or mlflow"
        )


class Client(Protocol):
    """One tracking run, open for writing."""

    id: str
    """By which the tracking run is found again."""

    def log(self, steps: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        """Log values, each at its step."""

    def log_results(self, results: Mapping[str, float], step: int) -> None:
        """Log what the run came to, after its last step."""

    def close(self, *, failed: bool) -> None:
        """End the session."""


class _TensorBoard:
    def __init__(self, run: Run, name: str, known_id: str | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.id = known_id or uuid.uuid4().hex[:8]
        self._writer: Any = SummaryWriter(str(run / EVENTS / self.id))

    def log(self, steps: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        for step, values in steps:
            for key, value in values.items():
                self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def log_results(self, results: Mapping[str, float], step: int) -> None:
        self.log([(step, results)])

    def close(self, *, failed: bool) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, run: Run, name: str, known_id: str | None) -> None:
        import wandb

        self.id = known_id or uuid.uuid4().hex[:8]
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            id=self.id,
            name=name,
            resume="allow",
            reinit="create_new",  # the trials of a comparison have one each at the same time
            config={"output": str(run)},
            dir=str(run) if run.folder.is_local else None,
            settings=wandb.Settings(console="off"),  # else it would take standard output, which is the job's
        )

    def log(self, steps: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        for step, values in steps:
            self._run.log(dict(values), step=step)

    def log_results(self, results: Mapping[str, float], step: int) -> None:
        self._run.summary.update(dict(results))

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class _MLflow:
    def __init__(self, run: Run, name: str, known_id: str | None) -> None:
        import mlflow

        self._client: Any = mlflow.MlflowClient()
        if known_id is None:
            experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
            found = self._client.get_experiment_by_name(experiment)
            experiment_id = found.experiment_id if found else self._client.create_experiment(experiment)
            created = self._client.create_run(experiment_id, run_name=name, tags={"output": str(run)})
            self.id: str = created.info.run_id
        else:
            self.id = known_id
            self._client.update_run(known_id, status="RUNNING")

    def log(self, steps: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [Metric(key, value, now, step) for step, values in steps for key, value in values.items()]
        for start in range(0, len(metrics), _MAX_METRICS):
            self._client.log_batch(self.id, metrics=metrics[start : start + _MAX_METRICS])

    def log_results(self, results: Mapping[str, float], step: int) -> None:
        self.log([(step, results)])

    def close(self, *, failed: bool) -> None:
        self._client.set_terminated(self.id, "FAILED" if failed else "FINISHED")


_CLIENTS: dict[Tracker, Callable[[Run, str, str | None], Client]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "mlflow": _MLflow,
}


class TrackingRun:
    """The tracking run of one run, opened again if there is one already.

    Once it is open, an error of its client is a warning: no training ends because its curves are not seen.
    """

    def __init__(self, run: Run, tracker: Tracker, name: str) -> None:
        self._run, self._tracker, self._name = run, tracker, name
        try:
            self._all = json.loads((run / STATE_FILE).read_bytes())
        except FileNotFoundError:
            self._all = {}
        self._state: dict[str, Any] = self._all.get(tracker, {})
        self._client = self._open()

    def log(self, steps: Sequence[Step]) -> None:
        """Log the steps that are not logged yet; those of another training than before open a new tracking run."""
        new: list[tuple[int, dict[str, float]]] = []
        for training, step, values in steps:
            if self._state["training"] not in (None, training):
                self.close(failed=False)
                self._state, new = {}, []
                self._client = self._open()
            self._state["training"] = training
            if step > self._state["last_step"]:
                self._state["last_step"] = step
                new.append((step, values))
        if new:
            self._remember()  # first: a driver that dies in between leaves a gap, but no step twice
            self._try(lambda: self._client.log(new))

    def log_results(self, results: Mapping[str, float]) -> None:
        """Log what the run came to, unless the tracking run has it already."""
        if results != self._state["results"]:
            self._state["results"] = dict(results)
            self._remember()
            self._try(lambda: self._client.log_results(results, self._state["last_step"]))

    def close(self, *, failed: bool) -> None:
        """End the session; a later one may go on."""
        self._try(lambda: self._client.close(failed=failed))

    def _open(self) -> Client:
        try:
            client = _CLIENTS[self._tracker](self._run, self._name, self._state.get("id"))
        except Exception as error:
            raise ConfigError(f"track is {self._tracker}, which cannot be started: {one_line(error)}") from error
        if not self._state:
            self._state = {"id": client.id, "training": None, "last_step": 0, "results": {}}
            self._remember()
        return client

    def _remember(self) -> None:
        self._all[self._tracker] = self._state
        (self._run / STATE_FILE).write_text(json.dumps(self._all))

    def _try(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # noqa: BLE001  # each client has classes of its own
            log.warning("%s does not take what %s logs; the run goes on: %s", self._tracker, self._run, one_line(error))
