"""Token losses against log_softmax in float64."""

import math

import pytest
import torch

from davir_ray.formulas.losses import token_nll

SHARP = 20.0
"""Logits as far apart as a trained model's: uniform ones would hide a wrong target."""


def draw(dtype: torch.dtype, rows: int = 64, vocabulary: int = 1000) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits_TV = torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64) * SHARP
    return logits_TV.to(dtype), torch.randint(vocabulary, (rows,), generator=generator)


def by_log_softmax(logits_TV: torch.Tensor, targets_T: torch.Tensor) -> torch.Tensor:
    return -torch.log_softmax(logits_TV.double(), dim=1)[torch.arange(len(targets_T)), targets_T]


@pytest.mark.parametrize(
    ("dtype", "room"), [(torch.float64, 1e-12), (torch.float32, 2e-5), (torch.bfloat16, 2e-5), (torch.float16, 2e-5)]
)
def test_losses_are_those_of_float64_log_softmax_of_the_same_logits(dtype: torch.dtype, room: float) -> None:
    logits_TV, targets_T = draw(dtype)
    nll_T = token_nll(logits_TV, targets_T)
    torch.testing.assert_close(nll_T.double(), by_log_softmax(logits_TV, targets_T), rtol=0, atol=room)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_logits_give_float32_losses(dtype: torch.dtype) -> None:
    assert token_nll(*draw(dtype)).dtype == torch.float32


def test_float64_stays_float64() -> None:
    assert token_nll(*draw(torch.float64)).dtype == torch.float64


def test_equal_logits_cost_the_logarithm_of_the_vocabulary() -> None:
    nll_T = token_nll(torch.full((3, 50), -7.0), torch.tensor([0, 20, 49]))
    torch.testing.assert_close(nll_T, torch.full((3,), math.log(50)))


def test_huge_logits_neither_overflow_nor_lose_the_target() -> None:
    logits_TV = torch.tensor([[1e30, 0.0], [0.0, 1e30]])
    assert token_nll(logits_TV, torch.tensor([0, 1])).tolist() == [0.0, 0.0]
    assert token_nll(logits_TV, torch.tensor([1, 1]))[0] == pytest.approx(1e30)


def test_the_gradient_is_softmax_minus_one_hot() -> None:
    logits_TV, targets_T = draw(torch.float64, rows=8, vocabulary=30)
    logits_TV.requires_grad_()
    token_nll(logits_TV, targets_T).sum().backward()
    one_hot_TV = torch.nn.functional.one_hot(targets_T, 30)
    torch.testing.assert_close(logits_TV.grad, torch.softmax(logits_TV.detach(), dim=1) - one_hot_TV)


def test_no_rows_give_no_losses() -> None:
    assert token_nll(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64)).shape == (0,)
