"""Changes to what Ray's workers import, where no option of a job sets what a test needs."""

import os
from dataclasses import dataclass
from pathlib import Path

from drivers import PACKAGE

_SITE = """
import importlib.abc, importlib.util, itertools, os, pathlib, sys, time

CHANGES = {}

def wait_until(holds):
    deadline = time.monotonic() + 600
    while not holds():
        assert time.monotonic() < deadline, "nobody opened the gate"
        time.sleep(0.02)

def soon_known(coordinator):
    # Ray Data looks for new nodes, and for drivers that are gone, every 20 s.
    coordinator._AutoscalingCoordinatorActor.TICK_INTERVAL_S = 1

CHANGES["ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator"] = soon_known
%s
class Changed(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        change = CHANGES.pop(name, None)
        if change is None:
            return None
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            change(module)

        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Changed())
"""

ON_THE_CPU = """
def on_the_cpu(device):
    device.worker_device = lambda kind, share=1.0: device.torch.device("cpu")

CHANGES["davir_ray.models.device"] = on_the_cpu
"""
"""Workers on logical GPUs compute on the CPU; they would be refused for want of a real GPU."""

_GATED = """
def gated(scorer):
    score, gate, calls = scorer.Scorer.__call__, pathlib.Path(os.environ["GATE"]), itertools.count()

    def call(self, examples):
        (gate / f"{os.getpid()}.pid").touch()
        if next(calls) >= int(os.environ["SHARDS_BEFORE_THE_GATE"]):
            wait_until((gate / "open").exists)
        return score(self, examples)

    scorer.Scorer.__call__ = call

CHANGES["davir_ray.models.scorer"] = gated
"""


def changed_workers(folder: Path, changes: str) -> dict[str, str]:
    """Write what a worker runs when it starts; returns the environment that lets it.

    The code of `changes` adds functions to CHANGES, by the name of the module that each changes.
    """
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(_SITE % changes)
    return {"PYTHONPATH": os.pathsep.join([str(folder), str(PACKAGE)])}


@dataclass(frozen=True)
class Gate:
    """Holds every scoring actor after a few shards: what a test does in the middle of a run it does in time."""

    folder: Path
    num_shards: int
    """Shards that an actor scores before it waits."""

    def environment(self, changes: str = "") -> dict[str, str]:
        """Of a driver whose actors wait."""
        self.folder.mkdir()
        variables = {"GATE": str(self.folder), "SHARDS_BEFORE_THE_GATE": str(self.num_shards)}
        return changed_workers(self.folder / "site", _GATED + changes) | variables

    def actors(self) -> list[int]:
        """Process ids of the actors that have begun a shard."""
        return [int(place.stem) for place in self.folder.glob("*.pid")]

    def open(self) -> None:
        """Let them go on."""
        (self.folder / "open").touch()
