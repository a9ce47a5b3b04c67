"""Plain Ray tasks, whose results are yielded as they end.

A task whose worker or node dies is done again, up to twenty times.
"""

import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from itertools import islice
from typing import Any, TypeVar

import ray
import ray.data
from ray.data.exceptions import ExecutionTimeoutError

from davir_ray.engine.connect import own_errors
from davir_ray.engine.resources import actor_cpus, pool_size
from davir_ray.run.location import each

_LOOK_S = 1.0
"""Seconds between two looks at tasks that have not ended."""

_MAX_RETRIES = 20
"""Number of workers that may die with a task before it fails."""

_Item = TypeVar("_Item")

_Result = TypeVar("_Result")


def _call_here(job: Callable[..., Any], *arguments: Any) -> Any:
    return job(*arguments)


call: Any = ray.remote(max_retries=_MAX_RETRIES, scheduling_strategy="SPREAD")(_call_here)
"""A task that calls its first argument with the others."""


def results_of(refs: Iterable[Any], at_once: int | None = None, limit_s: float | None = None) -> Generator[Any]:
    """Yield what tasks return, as they end; close the iterator to cancel those that have not ended.

    With `at_once`, at most so many references are pending: a lazy iterator starts a task only when another has ended.
    Raises the error of the first task that fails, and ProgressError if none ends for `limit_s` (0: no limit; None: Ray
    Data's own).
    """
    limit = ray.data.DataContext.get_current().execution_no_progress_timeout_s if limit_s is None else limit_s
    waiting, pending, last = iter(refs), list[Any](), time.monotonic()
    try:
        with own_errors():
            while True:
                pending += islice(waiting, None if at_once is None else at_once - len(pending))
                if not pending:
                    return
                wanted = len(pending) if at_once is None else 1
                ended, pending = ray.wait(pending, num_returns=wanted, timeout=_LOOK_S, fetch_local=False)
                yield from ray.get(ended)
                last = time.monotonic() if ended else last
                if 0 < limit < time.monotonic() - last:
                    raise ExecutionTimeoutError(f"no task has ended: {len(pending)} are left. timeout: {limit:g}s.")
    finally:
        for ref in pending:
            ray.cancel(ref)


def in_tasks(
    work: Callable[[_Item], _Result], items: Sequence[_Item], *, at_once: int | None = None
) -> Generator[tuple[int, _Result]]:
    """Call `work` on each item in a task with a CPU; yields the index of the item and the result, as tasks end.

    At most `at_once` run at the same time, and no more than fit the cluster with a CPU left over.
    """
    num_cpus = actor_cpus(1)
    room = min(at_once or len(items), pool_size(None, num_cpus, 0))
    job = ray.put(lambda index, item: (index, work(item)))
    start = call.options(num_cpus=num_cpus)
    with closing(results_of((start.remote(job, index, item) for index, item in enumerate(items)), room)) as results:
        yield from results


def each_in_tasks(
    work: Callable[[_Item], _Result], items: Sequence[_Item], *, per_task: int, worthwhile: bool = True
) -> list[_Result]:
    """Like `each`, with `per_task` items in each Ray task; in this process unless `worthwhile`."""
    if not worthwhile:
        return each(work, items)
    groups = [items[at : at + per_task] for at in range(0, len(items), per_task)]
    found = dict(in_tasks(lambda group: each(work, group), groups))
    return [result for index in range(len(groups)) for result in found[index]]
