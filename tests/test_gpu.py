"""What must hold on a real GPU, in a few seconds each; skipped where there is none.

It needs torch, transformers, numpy, pyarrow, safetensors and pytest alone: `docs/gpus.md` has the command.
"""

import copy
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from families import Example, config_of
from families import make as make_model
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from davir_ray.config.training import FinetuneConfig
from davir_ray.models.kernel.attention import on_flash, packed_attention, register_packed_attention
from davir_ray.models.kernel.likelihood import Likelihood, Pack
from davir_ray.models.memory import Rows, TokenBudget
from davir_ray.models.training.examples import TrainingSet
from davir_ray.models.training.loop import Trainer
from davir_ray.models.training.pairs import PairSet

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]

GPU = torch.device("cuda")
LENGTHS = (1, 2, 3, 64, 127, 128, 129, 255, 7, 500)
FAMILIES = ("Llama", "Mistral", "Gemma3Text", "Qwen3", "Mixtral")
"""Full and windowed attention, norms of queries and keys, experts."""

register_packed_attention()


def make(family: str, dtype: torch.dtype) -> PreTrainedModel:
    config = config_of(family)
    config.max_position_embeddings = 1024
    return make_model(config).to(GPU, dtype)  # type: ignore[arg-type, return-value]


def draw(lengths: tuple[int, ...] = LENGTHS[2:], seed: int = 0) -> list[Example]:
    tokens = np.random.default_rng(seed)
    return [(tokens.integers(3, 100, length, dtype=np.int32), (max(1, length // 3), length)) for length in lengths]


def training_set(examples: list[Example]) -> TrainingSet:
    return TrainingSet.of([
        pa.table({
            "example_id": pa.array(range(len(examples)), pa.int64()),
            "input_ids": pa.array([ids for ids, _ in examples], pa.list_(pa.int32())),
            "response_spans": pa.array([list(spans) for _, spans in examples], pa.list_(pa.int32())),
        })
    ])  # fmt: skip


# --- exactness -------------------------------------------------------------------------------------------------------


def written_out(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None) -> torch.Tensor:
    """Causal attention of one sequence in float64, [heads, L, D] → [L, heads, D]."""
    key, value = (x.repeat_interleave(len(query) // len(key), dim=0) for x in (key, value))
    weights = query @ key.transpose(1, 2) / query.shape[-1] ** 0.5
    at = torch.arange(query.shape[1], device=query.device)
    distance = at[:, None] - at
    weights = weights.masked_fill((distance < 0) | (distance >= (window or len(at))), -torch.inf)
    return (torch.softmax(weights, -1) @ value).transpose(0, 1)


@pytest.mark.parametrize("window", [None, 1, 64])
@pytest.mark.parametrize("heads", [(8, 8), (8, 2), (6, 1)])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_packed_attention_is_that_of_float64_forward_and_backward(
    dim: int, heads: tuple[int, int], window: int | None
) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(1, count, sum(LENGTHS), dim, device=GPU).bfloat16() for count in (*heads, heads[1])]
    assert on_flash(tensors[0])
    packed = [tensor.clone().requires_grad_() for tensor in tensors]
    exact = [tensor.double().requires_grad_() for tensor in tensors]
    edges = torch.tensor((0, *LENGTHS)).cumsum(0, dtype=torch.int32)
    found, _ = packed_attention(
        torch.nn.Module(), *packed, None, sequence_edges=edges.to(GPU), sequence_edges_on_cpu=edges,
        longest_sequence=max(LENGTHS), sliding_window=window,
    )  # fmt: skip
    spans = list(itertools.pairwise(edges.tolist()))
    expected = torch.cat([written_out(*(x[0, :, first:last] for x in exact), window) for first, last in spans])
    for first, last in spans:
        apart = (found[0, first:last].double() - expected[first:last]).norm()
        assert apart < 2e-2 * expected[first:last].norm(), (first, last)
    direction = torch.randn_like(expected)
    found[0].backward(direction.bfloat16())
    expected.backward(direction)
    # Together: within a window of 1 the gradients of queries and keys are 0.
    found_gradient, exact_gradient = (
        torch.cat([tensor.grad.double().flatten() for tensor in tensors if tensor.grad is not None])
        for tensors in (packed, exact)
    )
    assert (found_gradient - exact_gradient).norm() < 3e-2 * exact_gradient.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_no_sequence_sees_its_neighbours(family: str) -> None:
    likelihood, examples = Likelihood(make(family, torch.bfloat16)), draw()
    edges = np.cumsum([0, *[last - first for _, (first, last) in examples]])
    with torch.inference_mode():
        before = likelihood(Pack.of(examples))
        for kept in range(len(examples)):
            others = draw(seed=kept + 1)
            others[kept] = examples[kept]
            after, own = likelihood(Pack.of(others)), slice(edges[kept], edges[kept + 1])
            assert torch.equal(after[own], before[own]), kept
            assert not torch.equal(after, before)


@pytest.mark.parametrize(("precision", "limit"), [("float32", 1e-4), ("bfloat16", 0.1)])
@pytest.mark.parametrize("family", ["Llama", "Mistral", "Gemma2"])
def test_the_gradient_of_a_pack_is_that_of_its_sequences_alone_in_float64(
    family: str, precision: str, limit: float
) -> None:
    model, examples = make(family, torch.float32), draw((5, 9, 9, 33, 70, 129))
    plain = copy.deepcopy(model).double()
    plain.set_attn_implementation("eager")
    for ids, (first, last) in examples:
        ids_1T = torch.from_numpy(ids.astype(np.int64))[None].to(GPU)
        logits_TV = plain(input_ids=ids_1T, use_cache=False).logits[0, first - 1 : last - 1]
        cross_entropy(logits_TV, ids_1T[0, first:last], reduction="sum").backward()
    weight = sum(last - first for _, (first, last) in examples)
    config = FinetuneConfig(batch_size=len(examples), precision=precision)  # type: ignore[arg-type]
    Trainer(Likelihood(model), training_set(examples), config).backward(np.arange(len(examples)))
    apart = norm = 0.0
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        expected = other.grad / weight
        apart, norm = apart + float((one.grad - expected).norm()) ** 2, norm + float(expected.norm()) ** 2
    assert apart**0.5 < limit * norm**0.5


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_pass_gives_the_same_bits(family: str) -> None:
    likelihood, pack = Likelihood(make(family, torch.bfloat16)), Pack.of(draw())
    with torch.inference_mode():
        first, second = likelihood(pack), likelihood(pack)
    assert torch.equal(first, second)
    assert torch.isfinite(first).all()


# --- waiting and memory ----------------------------------------------------------------------------------------------


@contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever makes the CPU wait for the GPU is an error in the block."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_waiting_is_noticed() -> None:
    value = torch.ones((), device=GPU)
    with pytest.raises(RuntimeError, match="synchroniz"), no_waiting():
        value.item()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_scoring_pass_never_waits_for_the_gpu(family: str) -> None:
    likelihood = Likelihood(make(family, torch.bfloat16))
    with torch.inference_mode():
        likelihood(Pack.of(draw()))  # kernels are loaded, and options tried, once
        with no_waiting():
            likelihood(Pack.of(draw(seed=1)))


def test_the_loss_of_pairs_never_waits_for_the_gpu() -> None:
    examples = draw((9, 9, 20, 20))
    num_tokens = np.array([last - first for _, (first, last) in examples])
    pairs = PairSet(
        examples=training_set(examples), ids=np.arange(2), frozen_logprobs=np.full(4, -20.0), num_tokens=num_tokens,
        loss="davir_dpo", beta=1.0,
    )  # fmt: skip
    nll_R = torch.rand(int(num_tokens.sum()), device=GPU)
    pairs.sums(nll_R, np.arange(2))
    with no_waiting():
        pairs.sums(nll_R, np.arange(2))


def test_a_pass_that_runs_out_of_memory_leaves_none_behind() -> None:
    model, examples = make("Llama", torch.bfloat16), draw((100,) * 16)
    likelihood, rows = Likelihood(model), np.arange(len(examples))

    def run_out(module: Any, args: Any, kwargs: Any) -> None:
        if kwargs["longest_sequence"] and args[0].shape[1] > 400:
            torch.empty(2**50, device=GPU)

    def forward(packed: Rows) -> torch.Tensor:
        found: torch.Tensor = likelihood(Pack.of([examples[row] for row in packed]))
        return found

    def score(forward: Callable[[Rows], torch.Tensor]) -> tuple[TokenBudget, list[Any]]:
        budget = TokenBudget(1600)
        lengths = np.full(len(examples), 100)
        with torch.inference_mode():
            return budget, list(budget.run(forward, rows, lengths, rows))

    score(forward)
    torch.cuda.synchronize()
    used = torch.cuda.memory_allocated()
    hook = model.model.layers[1].register_forward_pre_hook(run_out, with_kwargs=True)
    budget, passes = score(forward)
    hook.remove()
    assert budget.num_tokens == 400
    assert sorted(row for packed, _ in passes for row in packed) == rows.tolist()
    del passes
    assert torch.cuda.memory_allocated() == used
