"""The same model, pairs and recipe through TRL's DPOTrainer: the same losses and gradients, step by step."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from pairs import RECORDS, frozen_table, pair_table
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from davir_ray.config.align import AlignConfig
from davir_ray.config.training import FinetuneConfig
from davir_ray.models.checkpoint import Checkpoint
from davir_ray.models.kernel.likelihood import Likelihood
from davir_ray.models.training.loop import Trainer
from davir_ray.models.training.pairs import PAIR_COLUMNS, PairSet

STEPS = 3
RATE = 1e-3

Gradients = dict[str, torch.Tensor]


def gradients_of(train: Callable[[], None], model: torch.nn.Module) -> list[Gradients]:
    """Of every optimiser step."""
    found: list[Gradients] = []

    def keep(_optimizer: Any, _args: Any, _kwargs: Any) -> None:
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    handle = register_optimizer_step_pre_hook(keep)
    try:
        train()
    finally:
        handle.remove()
    return found


def ours(
    base: Path, tokenizer: PreTrainedTokenizerFast, loss: Any, beta: float, accumulate: bool
) -> tuple[list[float], list[Gradients]]:
    examples = pair_table(tokenizer)
    frozen = frozen_table(base, examples)
    objective = PairSet.of([(examples.select(PAIR_COLUMNS), frozen)], AlignConfig(loss=loss, beta=beta))
    config = FinetuneConfig(
        epochs=STEPS,
        batch_size=len(RECORDS),
        learning_rate=RATE,
        warmup_ratio=0.0,
        max_grad_norm=1e9,
        tokens_per_pack=64 if accumulate else None,
    )
    likelihood = Likelihood(Checkpoint.find(str(base)).model(torch.float32, torch.device("cpu")))
    losses: list[float] = []
    trainer = Trainer(likelihood, objective, config)
    found = gradients_of(lambda: losses.extend(report.loss for report in trainer.steps()), likelihood.model)
    return losses, found


def theirs(
    base: Path, tokenizer: PreTrainedTokenizerFast, loss: str, beta: float, folder: Path
) -> tuple[list[float], list[Gradients]]:
    # TRL tokenises the text as it stands; ours puts the BOS that this tokenizer has in front.
    rows = [{**record, "prompt": tokenizer.bos_token + record["prompt"]} for record in RECORDS]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    losses: list[float] = []

    class Recording(DPOTrainer):  # type: ignore[misc]
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            found = super().compute_loss(*args, **kwargs)
            losses.append(float((found[0] if isinstance(found, tuple) else found).detach()))
            return found

    config = DPOConfig(
        output_dir=str(folder),
        loss_type=loss,
        beta=beta,
        num_train_epochs=STEPS,
        per_device_train_batch_size=len(RECORDS),
        learning_rate=RATE,
        lr_scheduler_type="cosine",
        warmup_steps=0,
        max_grad_norm=1e9,
        weight_decay=0.0,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        max_length=256,
    )
    trainer = Recording(
        model=model, args=config, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer
    )
    found = gradients_of(trainer.train, trainer.model)
    return losses, found


@pytest.mark.parametrize(
    ("loss", "name", "beta"), [("dpo", "sigmoid", 0.1), ("ipo", "ipo", 0.1), ("dpo", "sigmoid", 2.0)]
)
def test_losses_and_gradients_are_trls(
    base_folder: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, loss: str, name: str, beta: float
) -> None:
    tolerance = 1e-5 if beta < 1 else 1e-4  # a loss of 1e-16 is exp(-36), and has 36 times the rounding of its exponent
    expected, expected_gradients = theirs(base_folder, tokenizer, name, beta, tmp_path)
    for accumulate in (False, True):
        losses, gradients = ours(base_folder, tokenizer, loss, beta, accumulate)
        assert len(losses) == len(expected) == STEPS
        assert losses[0] != losses[-1]
        np.testing.assert_allclose(losses, expected, rtol=tolerance)
        for found, wanted in zip(gradients, expected_gradients, strict=True):
            assert found.keys() == wanted.keys()
            scale = max(float(gradient.abs().max()) for gradient in wanted.values())
            for parameter, gradient in wanted.items():
                difference = float((found[parameter] - gradient).abs().max())
                assert difference <= tolerance * scale, f"{parameter}: {difference / scale:.1e} of the largest gradient"
