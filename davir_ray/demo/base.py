"""The demo's base model: a real Llama and a real BPE tokenizer, small enough to be trained within the demo."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from davir_ray.config.training import FinetuneConfig
from davir_ray.models.kernel.attention import PACKED_ATTENTION, register_packed_attention
from davir_ray.models.kernel.likelihood import Likelihood
from davir_ray.models.training.examples import TrainingSet
from davir_ray.models.training.loop import StepReport, Trainer
from davir_ray.models.training.model import save_reference

BOS, EOS, PAD = "<s>", "</s>", "<pad>"


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """The size of a small Llama."""

    vocabulary: int = 1024
    """Largest size; the demo's corpus has so few words that the merges end at about 530 tokens."""
    hidden_size: int = 128
    num_layers: int = 2


SIZE = ModelSize()

# 375 steps over 258,000 tokens: about 19 s of one thread.
PRETRAINING = FinetuneConfig(
    epochs=1, batch_size=16, learning_rate=3e-3, warmup_ratio=0.03, gradient_checkpointing=False, precision="float32"
)
# 225 steps over 162,000 tokens: 9 s of one thread. The default rate, 2e-5, is for models of billions of parameters.
FINETUNING = FinetuneConfig(
    epochs=3, batch_size=16, learning_rate=1e-3, warmup_ratio=0.03, gradient_checkpointing=False, precision="float32"
)


def train_tokenizer(
    texts: Iterable[str], vocab_size: int = SIZE.vocabulary, pad: str | None = PAD
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on texts, with a padding token unless `pad` is None."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS] if pad is None else [BOS, EOS, pad],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=pad)


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int, size: ModelSize = SIZE) -> LlamaForCausalLM:
    """Return a Llama with random weights; of the default size, 0.6M parameters."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden_size,
        intermediate_size=512,
        num_hidden_layers=size.num_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        # About 1/sqrt(hidden size). With Llama's 0.02, which suits wide models, only the first two people were learned.
        initializer_range=0.08,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def pretrain(
    folder: Path,
    texts: Sequence[str],
    seed: int,
    report: Callable[[StepReport], None],
    *,
    recipe: FinetuneConfig = PRETRAINING,
    size: ModelSize = SIZE,
) -> None:
    """Train a tokenizer and a base on texts, with the training loop of the references, and save both to a folder."""
    partial = folder.with_name(f"{folder.name}.partial")
    tokenizer = train_tokenizer(texts, size.vocabulary)
    model = new_model(tokenizer, seed, size)
    register_packed_attention()
    model.set_attn_implementation(PACKED_ATTENTION)
    trainer = Trainer(Likelihood(model), TrainingSet.of([_encode(tokenizer, texts)]), recipe)
    for step in trainer.steps():
        report(step)
    save_reference(trainer.likelihood, tokenizer, partial)
    partial.replace(folder)


def _encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> pa.Table:
    """Each text as an example without a prompt: everything after BOS is trained on, EOS included."""
    ids = [
        [tokenizer.bos_token_id, *text_ids, tokenizer.eos_token_id] for text_ids in tokenizer(list(texts))["input_ids"]
    ]
    return pa.table(
        {
            "example_id": pa.array(range(len(ids)), pa.int64()),
            "input_ids": pa.array(ids, pa.list_(pa.int32())),
            "response_spans": pa.array([[1, len(text_ids)] for text_ids in ids], pa.list_(pa.int32())),
        }
    )
