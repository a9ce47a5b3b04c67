"""Token losses of every family of models against transformers' own eager forward, one example at a time, in float64."""

import copy
import logging
import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
import transformers
from families import EXPERTS, GROUPED, PACKABLE, UNPACKABLE, VOCABULARY, WINDOW, Example, config_of, draw_examples, make
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from davir_ray.errors import ModelError
from davir_ray.models.kernel.likelihood import Likelihood, Pack
from davir_ray.models.kernel.self_check import self_check


def one_at_a_time(model: PreTrainedModel, config: PretrainedConfig, examples: list[Example]) -> list[float]:
    """Nats of every scored token, by log_softmax over all logits of a float64 copy that never saw our attention."""
    plain = AutoModelForCausalLM.from_config(
        copy.deepcopy(config), attn_implementation="eager", experts_implementation="eager"
    )
    plain.load_state_dict(model.state_dict())
    plain = plain.eval().double()
    nlls = []
    for ids, spans in examples:
        with torch.no_grad():
            logits_TV = plain(input_ids=torch.tensor(ids[None].astype(np.int64)), use_cache=False).logits[0]
        logprobs_TV = torch.log_softmax(logits_TV.double(), dim=-1)
        for start, end in zip(spans[::2], spans[1::2], strict=True):
            nlls += [-float(logprobs_TV[at - 1, int(ids[at])]) for at in range(start, end)]
    return nlls


@torch.inference_mode()
def score(likelihood: Likelihood, examples: list[Example]) -> npt.NDArray[np.float64]:
    return likelihood(Pack.of(examples)).double().numpy()


def by_example(likelihood: Likelihood, examples: list[Example]) -> list[npt.NDArray[np.float64]]:
    return np.split(score(likelihood, examples), np.cumsum(Pack.of(examples).num_scored)[:-1])


def assert_same(family: str, found: npt.NDArray[np.float64], expected: npt.NDArray[np.float64]) -> None:
    """To the bit, but for experts: other tokens change how many rows each one's product has."""
    np.testing.assert_allclose(found, expected, rtol=1e-6 if family in EXPERTS else 0)


def redrawn(example: Example) -> Example:
    """The same shape, every token another."""
    return (example[0] + 37) % VOCABULARY, example[1]


@pytest.mark.parametrize("family", PACKABLE)
def test_a_pack_has_the_token_losses_of_the_models_own_float64_forward(family: str) -> None:
    config, examples = config_of(family), draw_examples()
    likelihood = Likelihood(make(config))
    assert self_check(likelihood) == "packed"
    expected = one_at_a_time(likelihood.model, config, examples)
    assert np.std(expected) > 1, "the head is not sharp enough to tell a wrong target"
    np.testing.assert_allclose(score(likelihood, examples), expected, rtol=1e-5, atol=1e-5)
    if family not in EXPERTS:
        likelihood.double()  # the eager reference has a float32 softmax within
        np.testing.assert_allclose(score(likelihood, examples), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", PACKABLE)
def test_neighbours_in_a_pack_change_no_bit_of_an_example(family: str) -> None:
    likelihood = Likelihood(make(config_of(family)))
    examples = draw_examples()
    together = by_example(likelihood, examples)
    for at in range(len(examples)):
        others = [example if index == at else redrawn(example) for index, example in enumerate(examples)]
        assert_same(family, by_example(likelihood, others)[at], together[at])


@pytest.mark.parametrize("family", PACKABLE)
def test_an_example_in_a_pack_scores_as_it_does_alone(family: str) -> None:
    """Bitwise equal, except for few tokens, for which a matrix product uses another kernel than for many."""
    likelihood = Likelihood(make(config_of(family)))
    examples = draw_examples()
    for example, nll_R in zip(examples, by_example(likelihood, examples), strict=True):
        alone_R = score(likelihood, [example])
        np.testing.assert_allclose(nll_R, alone_R, rtol=4e-6)  # of three processors one differed by 1.01e-6
        if len(nll_R) >= 16 and family not in EXPERTS:  # of whose products neighbours change the shape
            np.testing.assert_array_equal(nll_R, alone_R)


@pytest.mark.parametrize("family", UNPACKABLE)
def test_a_family_that_cannot_be_packed_is_run_in_padded_batches_and_stays_exact(
    family: str, caplog: pytest.LogCaptureFixture
) -> None:
    config, examples = config_of(family), draw_examples()
    likelihood = Likelihood(make(config))
    with caplog.at_level(logging.WARNING, logger="davir_ray"):
        assert self_check(likelihood) == "padded, eager"
    warned = [message for message in caplog.messages if message.startswith(likelihood.model.__class__.__name__)]
    assert len([message for message in warned if "padded" in message]) == 1
    expected = one_at_a_time(likelihood.model, config, examples)
    np.testing.assert_allclose(score(likelihood, examples), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", PACKABLE | UNPACKABLE)
def test_no_token_loss_depends_on_a_later_token(family: str) -> None:
    likelihood = Likelihood(make(config_of(family)))
    self_check(likelihood)
    ids, _ = draw_examples()[3]
    changed = np.concatenate([ids[:20], (ids[20:] + 37) % VOCABULARY])
    whole = (1, len(ids))
    assert_same(family, score(likelihood, [(ids, whole)])[: 20 - 1], score(likelihood, [(changed, whole)])[: 20 - 1])


SWITCH = 16
"""Tokens above which the rotary frequencies of these change."""
LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
LONGROPE["original_max_position_embeddings"] = SWITCH


def test_rotary_frequencies_do_not_come_from_a_neighbour() -> None:
    config = transformers.Phi3Config(
        **GROUPED, rope_parameters=LONGROPE, original_max_position_embeddings=SWITCH, tie_word_embeddings=False
    )
    likelihood = Likelihood(make(config))
    assert self_check(likelihood) == "packed"
    draw = np.random.default_rng(2)
    examples = [
        (draw.integers(0, VOCABULARY, length, dtype=np.int32), (1, length)) for length in (9, SWITCH, SWITCH + 1, 40, 5)
    ]
    expected = one_at_a_time(likelihood.model, config, examples)
    np.testing.assert_allclose(score(likelihood, examples), expected, rtol=1e-5, atol=1e-5)
    likelihood.packed = False
    np.testing.assert_allclose(score(likelihood, examples), expected, rtol=1e-5, atol=1e-5)


def test_dynamic_frequencies_are_refused_where_they_change() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    config = transformers.LlamaConfig(**GROUPED | {"max_position_embeddings": SWITCH}, rope_parameters=rope)
    likelihood = Likelihood(make(config))
    draw = np.random.default_rng(2)
    short, long = (
        [(draw.integers(0, VOCABULARY, length, dtype=np.int32), (1, length))] for length in (SWITCH, SWITCH + 1)
    )
    np.testing.assert_allclose(score(likelihood, short), one_at_a_time(likelihood.model, config, short), rtol=1e-5)
    with pytest.raises(ModelError, match=r"lower prepare\.max_tokens"):
        score(likelihood, long)


def test_a_window_as_long_as_the_sequence_sees_all_of_it() -> None:
    ids = draw_examples()[3][0][:WINDOW]
    windowed = make(config_of("Mistral"))
    free = make(transformers.MistralConfig(**GROUPED, sliding_window=None))
    free.load_state_dict(windowed.state_dict())
    example = [(ids, (1, WINDOW))]
    np.testing.assert_array_equal(score(Likelihood(windowed), example), score(Likelihood(free), example))


def test_an_untrained_head_that_was_not_sharpened_costs_about_the_logarithm_of_the_vocabulary() -> None:
    model = make(config_of("Llama"))
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1e-6)
    np.testing.assert_allclose(score(Likelihood(model), draw_examples()), math.log(VOCABULARY), atol=1e-3)
