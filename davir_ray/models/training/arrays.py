"""Flat arrays in the files of a folder: written piece by piece, and mapped by every process that reads them.

A mapped array lies in the page cache, once for all processes of a node, and the kernel can evict what is not in use
(unless the folder is on a tmpfs, which is memory).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt


class ArrayFiles:
    """Arrays of one dimension, one file each, named and typed by `kinds`."""

    def __init__(self, folder: Path, kinds: Mapping[str, type[np.generic]]) -> None:
        self._folder = folder
        self._kinds = kinds

    def append(self, name: str, values: npt.ArrayLike) -> None:
        """Write values at the end of an array. OSError if the disk is full."""
        with (self._folder / name).open("ab") as file:
            file.write(np.ascontiguousarray(values, self._kinds[name]).data)

    def mapped(self) -> dict[str, npt.NDArray[Any]]:
        """All arrays, read-only. They stay readable if the files are removed; ValueError for one without values."""
        # As plain arrays: slices of a memmap are made ten times as slowly.
        return {name: np.asarray(np.memmap(self._folder / name, kind, mode="r")) for name, kind in self._kinds.items()}
