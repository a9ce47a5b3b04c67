"""The decoder layers of a model, and their compilation by torch.

A layer is compiled once for packs of any lengths, and the other layers of its kind run the same code. Compiled layers
are for scoring; training runs them eagerly.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from davir_ray.errors import ModelError
from davir_ray.text import one_line

if TYPE_CHECKING:  # transformers' models take seconds to import, and a driver loads none
    from transformers import PreTrainedModel

MAX_VARIANTS = 64
"""How often the code of a layer may be compiled. Each kind of layer needs a variant, and again for the short windows of
the check at start-up, and for an adapter that is absent, switched on or switched off: Gemma 3 with an adapter needs 9.
torch's own limit is 8, after which it silently runs the layer eagerly."""


def layers_of(model: PreTrainedModel, *, otherwise: str) -> list[torch.nn.Module]:
    """The outermost modules that transformers keeps on one device, except any that holds an embedding or the head.

    ModelError, with what to do otherwise, if the model does not name them.
    """
    names = set(model._no_split_modules or ())
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    shared = {id(parameter) for end in ends if end is not None for parameter in end.parameters()}
    found: dict[str, torch.nn.Module] = {}
    for name, module in model.named_modules():
        is_inside = any(name.startswith(f"{outer}.") for outer in found)
        if type(module).__name__ in names and not is_inside and shared.isdisjoint(map(id, module.parameters())):
            found[name] = module
    if not found:
        raise ModelError(f"{type(model).__name__} does not name its layers; {otherwise}")
    return list(found.values())


def compile_layers(model: PreTrainedModel) -> None:
    """Let torch compile each layer, in place, when it is first run; ModelError if the model does not name them."""
    for layer in layers_of(model, otherwise="leave score.compile false"):
        layer.compile(dynamic=True)


@contextmanager
def running_compiled(model: PreTrainedModel) -> Iterator[None]:
    """A block that runs compiled layers. ModelError where they cannot be compiled, or are compiled without end."""
    import torch._dynamo as dynamo  # imported late: it takes seconds, and few runs compile

    family = type(model).__name__
    try:
        with dynamo.config.patch(recompile_limit=MAX_VARIANTS, fail_on_recompile_limit_hit=True):
            yield
    except dynamo.exc.FailOnRecompileLimitHit as error:
        reason = one_line(error.__cause__ or error, 400)
        raise ModelError(
            f"score.compile is true, but a layer of {family} needs more than {MAX_VARIANTS} compiled variants; leave "
            f"score.compile false ({reason})"
        ) from error
    except dynamo.exc.TorchDynamoException as error:
        raise ModelError(
            f"score.compile is true, but the layers of {family} cannot be compiled here ({one_line(error, 400)}); "
            "leave score.compile false, or install what is missing: on a CPU a C++ compiler (g++, or the one that CXX "
            "names) and the headers of Python, on a GPU also Triton"
        ) from error
