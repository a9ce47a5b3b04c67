"""The likelihood kernel: which rows the head sees, gradients, and models that must be refused."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from davir_ray.errors import ModelError
from davir_ray.models.kernel.attention import PACKED_ATTENTION
from davir_ray.models.kernel.likelihood import Likelihood, Pack
from davir_ray.models.kernel.packing import scored_positions
from davir_ray.models.kernel.self_check import self_check

VOCABULARY = 100
CHUNK_ROWS = 256
"""The head's most rows at once, on a CPU."""

Example = tuple[npt.NDArray[np.int32], tuple[int, ...]]


def make_llama(cls: type[LlamaForCausalLM] = LlamaForCausalLM, **settings: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
        attn_implementation=PACKED_ATTENTION,
        **settings,
    )
    model = cls(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
    return model


def draw_examples(shapes: list[tuple[int, tuple[int, ...]]]) -> list[Example]:
    draw = np.random.default_rng(1)
    return [(draw.integers(0, VOCABULARY, length, dtype=np.int32), spans) for length, spans in shapes]


SHORT = draw_examples([(4, (1, 4)), (9, (4, 9)), (9, (2, 9)), (30, (5, 9, 11, 30)), (2, (1, 2))])
LONG = draw_examples([(length, (length // 3, length)) for length in (400, 300, 200, 3)])


def plain_nlls(model: PreTrainedModel, examples: list[Example]) -> torch.Tensor:
    """One example at a time, all logits, without our attention; differentiable."""
    model.set_attn_implementation("eager")
    nlls = []
    for ids, spans in examples:
        ids_T = torch.tensor(ids.astype(np.int64))
        logprobs_TV = torch.log_softmax(model(input_ids=ids_T[None], use_cache=False).logits[0].float(), dim=-1)
        scored = [at for start, end in zip(spans[::2], spans[1::2], strict=True) for at in range(start, end)]
        nlls += [-logprobs_TV[at - 1, ids_T[at]] for at in scored]
    return torch.stack(nlls)


def rows_seen_by_the_head(likelihood: Likelihood, examples: list[Example]) -> list[int]:
    seen: list[int] = []
    head = likelihood.model.get_output_embeddings()
    hook = head.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0].shape[0]))
    likelihood(Pack.of(examples))
    hook.remove()
    return seen


@pytest.mark.parametrize("examples", [SHORT, LONG])
def test_the_head_sees_the_scored_rows_only_and_a_chunk_at_most(examples: list[Example]) -> None:
    with torch.inference_mode():
        seen = rows_seen_by_the_head(Likelihood(make_llama()), examples)
    assert sum(seen) == sum(len(scored_positions(spans)) for _, spans in examples)
    assert max(seen) <= CHUNK_ROWS
    assert len(seen) == -(-sum(seen) // CHUNK_ROWS)


def test_a_pack_of_several_chunks_has_the_losses_of_the_models_own_forward() -> None:
    model = make_llama()
    with torch.inference_mode():
        nll_R = Likelihood(model)(Pack.of(LONG))
        torch.testing.assert_close(nll_R, plain_nlls(model, LONG), rtol=1e-5, atol=1e-5)


def test_permuted_targets_change_every_score() -> None:
    likelihood = Likelihood(make_llama())
    pack = Pack.of(SHORT)
    shifted = Pack(**{**vars(pack), "targets_R": pack.targets_R.roll(1)})
    with torch.inference_mode():
        right_R, wrong_R = likelihood(pack), likelihood(shifted)
    moved = pack.targets_R != shifted.targets_R
    assert ((right_R - wrong_R).abs()[moved] > 1e-3).all()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("examples", [SHORT, LONG])
def test_gradients_are_those_of_the_loss_over_all_logits(examples: list[Example], recompute: bool) -> None:
    ours, plain = make_llama().train(), make_llama().train()
    if recompute:
        ours.gradient_checkpointing_enable({"use_reentrant": False})
    Likelihood(ours)(Pack.of(examples)).mean().backward()
    plain_nlls(plain, examples).mean().backward()
    for (name, mine), other in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert mine.grad is not None
        assert other.grad is not None
        room = 1e-5 * float(other.grad.abs().max())
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-5, atol=room, msg=lambda text, n=name: f"{n}: {text}")


def test_losses_with_and_without_gradients_are_bit_equal() -> None:
    likelihood = Likelihood(make_llama())
    with torch.inference_mode():
        scored_R = likelihood(Pack.of(LONG))
    assert torch.equal(likelihood(Pack.of(LONG)).detach(), scored_R)


def test_losses_of_a_bfloat16_model_are_float32_and_near_those_of_float32() -> None:
    model = make_llama()
    with torch.inference_mode():
        exact_R = Likelihood(model)(Pack.of(SHORT))
        nll_R = Likelihood(model.to(torch.bfloat16))(Pack.of(SHORT))
    assert nll_R.dtype == torch.float32
    assert float((nll_R - exact_R).abs().mean() / exact_R.mean()) < 0.02


def test_a_pack_lists_its_examples_end_to_end() -> None:
    pack = Pack.of(SHORT)
    assert pack.sequence_lengths == (4, 9, 9, 30, 2)
    assert pack.num_scored == (3, 5, 7, 23, 1)
    assert pack.position_ids_T.tolist() == list(itertools.chain(*map(range, pack.sequence_lengths)))
    assert pack.input_ids_T.tolist() == [int(token) for ids, _ in SHORT for token in ids]
    assert torch.equal(pack.input_ids_T[pack.predictors_R + 1], pack.targets_R)


@pytest.mark.parametrize("spans", [(0, 3), (), (2, 2), (3, 6)])
def test_spans_that_nothing_predicts_or_that_do_not_fit_are_refused(spans: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="spans"):
        Pack.of([(np.arange(5, dtype=np.int32), spans)])


class ShiftsLogits(LlamaForCausalLM):
    """Does to its logits what the kernel cannot know."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + torch.linspace(0, 5, VOCABULARY)
        return output


class NormalisesHidden(LlamaForCausalLM):
    """Does to the head's input what the kernel cannot know."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = self.lm_head(self.model(*args, **kwargs).last_hidden_state * 0.5)
        return output


@pytest.mark.parametrize("cls", [ShiftsLogits, NormalisesHidden])
def test_a_head_that_does_something_unknown_is_refused(cls: type[LlamaForCausalLM]) -> None:
    with pytest.raises(ModelError, match=f"{cls.__name__} cannot be scored exactly"):
        self_check(Likelihood(make_llama(cls)))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda logits: logits.roll(1, dims=-1), "cannot be scored exactly"),
        (lambda logits: logits + torch.linspace(0, 0.05, VOCABULARY), "cannot be scored exactly"),
        (lambda logits: logits + logits.mean(dim=1, keepdim=True), "is not a causal model"),
        (lambda logits: logits + 0.05 * logits[:, -1:], "is not a causal model"),
    ],
    ids=["other tokens", "hundredths of a nat", "a mean over later tokens", "a little of the last token"],
)
def test_a_forward_hook_that_changes_the_logits_is_refused(
    change: Callable[[torch.Tensor], torch.Tensor], told: str
) -> None:
    model = make_llama()

    def changed(_module: torch.nn.Module, _inputs: Any, output: Any) -> Any:
        output.logits = change(output.logits)
        return output

    model.register_forward_hook(changed)
    with pytest.raises(ModelError, match=told):
        self_check(Likelihood(model))


def test_a_model_of_nan_is_refused() -> None:
    model = make_llama()
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(ModelError, match="not finite"):
        self_check(Likelihood(model))


def test_the_self_check_leaves_the_model_as_it_found_it() -> None:
    likelihood = Likelihood(make_llama())
    with torch.inference_mode():
        before_R = likelihood(Pack.of(SHORT))
        assert self_check(likelihood) == "packed"
        assert torch.equal(likelihood(Pack.of(SHORT)), before_R)
    assert likelihood.model.config._attn_implementation == PACKED_ATTENTION


def test_a_padded_batch_has_the_losses_of_the_pack() -> None:
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=64)
    config._attn_implementation = PACKED_ATTENTION
    torch.manual_seed(0)
    likelihood = Likelihood(GPT2LMHeadModel(config).eval())
    with torch.inference_mode():
        packed_R = likelihood(Pack.of(SHORT))
        likelihood.packed = False
        torch.testing.assert_close(likelihood(Pack.of(SHORT)), packed_R, rtol=1e-5, atol=1e-6)
