"""The start-up check with the attention of a GPU, emulated on a CPU: it must catch every fault that is planted."""

import copy
import inspect
import itertools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo
import torch.nn.attention.varlen
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, Qwen2Config, Qwen3MoeConfig

from davir_ray.models.kernel import attention, flash
from davir_ray.models.kernel.attention import PACKED_ATTENTION, register_packed_attention
from davir_ray.models.kernel.eager import eager_nll
from davir_ray.models.kernel.likelihood import Likelihood, Pack
from davir_ray.models.kernel.self_check import check_examples, self_check

WINDOW = 4096
SMALL: dict[str, Any] = {
    "vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.1, "max_position_embeddings": 8192,
}  # fmt: skip
WINDOWED = Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1)
EXPERTS = Qwen3MoeConfig(
    **SMALL, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, decoder_sparse_step=1
)
HALF = (torch.bfloat16, torch.float16)
FAULTS = [
    "edges ignored", "first two joined", "last two joined", "not causal", "other scale", "window ignored",
    "window off by one", "heads in another order", "no gradient of keys", "a trace of the others",
]  # fmt: skip


def varlen_as_documented(fault: str | None) -> Callable[..., torch.Tensor]:
    """The varlen_attn of torch, written out sequence by sequence, with one fault."""

    def attend(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seq_q: torch.Tensor, cu_seq_k: torch.Tensor,
        max_q: int, max_k: int, *, scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
        enable_gqa: bool = False, num_splits: int | None = None,
    ) -> torch.Tensor:  # fmt: skip
        assert cu_seq_q.dtype == torch.int32
        assert query.shape[1] == key.shape[1] or enable_gqa
        edges, (left, right) = cu_seq_q.tolist(), window_size
        assert max(cu_seq_q.diff().tolist()) == max_q == max_k
        if fault == "edges ignored":
            edges = [0, edges[-1]]
        if fault == "first two joined":
            edges = [edges[0], *edges[2:]]
        if fault == "last two joined":
            edges = [*edges[:-2], edges[-1]]
        right = -1 if fault == "not causal" else right
        left = -1 if fault == "window ignored" else left + (fault == "window off by one" and left >= 0)
        scale = (scale or query.shape[2] ** -0.5) * (1.25 if fault == "other scale" else 1)
        groups = query.shape[1] // key.shape[1]
        if fault == "no gradient of keys":
            key = key.detach()
        if fault == "heads in another order":
            key, value = key.repeat(1, groups, 1), value.repeat(1, groups, 1)
        else:
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        outputs = []
        for start, end in itertools.pairwise(edges):
            q, k, v = (x[start:end].transpose(0, 1) for x in (query, key, value))
            at = torch.arange(end - start)
            distance = at[:, None] - at[None, :]
            seen = (distance <= left if left >= 0 else distance > -len(at)) & (
                -distance <= right if right >= 0 else True
            )
            weights = (q.float() @ k.float().transpose(1, 2) * scale).masked_fill(~seen, -torch.inf)
            outputs.append((torch.softmax(weights, -1).to(v.dtype) @ v).transpose(0, 1))
        trace = 0.01 if fault == "a trace of the others" else 0.0
        return torch.cat(outputs) + trace * value.mean(0)

    return attend


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str | None], None]]:
    """Install the attention of a GPU with a fault, or without."""

    def install(fault: str | None) -> None:
        monkeypatch.setattr(attention, "on_flash", lambda query: query.dtype in HALF)
        monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", varlen_as_documented(fault))

    asked = (flash._one_split_is_taken, flash._varlen_parameters)
    for function in asked:
        function.cache_clear()
    yield install
    for function in asked:
        function.cache_clear()


def make(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    torch.manual_seed(0)
    register_packed_attention()
    model = AutoModelForCausalLM.from_config(config, attn_implementation=PACKED_ATTENTION).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(8)
        for layer in model.model.layers:  # attention that matters, as trained models have it
            layer.self_attn.q_proj.weight.mul_(3)
    return model.to(dtype)  # type: ignore[no-any-return]


def check(config: PretrainedConfig, dtype: torch.dtype = torch.bfloat16) -> str:
    """With bfloat16 weights for scoring; with float32 weights for training, under autocast."""
    trains = dtype is torch.float32
    return self_check(Likelihood(make(config, dtype)), autocast=trains, gradients=trains)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("config", [WINDOWED, EXPERTS], ids=["windowed", "experts"])
def test_attention_as_documented_passes(
    emulated: Callable[[str | None], None], config: PretrainedConfig, dtype: torch.dtype
) -> None:
    emulated(None)
    assert check(config, dtype) == "packed"


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_planted_fault_is_caught(
    emulated: Callable[[str | None], None], caplog: pytest.LogCaptureFixture, fault: str, dtype: torch.dtype
) -> None:
    if fault == "no gradient of keys" and dtype is torch.bfloat16:
        pytest.skip("scoring takes no gradient")
    emulated(fault)
    with caplog.at_level(logging.WARNING, logger="davir_ray"):
        assert check(WINDOWED, dtype) == "padded, sdpa"
    assert "cannot be packed exactly" in caplog.text


def test_a_long_window_is_checked_with_short_sequences_and_left_as_it_was(
    emulated: Callable[[str | None], None],
) -> None:
    emulated(None)
    model = make(WINDOWED, torch.bfloat16)
    windowed = [module for module in model.modules() if hasattr(module, "sliding_window")]
    before = [module.sliding_window for module in windowed]
    assert WINDOW in before
    self_check(Likelihood(model))
    assert max(len(ids) for ids, _ in check_examples(model)) < 100
    assert model.config.sliding_window == WINDOW
    assert [module.sliding_window for module in windowed] == before


@torch.library.custom_op("davir_ray_tests::varlen", mutates_args=())
def varlen_operation(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, edges: torch.Tensor, longest: int, scale: float,
    left: int,
) -> torch.Tensor:  # fmt: skip
    """One operation for the compiler, as flash attention is."""
    attend = varlen_as_documented(None)
    return attend(
        query, key, value, edges, edges, longest, longest, scale=scale, window_size=(left, 0), enable_gqa=True
    ).contiguous()


@varlen_operation.register_fake
def _(query: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(query)


def test_compiled_layers_hold_one_attention_each_and_no_pack_compiles_them_again(
    emulated: Callable[[str | None], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the trial of what flash attention takes; and windows of the work are compiled at start-up, too."""
    emulated(None)
    graphs: list[int] = []

    def varlen_attn(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seq_q: torch.Tensor, cu_seq_k: torch.Tensor,
        max_q: int, max_k: int, *, scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
        enable_gqa: bool = False, num_splits: int | None = None,
    ) -> torch.Tensor:  # fmt: skip
        scale = scale if scale is not None else query.shape[2] ** -0.5
        return varlen_operation(query, key, value, cu_seq_q, max_q, scale, window_size[0])  # type: ignore[no-any-return]

    def counted(graph: torch.fx.GraphModule, _inputs: list[Any]) -> Any:
        graphs.append(sum("varlen" in str(node.target) for node in graph.graph.nodes))
        return graph.forward

    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", varlen_attn)
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda layer, **how: compile_module(layer, **how, backend=counted))
    torch._dynamo.reset()
    likelihood = Likelihood(make(WINDOWED, torch.bfloat16))
    eager = copy.deepcopy(likelihood)
    likelihood.compile_layers()
    assert self_check(likelihood) == "packed"
    # A layer that sees everything, and one with the window of the check and its own.
    assert graphs == [1, 1, 1]
    draw = np.random.default_rng(0)
    with torch.inference_mode():
        for _ in range(20):
            lengths = draw.integers(2, 60, draw.integers(1, 9)).tolist()
            pack = Pack.of([(draw.integers(0, 100, length, dtype=np.int32), (1, length)) for length in lengths])
            assert torch.equal(likelihood(pack), eager(pack))
    assert graphs == [1, 1, 1]
    torch._dynamo.reset()


def test_the_arguments_are_those_of_torch() -> None:
    documented = inspect.signature(torch.nn.attention.varlen.varlen_attn).parameters
    assert set(inspect.signature(varlen_as_documented(None)).parameters) <= set(documented)


def with_large_keys(dtype: torch.dtype) -> PreTrainedModel:
    """Keys with a large part in common, as Qwen2's: scores of about 160, which bfloat16 rounds to whole numbers."""
    model = make(WINDOWED, torch.float32)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.bias.fill_(4)
            layer.self_attn.q_proj.bias.fill_(10)
    return model.to(torch.bfloat16).to(dtype)  # type: ignore[no-any-return]


def test_the_oracle_in_bfloat16_is_nearer_to_float32_than_transformers_own_eager_attention(
    emulated: Callable[[str | None], None],
) -> None:
    model, exact = with_large_keys(torch.bfloat16), with_large_keys(torch.float32)
    ids, spans = check_examples(model)[-1]
    with torch.no_grad():
        expected = eager_nll(exact, ids, spans)
        found = eager_nll(model, ids, spans)
        model.set_attn_implementation("eager")
        logits_TV = model(input_ids=torch.tensor(ids[None].astype(int)), use_cache=False).logits[0].float()
    plain = torch.nn.functional.cross_entropy(logits_TV[:-1], torch.tensor(ids[1:].astype(int)), reduction="none")
    assert (found - expected).abs().mean() < 0.5 * (plain - expected).abs().mean()
    emulated(None)
    assert self_check(Likelihood(with_large_keys(torch.bfloat16))) == "packed"
