"""What prepare reads of its sources before its tasks begin: digests of files, where files are cut, evaluation sets."""

import logging
from collections.abc import Sequence
from functools import partial

import ray.data

from davir_ray.data.evaluation import MAX_RECORDS, MIN_WORDS, EvaluationSet, EvaluationWords
from davir_ray.data.files import Slice, SourceFile, digests_of, plan_tasks
from davir_ray.engine.connect import whole_block_context
from davir_ray.engine.tasks import each_in_tasks
from davir_ray.errors import ClusterError, StorageError
from davir_ray.run.files import keep_digest, read_digest, takes_reading
from davir_ray.run.location import Location
from davir_ray.text import format_bytes

log = logging.getLogger(__name__)

_HASHED_HERE = 2**30
"""Bytes of local files up to which the driver reads them for their digests."""

_CUT_PER_TASK = 256
"""Files that one task looks into, to cut them."""


def digests(files: list[SourceFile]) -> dict[str, str]:
    """The digest of each file, by relative path; many bytes that must be read for it are read in tasks."""
    places = [Location.of(file.uri) for file in files]
    unread = {place: file.num_bytes for place, file in zip(places, files, strict=True) if takes_reading(place)}
    if (num_bytes := sum(unread.values())) > _HASHED_HERE:
        log.info("prepare: reading %s of %d files for their digests", format_bytes(num_bytes), len(unread))
        try:
            # A large file may take longer than a task may that makes no progress.
            with ray.data.DataContext.current(whole_block_context(0)):
                for place, found in zip(unread, each_in_tasks(read_digest, list(unread), per_task=1), strict=True):
                    keep_digest(place, found)
        except (StorageError, ClusterError) as error:
            log.warning("the nodes do not read the data for their digests; the driver does (%s)", error)
    return digests_of(files)


def plan(files: list[SourceFile], task_bytes: int) -> list[list[Slice]]:
    """The slices that each task reads (see plan_tasks). Cutting takes a look into large files: into many in tasks."""
    num_large = sum(file.num_bytes > task_bytes for file in files)
    cut = partial(each_in_tasks, per_task=_CUT_PER_TASK, worthwhile=num_large > _CUT_PER_TASK)
    return plan_tasks(files, task_bytes, cut)


def read_evaluation(sets: Sequence[EvaluationSet]) -> EvaluationWords | None:
    """What is looked for of the evaluation sets, after a log line about each; None without any."""
    if not sets:
        return None
    evaluation = EvaluationWords.read(sets)
    for name, counts in evaluation.counts.items():
        log.info("prepare: evaluation set %s: %s", name, evaluation_line(counts))
    return evaluation


def evaluation_line(counts: dict[str, int]) -> str:
    """What is looked for of an evaluation set, for the user."""
    return (
        f"{counts['records']} records, {counts['ngrams'] - counts['common']} n-grams to look for; not looked for: "
        f"{counts['too_short']} records without a string of {MIN_WORDS} words, {counts['common']} n-grams of more than "
        f"{MAX_RECORDS} records, and {counts['only_common']} records that have no others"
    )
