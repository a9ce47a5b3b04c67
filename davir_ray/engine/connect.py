"""Connecting to a Ray cluster, and the errors that come back from its workers."""

import json
import logging
import os
import re
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

import ray
from ray._private import services
from ray.data import DataContext
from ray.data.exceptions import ExecutionTimeoutError
from ray.exceptions import AuthenticationError, RayError

from davir_ray import errors
from davir_ray.engine.console import LOG_LEVEL, LogStream, quiet_ray, quieten, shows_all
from davir_ray.engine.resources import num_nodes
from davir_ray.engine.worker import prepare_worker
from davir_ray.errors import ClusterError, ConfigError, ProgressError
from davir_ray.run.folder import SUBMITTED_JOB, Run
from davir_ray.run.storage_errors import CONTINUES
from davir_ray.text import one_line

log = logging.getLogger(__name__)

_OWN_ERROR = re.compile(r"davir_ray\.errors\.(\w+): (.+)")

NO_PROGRESS = "RAY_DATA_EXECUTION_NO_PROGRESS_TIMEOUT_S"
"""Environment variable of the driver: seconds in which Ray Data must finish a task; 1800 if it is not set."""

_ANSWER_S = 5.0
"""Seconds that a cluster has to answer a first connection."""

_SETTINGS = b"\0\0\0\4\0\0\0\0\0"
"""An empty frame of HTTP/2 settings."""

_CONNECT_ATTEMPTS = "RAY_gcs_server_port_wait_time_s"
"""Environment variable: attempts that Ray makes, one second apart, to connect to a cluster that refuses (2.60)."""

_MIN_FREE_BYTES = 2**20
"""Free disk space without which Ray does not start."""


@contextmanager
def connected() -> Iterator[None]:
    """Connect to Ray for a block; an existing connection is used, and stays open.

    Ray is shut down at the end of the block, so that no output of workers follows the reason of a failure, which is
    then the last line. Ray's own exit handler would end a complete job with status 1 if a node died during it (2.60).
    Within the block, what is printed on standard output is logged instead: Ray prints warnings there, but a job's
    standard output is only for its result.
    """
    quieten()
    if ray.is_initialized():
        yield
        return
    with redirect_stdout(LogStream()):
        _start()
        try:
            with quiet_ray():
                yield
        finally:
            ray.shutdown()


@contextmanager
def connected_to(run: Run, *others: Run, is_shared: bool) -> Iterator[None]:
    """Connect to Ray for a block that writes a run, and may read others; ConfigError if a node cannot see one."""
    with connected():
        local = [each for each in (run, *others) if each.folder.is_local]
        if local and num_nodes() > 1 and not is_shared:
            what = "output" if local[0] is run else "the repeat"
            raise ConfigError(
                f"{what} {local[0]} is local, but the cluster has {num_nodes()} nodes; give s3://…, or "
                "--output_is_shared if every node sees this path"
            )
        yield


def ensure_started() -> None:
    """Connect to Ray as the jobs do, unless connected already; the connection lasts until the process ends."""
    if not ray.is_initialized():
        _start()


def _start() -> None:
    """Connect to the cluster of RAY_ADDRESS or of the submitted job, or start Ray here if neither is set.

    Raises ClusterError if that fails. A local start never joins another cluster that happens to run on this machine. It
    counts one CPU more than the machine has: tasks that read and write wait for storage most of the time, and should
    not take a CPU from the actors.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    if address != "local" and (address or os.environ.get(SUBMITTED_JOB)):
        _connect(address)
        return
    log.info("starting Ray on this machine")
    if shows_all():
        os.environ.setdefault(LOG_LEVEL, "DEBUG")
    folder = os.environ.get("RAY_TMPDIR", os.environ.get("TMPDIR", "/tmp"))
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_MIN_FREE_BYTES))  # on a full disk ray.init would hang for a minute
        ray.init(
            "local",
            num_cpus=(os.cpu_count() or 1) + 1,
            include_dashboard=False,
            logging_level=logging.WARNING,
            runtime_env={"worker_process_setup_hook": prepare_worker},
        )
    except Exception as error:  # Ray also raises plain Exceptions
        raise ClusterError(
            f"Ray cannot be started here: {one_line(error)}. It needs a folder for its files and sockets with a short "
            f"path, write access and free space (now {folder}, from RAY_TMPDIR, else TMPDIR, else /tmp), and write "
            f"access to HOME for its token (now {os.environ.get('HOME')})"
        ) from error


def _connect(address: str) -> None:
    """Connect to a cluster that answers; Ray itself would keep trying for ten minutes."""
    if address.startswith("ray://"):
        raise ClusterError(
            f"RAY_ADDRESS is {address}, of a Ray Client server, which Ray Train and Ray Data do not support; give "
            "host:port on a node of the cluster, or use ray job submit"
        )
    is_set = _CONNECT_ATTEMPTS in os.environ
    os.environ.setdefault(_CONNECT_ATTEMPTS, "3")
    try:
        found = services.canonicalize_bootstrap_address(address or None)
        if found is not None:
            _check_answer(found)
        # Without the address, Ray Train's cleaner may ask another cluster on its machine, and conclude that the
        # training has ended.
        wanted = {"RAY_ADDRESS": found, LOG_LEVEL: "DEBUG" if shows_all() else None}
        given = (json.loads(os.environ.get(SUBMITTED_JOB) or "{}").get("runtime_env") or {}).get("env_vars") or {}
        variables = {name: value for name, value in wanted.items() if value and name not in given}
        ray.init(logging_level=logging.WARNING, runtime_env={"env_vars": variables} if variables else None)
    except Exception as error:  # Ray also raises plain Exceptions
        message = f"RAY_ADDRESS is {address}, and the Ray there cannot be used: "
        if isinstance(error, AuthenticationError) or "InvalidAuthToken" in str(error.__cause__):
            mode = os.environ.get("RAY_AUTH_MODE", "not set")
            message += f"it requires a valid token. Set RAY_AUTH_MODE=token (it is {mode}) and RAY_AUTH_TOKEN, or "
            raise ClusterError(f"{message}RAY_AUTH_TOKEN_PATH to its file") from error
        message += f"{one_line(error)}. Start that cluster, correct the address, or unset it to start Ray here"
        raise ClusterError(message) from error
    finally:
        if not is_set:
            del os.environ[_CONNECT_ATTEMPTS]


def _check_answer(address: str) -> None:
    """Raise OSError unless a gRPC server such as Ray's listens there: it answers anything with HTTP/2 settings."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host.strip("[]"), int(port)), _ANSWER_S) as connection:
        if os.environ.get("RAY_USE_TLS", "0") != "0":
            return
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _SETTINGS)
        if connection.recv(len(_SETTINGS))[3:4] != _SETTINGS[3:4]:
            raise ConnectionError("the server there is not Ray")


@contextmanager
def own_errors(limit: str = NO_PROGRESS, wrapper: type[Exception] = RayError) -> Iterator[None]:
    """Raise a DavirError of a worker as itself, without the RayError, or the `wrapper`, around it.

    A run that makes no progress raises ProgressError; `limit` is the name of the setting that sets the time limit.
    """
    try:
        yield
    except ExecutionTimeoutError as error:
        # The rest of its text names settings of Ray Data.
        reason = " ".join(str(error).partition("If this is expected")[0].split())
        raise ProgressError(
            f"the run is stuck ({limit}): {reason} Look for a worker or node that hangs, or raise the limit if one "
            f"shard or task takes longer. {CONTINUES}"
        ) from error
    except (RayError, wrapper) as error:
        # Ray keeps only the text of the traceback where a user function or an actor's constructor fails (2.60).
        text = str(error)
        if ours := [found for found in _OWN_ERROR.findall(text) if hasattr(errors, found[0])]:
            name, message = ours[-1]
            raise getattr(errors, name)(message) from error
        raise


@contextmanager
def own_interrupts() -> Iterator[None]:
    """Raise KeyboardInterrupt for a Ctrl-C in a training, and restore the signal's handler after it.

    Ray Train turns Ctrl-C into an exit with status 0, and does not remove its handler (2.60). That would still treat a
    later Ctrl-C as a request to end the training, and it keeps the controller alive: 0.7 GB with its helpers for as
    long as the driver lives.
    """
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as ended:
        raise KeyboardInterrupt from ended
    finally:
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)


def whole_block_context(no_progress_timeout_s: int | None = None) -> DataContext:
    """A context in which a block is never split, and a run without progress for this long ends.

    None is Ray Data's own limit. Ray splits blocks above 1.5 x target_max_block_size, and a shard must stay one block.
    """
    context = DataContext.get_current().copy()
    context.target_max_block_size = None
    if no_progress_timeout_s is not None:
        context.execution_no_progress_timeout_s = no_progress_timeout_s
    return context
