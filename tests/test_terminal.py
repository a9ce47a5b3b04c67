"""A job on a real terminal: one line a stage however narrow it is, and log lines that stand above it."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios

import pytest

JOB = """
import logging, sys
from davir_ray.cli import exit_status
from davir_ray.run.progress import Progress
from davir_ray.terminal import Bar

def job() -> None:
    log = logging.getLogger("davir_ray.stages")
    bar = Bar(Progress(stage="finetune", unit="steps"))
    log.warning("the first line")
    million = 10**6
    bar.show(Progress(stage="finetune", unit="steps", done=2 * million, total=9 * million, seconds_left=3e5, retries=12,
                      tokens_per_second=1e6))
    log.warning("the second line")
    bar.show(Progress(stage="finetune", unit="steps", done=9 * million, total=9 * million, retries=12,
                      tokens_per_second=1e6))
    bar.close()
    log.info("the last line")

sys.exit(exit_status(job))
"""


def screen_of(command: list[str], columns: int) -> list[str]:
    """What a terminal shows in the end: a carriage return goes back to the line's begin, what is longer breaks."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        written = b"".join(iter(lambda: _read(ours), b""))
    os.close(ours)
    assert process.returncode == 0, written
    lines, column = [""], 0
    for character in written.decode():
        if character == "\n" or (column == columns and character != "\r"):
            lines.append("")
            column = 0
        if character == "\r":
            column = 0
        elif character != "\n":
            lines[-1] = lines[-1][:column] + character + lines[-1][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines]


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # the other side is closed
        return b""


@pytest.mark.parametrize(
    ("columns", "told"),
    [(60, ""), (80, ", 12 retries"), (110, ", 12 retries, 1,000,000 tokens/s")],
)
def test_a_stage_is_one_line_and_log_lines_are_whole(columns: int, told: str) -> None:
    assert screen_of([sys.executable, "-c", JOB], columns) == [
        "the first line",
        "the second line",
        f"finetune |████████████████| 9,000,000 of 9,000,000 steps (100%){told}"[: columns - 1],
        "the last line",
        "",
    ]
