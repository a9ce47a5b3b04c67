"""Forward passes of every family on fake CUDA tensors, in a process of their own: what they do is told as JSON.

A fake tensor has no values, so whatever would wait for a GPU's values fails: a host sync is an error.
"""

import ctypes
import json
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch
from families import PACKABLE, config_of, draw_examples
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from davir_ray.models.kernel import by_length
from davir_ray.models.kernel.attention import PACKED_ATTENTION, register_packed_attention
from davir_ray.models.kernel.likelihood import Likelihood, Pack


def pretend(guard: str) -> None:
    """Let this process make fake CUDA tensors, and answer as a GPU would where a fake one cannot be asked."""
    ctypes.CDLL(guard)
    torch.Tensor.pin_memory = lambda self, *_args, **_kwargs: self  # type: ignore[method-assign, assignment]
    torch.cuda.is_bf16_supported = lambda *_args, **_kwargs: True  # type: ignore[assignment]
    torch.cuda.get_device_capability = lambda *_args: (9, 0)  # type: ignore[assignment]
    torch.amp.autocast_mode.torch.cuda.amp.common.amp_definitely_not_available = lambda: False


def make(family: str, dtype: torch.dtype) -> PreTrainedModel:
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config_of(family), attn_implementation=PACKED_ATTENTION, dtype=dtype)
    return model.eval()  # type: ignore[no-any-return]


def score(family: str, pack: Pack) -> torch.Tensor:
    """As a scoring actor does: half precision, no gradients."""
    with torch.no_grad():
        return Likelihood(make(family, torch.bfloat16))(pack)  # type: ignore[no-any-return]


def train(family: str, pack: Pack) -> torch.Tensor:
    """As a fine-tune does: float32 weights under autocast, activations recomputed."""
    model = make(family, torch.float32).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with torch.autocast("cuda", torch.bfloat16):
        return Likelihood(model)(pack)  # type: ignore[no-any-return]


WORK: dict[str, Callable[[str, Pack], torch.Tensor]] = {"score": score, "train": train}


def told(work: Callable[[str, Pack], torch.Tensor], family: str) -> dict[str, Any]:
    """The losses' device, type and shape; or the error, and the line of the models or the kernel that it came from."""
    examples = draw_examples()
    pack = Pack.of(examples)
    # A loop over lengths, which dropout and soft caps need, reads them from the CPU; here those would be fake, too.
    by_length.lengths_of = lambda _edges: list(pack.sequence_lengths)  # type: ignore[assignment]
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            nll_R = work(family, pack)
        return {"device": nll_R.device.type, "dtype": str(nll_R.dtype), "rows": len(nll_R)}
    except Exception as error:  # noqa: BLE001 - told, whatever it is
        lines = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
        own = [line for line in lines if "davir_ray" in line or "transformers" in line]
        return {"error": f"{type(error).__name__}: {error}"[:300], "at": own[-2:]}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    pretend(sys.argv[1])
    register_packed_attention()
    everything = {name: {family: told(work, family) for family in PACKABLE} for name, work in WORK.items()}
    sys.stdout.write(json.dumps(everything))
