"""The resources of the cluster, and the pools of actors that fit it."""

import logging
from typing import Literal, NamedTuple

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from davir_ray.config.scoring import ScoreConfig
from davir_ray.errors import ClusterError
from davir_ray.text import one_line

log = logging.getLogger(__name__)

_ASK_S = 120
"""Seconds that nodes have to say which GPUs they have."""


def driver_node() -> NodeAffinitySchedulingStrategy:
    """Where an actor of the driver's runs: on the driver's own node, so that it is not lost with another."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)


def num_nodes() -> int:
    """The number of nodes that are alive."""
    return sum(bool(node["Alive"]) for node in ray.nodes())


def num_cpus() -> float:
    """The CPUs of the cluster."""
    return float(ray.cluster_resources().get("CPU", 1))


def has_gpu() -> bool:
    """Whether the cluster has any GPU."""
    return float(ray.cluster_resources().get("GPU", 0)) >= 1


def accelerators() -> list[str]:
    """Ray's names of the kinds of GPU in the cluster, such as A100."""
    start = "accelerator_type:"
    return sorted(name.removeprefix(start) for name in ray.cluster_resources() if name.startswith(start))


class Gpu(NamedTuple):
    """What is true of each GPU of the cluster."""

    num_bytes: int
    """The memory of the smallest."""
    has_bfloat16: bool


def smallest_gpu() -> Gpu | None:
    """The least that a GPU of the cluster has, asked on each node with one. None, with a warning: no node said."""
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU", 0) >= 1]
    task = ray.remote(num_cpus=0)(_gpus_of_this_node)
    there = [task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)) for node in nodes]
    try:
        found = [gpu for gpus in ray.get([one.remote() for one in there], timeout=_ASK_S) for gpu in gpus]
    except ray.exceptions.RayError as error:
        log.warning("the memory of the GPUs is not known: %s", one_line(error, 200))
        return None
    if not found:
        log.warning("the memory of the GPUs is not known: torch sees none on the nodes that have them")
        return None
    return Gpu(min(gpu.num_bytes for gpu in found), all(gpu.has_bfloat16 for gpu in found))


def _gpus_of_this_node() -> list[Gpu]:
    import torch  # imported late: in the task alone

    has_bfloat16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    sizes = [torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count())]
    return [Gpu(size, has_bfloat16) for size in sizes]


def pool_size(wanted: int | None, num_cpus: float, num_gpus: float) -> int:
    """The size of a pool: `wanted`, else as many actors as fit the cluster; raises ClusterError if they do not fit."""
    room = room_for(num_cpus, num_gpus)
    if room < max(1, wanted or 1):
        resources = ray.cluster_resources()
        raise ClusterError(
            f"{wanted or 1} actors of {num_cpus:g} CPUs and {num_gpus:g} GPUs do not fit a cluster of "
            f"{resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} GPUs with one CPU left for reading and "
            "writing; lower score.num_actors, score.num_cpus or score.num_gpus, or take a larger cluster"
        )
    return wanted or room


def actor_cpus(num_cpus: float) -> float:
    """CPUs of an actor, as wanted; half a CPU where the cluster has only one, so that reading and writing fit, too."""
    return 0.5 if num_cpus == 1 and 1 <= ray.cluster_resources().get("CPU", 0) < 2 else num_cpus


def room_for(num_cpus: float, num_gpus: float) -> int:
    """The number of actors of this size that fit the nodes, with room left on one of them for a task of `side_cpus`.

    An actor pool that takes all CPUs starves reads and writes, and the run hangs without an error (seen with 2.60).
    """
    nodes: list[dict[str, float]] = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    wanted = {name: size for name, size in (("CPU", num_cpus), ("GPU", num_gpus)) if size}
    rooms = [min(int(node.get(name, 0.0) / size + 1e-9) for name, size in wanted.items()) for node in nodes]
    left = [node.get("CPU", 0.0) - num_cpus * room for node, room in zip(nodes, rooms, strict=True)]
    is_full = max(left, default=0.0) < side_cpus(num_cpus)
    return sum(rooms) - is_full  # leaving out one actor makes enough room


def side_cpus(num_cpus: float) -> float:
    """CPUs of a task that writes next to actors of this size: at most those of one actor, so that it fits.

    A task that reads takes half as many: with equal CPUs Ray fuses reading into the actor, and nothing overlaps.
    """
    return min(1.0, num_cpus)


class Pool(NamedTuple):
    """The number of actors that work."""

    min_size: int
    max_size: int
    initial_size: int

    def at_most(self, num_shards: int) -> "Pool":
        """The pool with no more actors than there are shards."""
        return Pool(*(min(size, num_shards) for size in self))

    def __str__(self) -> str:
        growth = f" ({self.min_size} to {self.max_size})" if self.min_size < self.max_size else ""
        return f"{self.initial_size} actors{growth}"


def plan_pool(config: ScoreConfig) -> Pool:
    """The pool that the settings give on this cluster; it starts at full size, because loading models takes long.

    Raises ClusterError if it does not fit; a pool that grows may wait for nodes that have not joined yet.
    """
    num_cpus, num_gpus = actor_cpus(config.num_cpus), num_gpus_of(config)
    if config.autoscale is None:
        size = pool_size(config.num_actors, num_cpus, num_gpus)
        return Pool(size, size, size)
    min_size, max_size = config.autoscale
    room = room_for(num_cpus, num_gpus)
    # Without room yet, pending actors make the autoscaler add nodes.
    initial_size = min(max_size, room) if room > 0 else min_size
    return Pool(min(min_size, initial_size), max_size, initial_size)


def device_of(config: ScoreConfig) -> Literal["cpu", "cuda"]:
    """The device of one actor."""
    return "cuda" if num_gpus_of(config) > 0 else "cpu"


def num_gpus_of(config: ScoreConfig) -> float:
    """GPUs of one actor."""
    return (1.0 if has_gpu() else 0.0) if config.num_gpus is None else config.num_gpus
