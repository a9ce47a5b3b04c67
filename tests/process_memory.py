"""The memory of a process."""

from pathlib import Path


def anonymous_bytes(pid: int | str = "self") -> int:
    """Memory that is in no file, and so can't be dropped."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024
