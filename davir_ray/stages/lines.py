"""Which rows the parts of a cut file have: their lines are counted in tasks, once in an attempt.

A row keeps the index, and so the id, that it has in an uncut file. That takes one more read of the file from storage.
"""

import json
import logging
from collections.abc import Iterable
from contextlib import closing

from davir_ray.data.files import Slice
from davir_ray.data.records import count_lines
from davir_ray.engine.progress import WorkDone, tracked
from davir_ray.engine.tasks import in_tasks
from davir_ray.run.folder import Run
from davir_ray.run.location import Location
from davir_ray.run.progress import Progress

log = logging.getLogger(__name__)

_PARTS_PER_TASK = 8
"""Parts that one task counts: one alone takes less time than starting a task."""


def rows_of_parts(run: Run, slices: Iterable[Slice], kept: Location) -> dict[Slice, range]:
    """The rows in their file of all slices that are byte ranges, which come file by file from the first byte on.

    The counts are read from the file `kept`, or counted and written to it.
    """
    parts = [piece for piece in slices if piece.byte_range is not None]
    if not parts:
        return {}
    try:
        counts = json.loads(kept.read_bytes())
    except FileNotFoundError:
        counts = _counts(run, parts)
        kept.write_text(json.dumps(counts))
    rows, first = {}, 0
    for piece, num_lines in zip(parts, counts, strict=True):
        if piece.byte_range is not None and piece.byte_range.start == 0:
            first = 0
        rows[piece] = range(first, first + num_lines)
        first += num_lines
    return rows


def _counts(run: Run, parts: list[Slice]) -> list[int]:
    """Number of lines that begin in each part."""
    files = {part.file for part in parts}
    log.info(
        "prepare: counting the lines of %d files (%.0f MB in %d parts), so that their rows are numbered",
        len(files), sum(file.num_bytes for file in files) / 1e6, len(parts),
    )  # fmt: skip
    groups = [parts[at : at + _PARTS_PER_TASK] for at in range(0, len(parts), _PARTS_PER_TASK)]
    counts, num_counted = dict[int, list[int]](), 0
    start = Progress(stage="prepare", unit="parts counted", total=len(parts))
    with tracked(run, start) as counter, closing(in_tasks(_count_group, groups)) as results:
        for index, of_group in results:
            counts[index] = of_group
            num_counted += len(of_group)
            counter.report("all", WorkDone(num_counted))
    return [num_lines for index in range(len(groups)) for num_lines in counts[index]]


def _count_group(parts: list[Slice]) -> list[int]:
    return [count_lines(part) for part in parts]
