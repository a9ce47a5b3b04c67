"""What a driver shows of Ray's output: its workers' log lines and messages about nodes. The rest stays in Ray's logs.

By default Ray (2.60) prints every line of every worker with the process in front, and its C++ core writes to standard
error: about a hundred lines in a run of a minute, which say nothing about the run and break the progress bars.
"""

import faulthandler
import io
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import ray
from ray._private.log import PlainRayHandler
from ray._private.ray_logging import global_worker_stdstream_dispatcher
from ray._private.worker import filter_autoscaler_events

from davir_ray.text import PrintableFormatter

log = logging.getLogger(__name__)

LOG_LEVEL = "DAVIR_RAY_LOG_LEVEL"
"""Environment variable of the workers: DEBUG makes them log every shard."""

_MARK = "davir_ray|"
"""Prefix of each log line of a worker, before its level, by which the driver recognises it in the output."""

_BUSY = "PYTHON worker processes have been started on node"
"""Part of what Ray prints in a driver where many workers start at once on a slow machine, as every run's do."""

_MAX_REMEMBERED = 1000


def configure_worker_logging() -> None:
    """Mark a worker's log lines for the driver, and log from INFO on; Ray's workers drop INFO by default."""
    ours = logging.getLogger("davir_ray")
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter(f"{_MARK}%(levelname)s|%(message)s"))
    ours.handlers = [handler]
    ours.propagate = False  # Ray Train's handlers at the root would repeat each line
    ours.setLevel(os.environ.get(LOG_LEVEL, "INFO"))
    quieten()


def quieten() -> None:
    """Silence loggers that say nothing about the run: plans of datasets, placement of workers, the cluster's token."""
    for name in ("aiobotocore", "ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in ("ray.data._internal.progress", "ray._private.authentication.authentication_token_setup"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("ray._private.services").setLevel(logging.CRITICAL)  # what it logs is raised as an error, too
    ray.data.DataContext.get_current().enable_progress_bars = False  # our bars show stages, not operators


def shows_all() -> bool:
    """Whether the user asked for everything (--debug)."""
    return log.isEnabledFor(logging.DEBUG)


class LogStream(io.TextIOBase):
    """Replaces standard output: each line that Ray or a library prints there is logged, so that no bar is broken."""

    def __init__(self) -> None:
        self._rest = ""

    def write(self, text: str) -> int:
        """Log the lines that are complete."""
        *lines, self._rest = (self._rest + text).split("\n")
        for line in filter(str.strip, lines):
            log.log(logging.DEBUG if _BUSY in line else logging.WARNING, "%s", line)
        return len(text)


class WorkerLines:
    """Logs messages about nodes and our workers' log lines, each once even if several workers log the same.

    On a terminal a bar replaces lines at INFO. With --debug every line that any process prints is logged, with the name
    of the process in front.
    """

    def __init__(self) -> None:
        self._min_level = logging.WARNING if sys.stderr.isatty() else logging.INFO
        self._seen: dict[str, None] = {}

    def __call__(self, batch: dict[str, Any]) -> None:
        """Handle a batch of lines of one process, as Ray hands it to its listeners."""
        node = "" if batch["ip"] == batch["localhost"] else f", node {batch['ip']}"
        process = f"{batch.get('actor_name') or batch.get('task_name') or ''} pid={batch['pid']}{node}".strip()
        for level, message in _lines_of(batch):
            if shows_all():
                log.log(level, "(%s) %s", process, message)
            elif level >= self._min_level and self._is_new(message):
                log.log(level, "%s%s", message, f" ({node[2:]})" if node and level >= logging.WARNING else "")

    def _is_new(self, message: str) -> bool:
        is_new = message not in self._seen
        self._seen[message] = None
        if len(self._seen) > _MAX_REMEMBERED:
            self._seen.pop(next(iter(self._seen)))
        return is_new


def _lines_of(batch: dict[str, Any]) -> Iterator[tuple[int, str]]:
    """Levels and messages of a batch; a line that is neither ours nor about nodes is at DEBUG."""
    if batch["pid"] == "autoscaler":
        for line in filter_autoscaler_events(batch["lines"]):
            yield logging.WARNING if "Error:" in line or "Warning:" in line else logging.INFO, line
        return
    for line in batch["lines"]:
        name, bar, message = line.removeprefix(_MARK).partition("|")
        if line.startswith(_MARK) and bar:
            yield logging.getLevelNamesMapping().get(name, logging.WARNING), message
        else:
            yield logging.WARNING if batch["pid"] == "raylet" else logging.DEBUG, line


@contextmanager
def quiet_ray() -> Iterator[None]:
    """During the block show only those messages of a connected Ray that concern the run, or all with --debug.

    Ray's Python code logs through the job's handlers, which do not break the bars, instead of its own.
    """
    for name in ("ray", "ray.data", "ray.train"):
        logger = logging.getLogger(name)
        logger.handlers = [handler for handler in logger.handlers if not isinstance(handler, PlainRayHandler)]
        logger.propagate = True
    if not shows_all():
        for handler in logging.getLogger().handlers:
            handler.addFilter(_is_not_raised)
    os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    dispatcher = global_worker_stdstream_dispatcher
    dispatcher.remove_handler("ray_print_logs")
    dispatcher.add_handler("davir_ray", WorkerLines())
    try:
        with nullcontext() if shows_all() else _native_errors_in_log_file():
            yield
    finally:
        dispatcher.remove_handler("davir_ray")


def _is_not_raised(record: logging.LogRecord) -> bool:
    """False for errors that Ray Data logs, with its stack traces, and also raises."""
    return not (record.name.startswith("ray.data") and record.levelno >= logging.ERROR)


_SIEVE = r"""
import re, sys

with open(sys.argv[1], "ab", buffering=0) as file:
    for line in sys.stdin.buffer:
        file.write(line)
        if found := re.match(rb"\[[^]]* (?:C|E(?=.*GCS)) \d+ \d+\] [^:]*:\d+: *(.*)", line):
            sys.stderr.buffer.write(b"Ray: " + found[1].strip() + b"\n")
            sys.stderr.buffer.flush()
"""
"""Code of a separate process, because Ray's C++ core ends a driver that loses its cluster right after saying so."""


@contextmanager
def _native_errors_in_log_file() -> Iterator[None]:
    """Send what native code writes to file descriptor 2 to a file in Ray's logs; Python writes elsewhere (see cli.py).

    There is no other way to keep the messages for developers of Ray's C++ core off a driver's terminal (2.60). Those
    about a lost cluster and about its own end are still shown. Where Python writes to that descriptor, as in a
    notebook, or the file cannot be made, nothing changes.
    """
    sieve = _start_sieve()
    if sieve is None or sieve.stdin is None:
        yield
        return
    before = os.dup(2)
    os.dup2(sieve.stdin.fileno(), 2)
    sieve.stdin.close()
    faulthandler.enable(file=sys.stderr, all_threads=False)  # a crash is shown
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        with suppress(subprocess.TimeoutExpired):  # it ends with the last process that writes to it
            sieve.wait(1)


def _start_sieve() -> "subprocess.Popen[bytes] | None":
    """The process that reads what is written to descriptor 2; None if the descriptor must not be redirected."""
    node = ray._private.worker._global_node
    try:
        if node is None or sys.stderr.fileno() == 2:
            return None
        place = os.path.join(node.get_logs_dir_path(), f"davir_ray-driver-{os.getpid()}.err")
        with open(place, "ab"):
            pass
        return subprocess.Popen(
            [sys.executable, "-S", "-c", _SIEVE, place],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=sys.stderr.fileno(), start_new_session=True,
        )  # fmt: skip
    except (OSError, ValueError) as error:
        log.debug("errors of native code stay on the terminal: %s", error)
        return None
