"""How a fine-tune's model is distributed over its ranks: replicated on each (ddp), or sharded over all (fsdp).

Both take the same steps; the loop in loop.py calls methods for the few things that differ. With sharding (FSDP2), each
rank holds its rows of every weight, gradient and moment, and gathers the weights of one decoder layer at a time.
Embedding, head and last norm stay gathered during a whole pass: the likelihood kernel uses the head in chunks, also in
the backward pass, and head and embedding may be one weight.
"""

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from davir_ray.errors import ConfigError, DavirError, IntegrityError, ModelError
from davir_ray.models.kernel.layers import layers_of
from davir_ray.models.kernel.likelihood import Likelihood
from davir_ray.models.kernel.self_check import Example, check_examples, probe, tolerance

STATE_FILE = "training_state.pt"
"""The state of a replicated model."""

SHARDS_FILE = "training_state.json"
"""Position of a sharded model, with the names of the files that hold its state, one from each rank."""

_CHECKSUM = ".sha256"
"""Suffix of the file that holds the checksum of another, in place of its own."""

Weights = dict[str, torch.Tensor]

T = TypeVar("T")


@dataclass(frozen=True)
class Position:
    """The progress of a training, saved with its state."""

    step: int
    history: list[list[float]]
    """The measures of every step so far, the loss first."""


class Replicated:
    """A model that is whole on each rank; rank 0 saves its state."""

    every_rank_saves = False

    repeats_alone = True
    """Whether a rank may repeat a pass that failed while the others wait for its next collective."""

    def __init__(self, module: Likelihood | DistributedDataParallel) -> None:
        self._module = module
        wrapped = module.module if isinstance(module, DistributedDataParallel) else module
        if not isinstance(wrapped, Likelihood):
            raise TypeError(f"a Trainer trains a Likelihood, not {type(wrapped).__name__}")
        self.likelihood = wrapped

    def check_lengths(self, longest: int) -> None:
        """Accept any length: ranks need not run their layers equally often."""

    def exchange_gradients(self, now: bool) -> None:
        """Set whether the next backward pass averages gradients over ranks; else they accumulate on each rank."""
        if isinstance(self._module, DistributedDataParallel):
            self._module.require_backward_grad_sync = now

    def zero_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Forget the gradients; those that are views of buckets are kept as zeros, or they would be held twice."""
        optimizer.zero_grad(set_to_none=not isinstance(self._module, DistributedDataParallel))

    def clip_gradients(self, max_norm: float) -> float:
        """Clip the gradient to a norm; returns the norm before."""
        return float(torch.nn.utils.clip_grad_norm_(self._module.parameters(), max_norm))

    def gathered(self) -> Weights | None:
        """The weights for an export. None: the model's own."""
        return None

    def save(self, folder: Path, optimizer: torch.optim.Optimizer, position: Position) -> None:
        """Write trained weights, optimiser and position; complete after `add_checksums`."""
        model = self.likelihood.model
        state = {
            "step": position.step,
            "history": position.history,
            "model": {name: value for name, value in model.state_dict().items() if name not in _frozen(model)},
            "optimizer": optimizer.state_dict(),
        }
        torch.save(state, folder / STATE_FILE)

    def load(self, folder: Path, optimizer: torch.optim.Optimizer) -> Position:
        """Load a saved state. IntegrityError if it is damaged, ConfigError if it is of the other strategy."""
        _check_strategy(folder, SHARDS_FILE, "fsdp")
        _check(folder, STATE_FILE)
        model = self.likelihood.model
        state = torch.load(folder / STATE_FILE, map_location=model.device, weights_only=True)
        if set(state["model"]) != model.state_dict().keys() - _frozen(model):
            raise ValueError(f"{folder} holds the state of another model")
        model.load_state_dict(state["model"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
        return Position(int(state["step"]), list(state["history"]))


class Sharded:
    """A model made by `sharded`; each method is called on every rank at the same time."""

    every_rank_saves = True

    repeats_alone = False

    def __init__(self, likelihood: Likelihood) -> None:
        self.likelihood = likelihood

    def check_lengths(self, longest: int) -> None:
        """Raise ConfigError if a pack may run the layers twice: each run gathers them, which all ranks must join."""
        limit = self.likelihood.one_pass_length
        if limit is not None and longest > limit:
            raise ConfigError(
                f"finetune.strategy fsdp cannot train this model on a sequence of {longest} tokens: above {limit} its "
                f"rotary embedding changes; lower prepare.max_tokens to {limit}, or give --finetune.strategy ddp"
            )

    def exchange_gradients(self, now: bool) -> None:
        """Do nothing: every backward pass sums over ranks.

        Without the exchange each rank would hold whole gradients (4 bytes per parameter), and for a model that needs
        sharding there is no room for them.
        """

    def zero_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Forget the gradients."""
        optimizer.zero_grad(set_to_none=True)

    def clip_gradients(self, max_norm: float) -> float:
        """Clip the gradient to a norm over all ranks; returns the norm before."""
        norm = torch.nn.utils.clip_grad_norm_(self.likelihood.parameters(), max_norm)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def gathered(self) -> Weights:
        """The weights for an export, in the CPU memory of rank 0 only; a device holds one whole weight at a time.

        For a model with an adapter only the adapter's. A tied weight is one tensor under both names, which
        get_model_state_dict would gather as two.
        """
        model = self.likelihood.model
        is_first, only_trained = dist.get_rank() == 0, getattr(model, "_hf_peft_config_loaded", False)
        seen: dict[int, torch.Tensor] = {}
        found: Weights = {}
        for name, value in model.state_dict(keep_vars=True).items():
            if only_trained and not value.requires_grad:
                continue
            if id(value) not in seen:
                whole = value.full_tensor() if isinstance(value, DTensor) else value
                seen[id(value)] = whole.detach().cpu() if is_first else torch.empty(0)
            found[name] = seen[id(value)]
        return found if is_first else {}

    def save(self, folder: Path, optimizer: torch.optim.Optimizer, position: Position) -> None:
        """Write this rank's rows of weights and moments as safetensors to an empty folder of its own.

        Rank 0 adds the position and the names of all files. To be loaded, the files of all ranks must be in one folder,
        each with its checksum (`add_checksums`).
        """
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        save(dict(_tensors(self.likelihood.model, optimizer)), storage_writer=writer)
        names = [name for files in from_all([path.name for path in folder.iterdir()]) for name in files]
        if dist.get_rank() == 0:
            index = {"step": position.step, "history": position.history, "files": sorted(names)}
            (folder / SHARDS_FILE).write_text(json.dumps(index))

    def load(self, folder: Path, optimizer: torch.optim.Optimizer) -> Position:
        """Load a state that any number of ranks saved.

        IntegrityError if it is damaged, ConfigError if it is of the other strategy; every rank raises it.
        """
        index = together(partial(_verified_index, folder))
        tensors = dict(_tensors(self.likelihood.model, optimizer))
        reader = HuggingFaceStorageReader(str(folder))
        if set(tensors) != reader.read_metadata().state_dict_metadata.keys():
            raise ValueError(f"{folder} holds the state of another model")
        load(tensors, storage_reader=reader)
        return Position(int(index["step"]), list(index["history"]))


def strategy_of(module: Likelihood | DistributedDataParallel) -> Replicated | Sharded:
    """The strategy by which this module is distributed over the ranks."""
    if isinstance(module, FSDPModule) and isinstance(module, Likelihood):
        return Sharded(module)
    return Replicated(module)


def replicated(likelihood: Likelihood) -> Likelihood | DistributedDataParallel:
    """A model that each rank holds; with one rank the model itself."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return likelihood
    device = likelihood.model.device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # Gradients are views of the buckets that are exchanged: otherwise both are held, 4 bytes per parameter more.
    devices = [device] if device.type == "cuda" else None
    with warnings.catch_warnings():  # torch 2.13 renames the argument that 2.11 has
        warnings.simplefilter("ignore", FutureWarning)
        # Buffers are constants. Ranks that broadcast them would wait for one that ran out of memory.
        return DistributedDataParallel(
            likelihood, device_ids=devices, gradient_as_bucket_view=True, broadcast_buffers=False
        )


def sharded(make: Callable[[], Likelihood], device: torch.device, *, autocast: bool) -> Likelihood:
    """A model sharded over all ranks: no device ever holds more than its part, embeddings and head, and two layers.

    `make` runs on rank 0 only and builds the model on the CPU, whose memory must hold it; a DavirError is raised on
    every rank. ModelError if the model does not name the modules that are its layers.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    weights: dict[str, Any] = {}  # of rank 0 only
    model, packed, buffers, losses = _from_first(lambda: _emptied(make(), weights))
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    # Under autocast a layer is gathered in bfloat16, in which autocast computes; gradients are summed in float32.
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if autocast else None,
        reduce_dtype=torch.float32 if autocast else None,
        cast_forward_inputs=False,
    )
    for layer in layers_of(model, otherwise="use --finetune.strategy ddp"):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    model.to_empty(device=device)
    model.tie_weights()  # each name was given a tensor of its own
    likelihood = Likelihood(model)
    likelihood.packed = packed
    fully_shard(likelihood, mesh=mesh, reshard_after_forward=False)
    # Each rank is given its rows of rank 0's weights, one whole weight at a time.
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    for name, buffer in model.named_buffers():  # those that are not saved, too
        buffer.copy_(buffers[name])
    likelihood.eval()
    # Rank 0 checked the model on the CPU; sharded, on this device and under autocast, it must have the same losses.
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        difference = float((probe(likelihood, losses.examples) - losses.nll_R).abs().mean())
    # A pass without a backward pass leaves the root's weights gathered, and the next steps would not see them change.
    cast(FSDPModule, likelihood).reshard()
    if not difference <= tolerance(exact=not autocast):
        raise ModelError(
            f"{type(model).__name__} has other losses sharded on {device} than on the CPU: they differ by "
            f"{difference:.3g} nats per token; use --finetune.strategy ddp"
        )
    return likelihood


@dataclass(frozen=True)
class CheckedLosses:
    """The check's sequences, and the losses that a model was found to have on them."""

    examples: list[Example]
    nll_R: torch.Tensor


def _emptied(likelihood: Likelihood, weights: dict[str, Any]) -> tuple[PreTrainedModel, bool, Weights, CheckedLosses]:
    """Move a model's weights to `weights`; returns the model without them, whether it is packed, buffers and losses."""
    model = likelihood.model
    if model.is_remote_code():  # the other ranks cannot import its class
        raise ModelError(f"{type(model).__name__} comes with its own code; use --finetune.strategy ddp")
    weights.update({name: value.contiguous() for name, value in model.state_dict().items()})
    buffers = dict(model.named_buffers())
    examples = check_examples(model)
    losses = CheckedLosses(examples, probe(likelihood, examples))
    model.to("meta")
    return model, likelihood.packed, buffers, losses


def _tensors(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, torch.Tensor]]:
    """Trained weights and AdamW's state, by name; before the first step the state is created as zeros."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        yield f"model.{name}", parameter.detach()
        if parameter not in optimizer.state:
            moments = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
            # A fused AdamW reads the number of its step on the device.
            device = parameter.device if optimizer.defaults.get("fused") else torch.device("cpu")
            optimizer.state[parameter] = {"step": torch.zeros((), device=device), **moments}
        for key, value in optimizer.state[parameter].items():
            # A view with one row: the file format stores rows.
            yield f"optimizer.{name}.{key}", value.view(1) if value.ndim == 0 else value


def _from_first(make: Callable[[], Any]) -> Any:
    """Return on every rank what `make` returns on rank 0; a DavirError is raised on every rank, too."""
    box = [together(lambda: make() if dist.get_rank() == 0 else None)]
    dist.broadcast_object_list(box)
    return box[0]


def together(work: Callable[[], T]) -> T:
    """Call `work` on each rank and return its result; a DavirError on one rank is raised on all.

    Otherwise the other ranks would wait forever for a rank whose disk is full, for example. If the work itself waits
    for other ranks, no rank may raise such an error alone before that point.
    """
    problem, done = None, None
    try:
        done = work()
    except DavirError as error:
        problem = error
    problem = next((found for found in from_all(problem) if found is not None), None)
    if problem is not None:
        raise problem
    return cast(T, done)


def from_all(own: Any) -> list[Any]:
    """The objects of all ranks, on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [own]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return found


def _verified_index(folder: Path) -> dict[str, Any]:
    """The index of a sharded state, after it and this rank's share of the files were verified."""
    _check_strategy(folder, STATE_FILE, "ddp")
    _check(folder, SHARDS_FILE)
    index: dict[str, Any] = json.loads((folder / SHARDS_FILE).read_bytes())
    if isinstance(index["files"], dict):
        raise ConfigError("an earlier version of davir_ray wrote it")
    for name in sorted(index["files"])[dist.get_rank() :: dist.get_world_size()]:
        _check(folder, name)
    return index


def add_checksums(folder: Path) -> None:
    """Write a checksum for each file of a saved state; calls no other rank, so that a thread may do it."""
    for file in list(folder.iterdir()):
        file.with_suffix(_CHECKSUM).write_text(_checksum(file))


def _check(folder: Path, name: str) -> None:
    """Raise IntegrityError unless a file has its checksum."""
    file = folder / name
    for needed in (file.with_suffix(_CHECKSUM), file):
        if not needed.is_file():
            raise IntegrityError(f"{needed.name} is missing")
    if _checksum(file) != file.with_suffix(_CHECKSUM).read_text(errors="replace"):
        raise IntegrityError(f"{name} does not match its checksum")


def _check_strategy(folder: Path, others: str, strategy: str) -> None:
    if (folder / others).exists():
        raise ConfigError(f"it was written with finetune.strategy {strategy}; give --finetune.strategy {strategy}")


def _checksum(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _frozen(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters(remove_duplicate=False) if not parameter.requires_grad}
