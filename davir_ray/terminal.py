"""What a job shows while it runs: log lines and, on a terminal, a progress bar for each stage below them."""

import logging
import sys
from typing import Any

from tqdm import tqdm

from davir_ray.run.progress import Progress
from davir_ray.text import PrintableFormatter

_BAR_COLUMNS = 16


class LogHandler(logging.Handler):
    """Writes each log record as a line on standard error, above the progress bars."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(PrintableFormatter("%(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record; an error while writing goes to logging's error handler and does not end the job."""
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except Exception:  # noqa: BLE001  # like every handler of the standard library
            self.handleError(record)


class Bar:
    """A stage's line on a terminal: how far it is, when it will be done, what went wrong, how fast it is."""

    def __init__(self, start: Progress) -> None:
        # The text after the bar is our own: tqdm's rate would include the work of an earlier attempt.
        self._bar: tqdm[Any] = tqdm(
            total=start.total, initial=start.done, bar_format="{desc}", file=sys.stderr, dynamic_ncols=True
        )
        self.show(start)

    def show(self, progress: Progress) -> None:
        """Draw the stage's current progress in one line, however narrow the terminal is."""
        name = f"{progress.stage:<8} "
        drawn = f"|{{bar:{_BAR_COLUMNS}}}| " if progress.total else ""
        width = (self._bar.format_dict["ncols"] or 80) - len(name) - (len("|| ") + _BAR_COLUMNS if drawn else 0)
        self._bar.n, self._bar.total = progress.done, progress.total
        self._bar.bar_format = f"{name}{drawn}{{desc}}"
        self._bar.set_description_str(progress.brief(width))

    def close(self) -> None:
        """Stop drawing; the line stays."""
        self._bar.close()
