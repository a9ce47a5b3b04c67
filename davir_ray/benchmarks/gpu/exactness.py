"""Whether the kernel on this device is exact: against float64, written out, one sequence at a time."""

import copy
import importlib.util
import itertools
import math
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from transformers import PreTrainedModel

from davir_ray.benchmarks.gpu.shapes import FAMILIES, SHAPES, Sequences, draw, draw_like_alpaca, make
from davir_ray.benchmarks.gpu.trial import Trial
from davir_ray.config.training import FinetuneConfig
from davir_ray.models.adapter import add_adapter
from davir_ray.models.checkpoint import Checkpoint
from davir_ray.models.hub import hub_offline
from davir_ray.models.kernel.attention import packed_attention
from davir_ray.models.kernel.eager import eager_nll
from davir_ray.models.kernel.likelihood import Likelihood, Pack
from davir_ray.models.kernel.self_check import self_check
from davir_ray.models.memory import TokenBudget
from davir_ray.models.scorer import Scorer, ScorerSettings
from davir_ray.models.training.examples import TrainingSet
from davir_ray.models.training.loop import Trainer

Floats = npt.NDArray[np.float64]


def attention(trial: Trial) -> None:
    """Packed attention, forward and backward: sizes and groups of heads, windows, awkward lengths."""
    lengths = (1, 2, 3, 64, 127, 128, 129, 255, 7, 500) if trial.is_cuda else (1, 2, 3, 40, 7)
    dims = (64, 96, 128, 256) if trial.is_cuda else (64,)
    windows = (None, 1, 7, 64, 128) if trial.is_cuda else (None, 7)
    worst, worst_gradient, bad = 0.0, 0.0, []
    cases = list(itertools.product(dims, ((8, 8), (8, 2), (6, 1)), windows, (None, 0.2)))
    for dim, (heads, key_heads), window, scaling in cases:
        error, gradient = _attention_errors(trial, lengths, dim, heads, key_heads, window, scaling)
        worst, worst_gradient = max(worst, error), max(worst_gradient, gradient)
        if not (error < 2e-2 and gradient < 3e-2):
            bad.append((dim, heads, key_heads, window, scaling, error, gradient))
    trial.record(
        "attention", not bad,
        f"{len(cases)} cases; largest relative error of a sequence {worst:.1e}, of a gradient {worst_gradient:.1e}"
        + (f"; bad: {bad[:3]}" if bad else ""),
        bad=bad,
    )  # fmt: skip


def _attention_errors(
    trial: Trial,
    lengths: tuple[int, ...],
    dim: int,
    heads: int,
    key_heads: int,
    window: int | None,
    scaling: float | None,
) -> tuple[float, float]:
    """Relative errors of the worst sequence, and of the gradients of queries, keys and values together."""
    torch.manual_seed(dim + heads + key_heads)
    num_tokens = sum(lengths)
    query, key, value = (
        torch.randn(1, count, num_tokens, dim, device=trial.device).bfloat16().requires_grad_()
        for count in (heads, key_heads, key_heads)
    )
    edges = torch.tensor((0, *lengths)).cumsum(0, dtype=torch.int32)
    found, _ = packed_attention(
        torch.nn.Module(), query, key, value, None, sequence_edges=edges.to(trial.device),
        sequence_edges_on_cpu=edges, longest_sequence=max(lengths), scaling=scaling, sliding_window=window,
    )  # fmt: skip
    exact = [tensor.detach().double().requires_grad_() for tensor in (query, key, value)]
    parts = []
    for start, end in itertools.pairwise(edges.tolist()):
        q = exact[0][0, :, start:end]
        k, v = (tensor[0, :, start:end].repeat_interleave(heads // key_heads, 0) for tensor in exact[1:])
        at = torch.arange(end - start, device=trial.device)
        distance = at[:, None] - at[None, :]
        seen = (distance >= 0) & (distance < (window or end - start))
        weights = q @ k.transpose(1, 2) * (scaling if scaling is not None else dim**-0.5)
        parts.append((torch.softmax(weights.masked_fill(~seen, -torch.inf), -1) @ v).transpose(0, 1))
    expected = torch.cat(parts)[None]
    outer = torch.randn_like(found)
    gradients = torch.autograd.grad(found, (query, key, value), outer)
    exact_gradients = torch.autograd.grad(expected, exact, outer.double())
    errors = [
        float((found[0, start:end].double() - expected[0, start:end]).norm() / expected[0, start:end].norm())
        for start, end in itertools.pairwise(edges.tolist())
    ]
    # Relative to all three together: of a single token the query's gradient is 0.
    pairs = list(zip(gradients, exact_gradients, strict=True))
    difference = math.sqrt(sum(float((gradient.double() - exact).norm()) ** 2 for gradient, exact in pairs))
    return max(errors), difference / math.sqrt(sum(float(exact.norm()) ** 2 for _, exact in pairs))


def families(trial: Trial) -> None:
    """The start-up check, the error against float64, and whether neighbours move bits, for each family."""
    lengths = [2, 3, 8, 8, 21, 64, 65, 127, 128, 129, 200, 333] if trial.is_cuda else [2, 3, 8, 8, 70]
    for name, shape in FAMILIES.items():
        model = make(shape, trial.half, trial.device, tiny=trial.smoke)
        likelihood = Likelihood(model)
        attention_found = self_check(likelihood)
        size = int(model.config.get_text_config().vocab_size)
        examples = draw(lengths, size)
        exact, packed = _exact(model, examples), _packed(likelihood, examples)
        eager = [_eager(model, example) for example in examples]
        errors = {
            how: max(float(np.abs(a - b).mean()) for a, b in zip(found, exact, strict=True))
            for how, found in {"packed": packed, "eager": eager}.items()
        }
        again = zip(_among_others(likelihood, examples, size), packed, strict=True)
        moved = sum(not np.array_equal(other, own) for other, own in again)
        is_exact = errors["packed"] < 3 * errors["eager"] + 2e-3
        trial.record(
            f"family {name}", attention_found == "packed" and not moved and is_exact,
            f"{attention_found}; error of the worst sequence in nats a token: packed {errors['packed']:.4f}, eager "
            f"{errors['eager']:.4f}; sequences that neighbours move: {moved} of {len(lengths)}",
            errors=errors, moved=moved,
        )  # fmt: skip
        del model, likelihood
        trial.clean()


def _exact(model: PreTrainedModel, examples: Sequences) -> list[Floats]:
    """Token losses in float64, one example at a time, with eager attention: nothing of the kernel."""
    plain = copy.deepcopy(model).double()
    plain.set_attn_implementation("eager")
    found = []
    with torch.inference_mode():
        for ids, (first, last) in examples:
            ids_1T = torch.from_numpy(ids.astype(np.int64))[None].to(model.device)
            logits_TV = plain(input_ids=ids_1T, use_cache=False).logits[0].double()
            at = torch.arange(first, last, device=model.device)
            nll_R = torch.logsumexp(logits_TV[at - 1], -1) - logits_TV[at - 1, ids_1T[0, at]]
            found.append(nll_R.cpu().numpy())
    return found


def _packed(likelihood: Likelihood, examples: Sequences) -> list[Floats]:
    pack = Pack.of(examples)
    with torch.inference_mode():
        nll_R = likelihood(pack).double().cpu().numpy()
    return np.split(nll_R, np.cumsum(pack.num_scored)[:-1])


def _eager(model: PreTrainedModel, example: tuple[npt.NDArray[np.int32], tuple[int, ...]]) -> Floats:
    with torch.inference_mode():
        return eager_nll(model, *example).double().cpu().numpy()


def _among_others(likelihood: Likelihood, examples: Sequences, size: int) -> Iterator[Floats]:
    """The losses of each example in a pack in which all others were drawn again."""
    lengths = [len(ids) for ids, _ in examples]
    for at, example in enumerate(examples):
        others = draw(lengths, size, seed=1 + at)
        others[at] = example
        yield _packed(likelihood, others)[at]


def scorer(trial: Trial) -> None:
    """The Scorer from checkpoints on disk: against float64, twice, and in another order."""
    shape = FAMILIES["llama, heads of 64"]
    base, tuned = (make(shape, torch.float32, trial.device, tiny=trial.smoke, seed=seed) for seed in (0, 1))
    with torch.no_grad():
        for ours, of_base in zip(tuned.parameters(), base.parameters(), strict=True):
            ours.copy_(of_base + 0.05 * (ours - of_base))
    size = int(base.config.vocab_size)
    examples = draw_like_alpaca(300 if trial.is_cuda else 40, size, seed=3)
    table = as_table(examples)
    exact = [np.array([nll.sum() for nll in _exact(model, examples[:40])]) for model in (base, tuned)]
    with tempfile.TemporaryDirectory() as folder, hub_offline():
        base.save_pretrained(f"{folder}/base")
        tuned.save_pretrained(f"{folder}/tuned")
        found = {name: Checkpoint.find(f"{folder}/{name}") for name in ("base", "tuned")}
        kind = "cuda" if trial.is_cuda else "cpu"
        for precision, limit in (("float32", 1e-5), ("bfloat16", 3e-2)):
            settings = ScorerSettings(device=kind, precision=precision, keep_token_nll="all")  # type: ignore[arg-type]
            made = Scorer(found["base"], found["tuned"], settings)
            first, again = made(table), made(table)
            order = np.random.default_rng(0).permutation(len(examples))
            shuffled = np.asarray(made(table.take(order))["davir"])
            columns = (np.asarray(first[name])[:40] for name in ("base_nll", "reference_nll"))
            error = max(float(np.max(np.abs(a - b) / b)) for a, b in zip(columns, exact, strict=True))
            same, any_order = first.equals(again), np.array_equal(np.asarray(first["davir"])[order], shuffled)
            trial.record(
                f"scorer {precision}", error < limit and same and any_order,
                f"relative error of a loss {error:.1e}; the same bits again: {same}, in any order: {any_order}",
                error=error,
            )  # fmt: skip
            del made
            trial.clean()


def adapter(trial: Trial) -> None:
    """Whether the base keeps its bits under an adapter that is attached to it."""
    if importlib.util.find_spec("peft") is None:
        trial.record("adapter", None, "peft is not installed")
        return
    model = make(FAMILIES["llama, heads of 64"], torch.float32, trial.device, tiny=trial.smoke)
    table = as_table(draw_like_alpaca(100 if trial.is_cuda else 20, int(model.config.vocab_size), seed=3))
    with tempfile.TemporaryDirectory() as folder, hub_offline():
        model.save_pretrained(f"{folder}/base")
        add_adapter(model, FinetuneConfig(), 8)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.02)
        model.save_pretrained(f"{folder}/adapter")
        base, light = (Checkpoint.find(f"{folder}/{name}") for name in ("base", "adapter"))
        settings = ScorerSettings(device="cuda" if trial.is_cuda else "cpu", precision="bfloat16")
        plain, adapted = (Scorer(base, other, settings)(table) for other in (base, light))
    whole, under, reference = (
        np.asarray(scores[name])
        for scores, name in ((plain, "base_nll"), (adapted, "base_nll"), (adapted, "reference_nll"))
    )
    same, differs = np.array_equal(whole, under), not np.array_equal(under, reference)
    words = f"the base keeps its bits: {same}; the adapter has other losses: {differs}"
    trial.record("adapter", same and differs, words)


def as_table(examples: Sequences) -> pa.Table:
    """The examples with the columns that scoring and training read."""
    numbers = range(len(examples))
    scored = [last - first for _, (first, last) in examples]
    return pa.table({
        "example_id": pa.array(numbers, pa.int64()), "content_hash": pa.array(numbers, pa.int64()),
        "source": pa.array(["random"] * len(examples)), "truncated": pa.array([False] * len(examples)),
        "num_prompt_tokens": pa.array([first for _, (first, _) in examples], pa.int32()),
        "num_response_tokens": pa.array(scored, pa.int32()),
        "input_ids": pa.array([ids for ids, _ in examples], pa.list_(pa.int32())),
        "response_spans": pa.array([list(spans) for _, spans in examples], pa.list_(pa.int32())),
    })  # fmt: skip


def gradients(trial: Trial) -> None:
    """The gradient of a fine-tune's pack, against float64 and one example at a time."""
    for name in ("llama, heads of 64", "mistral, window 64", "gemma3, heads of 256, window 64", "gemma2, soft cap"):
        model = make(FAMILIES[name], torch.float32, trial.device, tiny=trial.smoke)
        examples = draw((5, 9, 9, 33, 70, 129, 200), int(model.config.get_text_config().vocab_size))
        expected = _exact_gradient(model, examples)
        for precision, limit in (("float32", 1e-4), ("bfloat16", 0.1)):
            trained = copy.deepcopy(model)
            config = FinetuneConfig(batch_size=len(examples), precision=precision)  # type: ignore[arg-type]
            trainer = Trainer(Likelihood(trained), TrainingSet.of([as_table(examples)]), config)
            trainer.backward(np.arange(len(examples)))
            found = {name: parameter.grad for name, parameter in trained.named_parameters()}
            difference = sum(float((found[key].double() - value).norm()) ** 2 for key, value in expected.items())
            error = math.sqrt(difference / sum(float(value.norm()) ** 2 for value in expected.values()))
            trial.record(f"gradient {name} {precision}", error < limit, f"relative error {error:.1e}", error=error)
            del trained, trainer, found
        del model
        trial.clean()


def _exact_gradient(model: PreTrainedModel, examples: Sequences) -> dict[str, torch.Tensor]:
    plain = copy.deepcopy(model).double()
    plain.set_attn_implementation("eager")
    num_scored = sum(last - first for _, (first, last) in examples)
    for ids, (first, last) in examples:
        ids_1T = torch.from_numpy(ids.astype(np.int64))[None].to(model.device)
        logits_TV = plain(input_ids=ids_1T, use_cache=False).logits[0]
        at = torch.arange(first, last, device=model.device)
        loss = torch.nn.functional.cross_entropy(logits_TV[at - 1], ids_1T[0, at], reduction="sum") / num_scored
        loss.backward()  # type: ignore[no-untyped-call]
    return {name: parameter.grad for name, parameter in plain.named_parameters() if parameter.grad is not None}


def syncs(trial: Trial) -> None:
    """How often a packed forward makes the host wait for the GPU."""
    if not trial.is_cuda:
        trial.record("syncs", None, "needs a GPU")
        return
    likelihood = Likelihood(make(FAMILIES["llama, heads of 64"], trial.half, trial.device, tiny=False))
    pack = Pack.of(draw((30, 40, 50), 4000)).to(trial.device)
    with torch.inference_mode():
        likelihood(pack)
        trial.wait()
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                likelihood(pack)
            finally:
                torch.cuda.set_sync_debug_mode("default")
    found = [f"{Path(one.filename).name}:{one.lineno}" for one in warned if "synchroniz" in str(one.message)]
    trial.record("syncs", not found, f"{len(found)} in a packed forward {found}", predicted="0", lines=found)
    trial.clean()


def memory(trial: Trial) -> None:
    """The back-off of the token budget, with the allocator held to little more than the weights."""
    if not trial.is_cuda:
        trial.record("memory", None, "needs a GPU")
        return
    model = make(SHAPES["Llama-3.2-1B"], trial.half, trial.device, tiny=False)
    likelihood = Likelihood(model)
    examples = draw_like_alpaca(600, 128000)
    expected, _ = budgeted(likelihood, examples, 16384)
    trial.clean()
    used, total = torch.cuda.memory_allocated(), torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((used + 0.8e9) / total)
    try:
        found, smallest = budgeted(likelihood, examples, 65536)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    missing = sum(nll is None for nll in found)
    both = [(a, b) for a, b in zip(found, expected, strict=True) if a is not None and b is not None]
    moved = max(float(np.abs(a - b).max()) for a, b in both)
    trial.clean()
    left = torch.cuda.memory_allocated() - used
    trial.record(
        "memory", not missing and smallest < 65536 and moved < 0.3 and left < 2**20,
        f"65,536 tokens came down to {smallest:,}; rows without losses: {missing}; largest difference {moved:.3f} "
        f"nats; {left} bytes left behind", smallest=smallest, missing=missing, left=left,
    )  # fmt: skip
    del model, likelihood
    trial.clean()


def budgeted(likelihood: Likelihood, examples: Sequences, num_tokens: int) -> tuple[list[Any], int]:
    """The losses of every example by packs of at most so many tokens, and the budget at the end."""
    budget = TokenBudget(num_tokens)
    lengths, rows = np.array([len(ids) for ids, _ in examples]), np.arange(len(examples))
    nlls: list[Any] = [None] * len(examples)

    def forward(packed: npt.NDArray[np.int64]) -> tuple[torch.Tensor, tuple[int, ...]]:
        pack = Pack.of([examples[row] for row in packed]).to(likelihood.model.device)
        return likelihood(pack), pack.num_scored

    with torch.inference_mode():
        passes = list(budget.run(forward, rows, lengths, rows))
    for packed, (nll_R, num_scored) in passes:
        for row, nll in zip(packed, np.split(nll_R.cpu().numpy(), np.cumsum(num_scored)[:-1]), strict=True):
            nlls[row] = nll
    return nlls, budget.num_tokens
