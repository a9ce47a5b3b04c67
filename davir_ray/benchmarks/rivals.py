"""Other scoring methods for the same rows: each returns the summed response NLL of each example, in nats."""

from collections.abc import Sequence

import torch
from torch.nn.functional import cross_entropy, log_softmax
from transformers import PreTrainedModel

from davir_ray.benchmarks.workload import Example
from davir_ray.models.kernel.packing import scored_positions

BATCH = 8
_IGNORED = -100


def padded(model: PreTrainedModel, examples: Sequence[Example]) -> list[float]:
    """The naive method: padded batches of 8 in dataset order, full logits, cross entropy over all positions."""
    sums: list[float] = []
    for start in range(0, len(examples), BATCH):
        sums += padded_batch(model, examples[start : start + BATCH]).tolist()
    return sums


def padded_batch(model: PreTrainedModel, batch: Sequence[Example]) -> torch.Tensor:
    """Summed NLL of each example of one padded batch, [N]; differentiable."""
    longest = max(len(example.input_ids) for example in batch)
    ids_NL = torch.zeros(len(batch), longest, dtype=torch.int64)
    mask_NL = torch.zeros_like(ids_NL)
    labels_NL = torch.full_like(ids_NL, _IGNORED)
    for row, example in enumerate(batch):
        ids_NL[row, : len(example.input_ids)] = torch.from_numpy(example.input_ids)
        mask_NL[row, : len(example.input_ids)] = 1
        scored = scored_positions(example.spans)
        labels_NL[row, scored] = ids_NL[row, scored]
    ids_NL, mask_NL, labels_NL = (x.to(model.device) for x in (ids_NL, mask_NL, labels_NL))
    logits_NLV = model(input_ids=ids_NL, attention_mask=mask_NL, use_cache=False).logits[:, :-1]
    flat_TV = logits_NLV.reshape(-1, logits_NLV.shape[-1]).float()
    nll_T = cross_entropy(flat_TV, labels_NL[:, 1:].reshape(-1), ignore_index=_IGNORED, reduction="none")
    return nll_T.view(len(batch), -1).sum(dim=1)


def one_at_a_time(model: PreTrainedModel, examples: Sequence[Example]) -> list[float]:
    """The method of Cherry_LLM and Superfiltering: one example at a time, with `labels=`, fetching each mean loss."""
    sums = []
    for example in examples:
        ids_1T = torch.from_numpy(example.input_ids).long()[None].to(model.device)
        labels_1T = torch.full_like(ids_1T, _IGNORED)
        scored = scored_positions(example.spans)
        labels_1T[0, scored] = ids_1T[0, scored]
        loss = model(input_ids=ids_1T, labels=labels_1T, use_cache=False).loss
        sums.append(loss.item() * len(scored))
    return sums


def lm_eval(model: PreTrainedModel, examples: Sequence[Example]) -> list[float]:
    """The method of lm-evaluation-harness (hf): longest first, batches of 8, log_softmax of full logits, greedy check.

    It scores one span: from several, it makes one that reaches from the start of the first to the end of the last.
    """
    sums = [0.0] * len(examples)
    order = sorted(range(len(examples)), key=lambda row: -len(examples[row].input_ids))
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        inputs = [torch.from_numpy(examples[row].input_ids[:-1]).long() for row in rows]
        ids_NL = torch.nn.utils.rnn.pad_sequence(inputs, batch_first=True).to(model.device)
        logprobs_NLV = log_softmax(model(ids_NL).logits, dim=-1)
        for row, logprobs_LV, ids_T in zip(rows, logprobs_NLV, inputs, strict=True):
            first = examples[row].spans[0]
            targets_R = torch.from_numpy(examples[row].input_ids[first:]).long().to(model.device)
            logprobs_RV = logprobs_LV[first - 1 : len(ids_T)]
            bool((logprobs_RV.argmax(dim=-1) == targets_R).all())
            sums[row] = -float(logprobs_RV.gather(1, targets_R[:, None]).sum())
    return sums


def float64(model: PreTrainedModel, examples: Sequence[Example]) -> list[float]:
    """The exact values: one example at a time through a float64 model, with log_softmax and a Python sum."""
    sums = []
    for example in examples:
        ids_1T = torch.from_numpy(example.input_ids).long()[None].to(model.device)
        logprobs_TV = log_softmax(model(input_ids=ids_1T, use_cache=False).logits[0].double(), dim=-1)
        scored = torch.from_numpy(scored_positions(example.spans)).to(model.device)
        sums.append(-sum(logprobs_TV[scored - 1, ids_1T[0, scored]].tolist()))
    return sums
