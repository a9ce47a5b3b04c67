"""The benchmark counts what it says, and every rival computes the same losses; how long things take decides nothing."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from davir_ray.benchmarks import rivals
from davir_ray.benchmarks.likelihood import LikelihoodBenchmark, run, score_packed
from davir_ray.benchmarks.measure import useful_flops, with_peak
from davir_ray.benchmarks.workload import Example, as_shard, load_examples, plain_copy
from davir_ray.errors import ConfigError, DataError
from davir_ray.models.kernel.attention import PACKED_ATTENTION
from davir_ray.models.kernel.likelihood import Likelihood
from davir_ray.models.scorer import Scorer, ScorerSettings

VOCABULARY = 300
TINY: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _threads_restored() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def tiny_llama(attention: str = PACKED_ATTENTION) -> LlamaForCausalLM:
    torch.manual_seed(0)
    fields = {name: value for name, value in TINY.items() if name != "model_type"}
    model = LlamaForCausalLM._from_config(LlamaConfig(**fields), attn_implementation=attention).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model


def draw_examples(lengths: list[int]) -> list[Example]:
    examples, _ = load_examples(len(lengths), 512, VOCABULARY, None, None, "alpaca", lengths)
    return examples


EXAMPLES = draw_examples([30, 7, 7, 55, 2, 18, 40, 3, 21, 9, 12])


@torch.inference_mode()
def test_every_way_computes_the_same_losses() -> None:
    model = tiny_llama()
    exact = rivals.float64(plain_copy(model, "eager", torch.float64), EXAMPLES)
    assert np.std(exact) > 1
    plain = plain_copy(model, "sdpa", torch.float32)
    for way in (rivals.padded, rivals.one_at_a_time, rivals.lm_eval):
        np.testing.assert_allclose(way(plain, EXAMPLES), exact, rtol=1e-5)
    np.testing.assert_allclose(score_packed(Likelihood(model), EXAMPLES, None), exact, rtol=1e-5)


@torch.inference_mode()
def test_useful_flops_leave_out_half_of_attention_and_the_logits_that_are_not_used() -> None:
    model, length = tiny_llama("eager"), 40
    (whole,) = draw_examples([length])
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.from_numpy(whole.input_ids).long()[None], use_cache=False)
    unseen = length**2 - length * (length + 1) // 2
    attention = 4 * TINY["hidden_size"] * TINY["num_hidden_layers"] * unseen
    logits = 2 * VOCABULARY * TINY["hidden_size"] * (length - whole.num_scored)
    # The rotary angles are a product too, of a few hundred.
    assert counter.get_total_flops() - useful_flops(model, [whole]) == pytest.approx(attention + logits, rel=0.01)


def test_of_experts_only_the_routed_ones_count() -> None:
    settings = {name: value for name, value in TINY.items() if name != "model_type"}
    flops = [
        useful_flops(
            MixtralForCausalLM(MixtralConfig(**settings, num_local_experts=4, num_experts_per_tok=k)), EXAMPLES
        )
        for k in (1, 2, 4)
    ]
    expert = 2 * 3 * TINY["hidden_size"] * TINY["intermediate_size"] * TINY["num_hidden_layers"]
    tokens = sum(len(example.input_ids) for example in EXAMPLES)
    assert flops[1] - flops[0] == expert * tokens
    assert flops[2] - flops[1] == 2 * expert * tokens


def test_the_peak_is_what_a_job_needs_beyond_what_was_there() -> None:
    held = torch.ones(50 * 2**18)
    _, peak = with_peak(lambda: torch.ones(100 * 2**18).sum(), CPU)
    _, nothing = with_peak(lambda: None, CPU)
    assert 95 < peak < 180
    assert nothing < 60
    assert held[0] == 1


def test_drawn_lengths_resemble_alpacas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DAVIR_TEST_DATA", raising=False)
    examples, origin = load_examples(2000, 512, VOCABULARY, None, None, "alpaca", [])
    lengths = [len(example.input_ids) for example in examples]
    assert "random tokens" in origin
    assert np.mean(lengths) == pytest.approx(126, rel=0.05)
    assert sum(example.num_scored for example in examples) / sum(lengths) == pytest.approx(0.43, abs=0.02)


def test_real_rows_go_through_the_door_of_a_run(data_folder: Path) -> None:
    examples, origin = load_examples(40, 512, 2000, None, str(data_folder / "gsm8k_train.jsonl.gz"), "gsm8k", [])
    assert origin.endswith("gsm8k_train.jsonl.gz")
    assert len(examples) == 40
    assert all(0 < example.spans[0] < example.spans[1] == len(example.input_ids) for example in examples)
    assert max(int(example.input_ids.max()) for example in examples) < 2000
    with pytest.raises(DataError, match="lower --rows"):
        load_examples(10**6, 512, 300, None, str(data_folder / "gsm8k_train.jsonl.gz"), "gsm8k", [])


@torch.inference_mode()
def test_a_shard_of_examples_is_scored_like_the_examples(base_folder: Path) -> None:
    from davir_ray.models.checkpoint import Checkpoint

    base = Checkpoint.find(str(base_folder))
    scores = Scorer(base, base, ScorerSettings())(as_shard(EXAMPLES, 100))
    assert scores["example_id"].to_pylist() == list(range(100, 100 + len(EXAMPLES)))
    expected = score_packed(Likelihood(base.model(torch.float32, CPU)), EXAMPLES, None)
    np.testing.assert_allclose(scores["base_nll"].to_pylist(), expected, rtol=1e-6)


FIXED = {
    "gemm_tflops", "useful_tflops", "mfu", "speedup_vs_naive", "speedup_vs_one_at_a_time", "extra_memory_ratio",
    "max_abs_diff_vs_fp64", "settings",
}  # fmt: skip


def small(**changes: Any) -> LikelihoodBenchmark:
    options: dict[str, Any] = {
        "random_init": json.dumps(TINY),
        "lengths": [20, 9, 33],
        "rows": 12,
        "repeats": 1,
        "reference_rows": 4,
        "training_rows": 6,
        "pipeline_shards": 0,
    }
    return LikelihoodBenchmark(**options | changes)


@pytest.mark.slow
def test_the_result_holds_what_it_promises() -> None:
    result = run(small())
    assert result.keys() >= FIXED | {"training_speedup_vs_padded"}
    assert result["attention"] == "packed"
    assert result["max_abs_diff_vs_fp64"] < 1e-5
    assert result["examples"]["tokens"] == 4 * (20 + 9 + 33)
    seconds = result["seconds"]
    assert result["speedup_vs_naive"] == seconds["naive"] / seconds["davir_ray"]
    assert result["speedup_vs_one_at_a_time"] == seconds["one_at_a_time"] / seconds["davir_ray"]
    assert result["mfu"] == pytest.approx(result["useful_tflops"] / result["gemm_tflops"])
    assert json.loads(json.dumps(result)) == result


def test_the_kernel_can_be_measured_alone() -> None:
    result = run(small(rivals=False, reference_rows=0, training_rows=0))
    assert math.isfinite(result["mfu"])
    assert "speedup_vs_naive" not in result


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"rows": 0}, "rows is 0"),
        ({"pipeline_shards": 1}, "pipeline_shards is 1"),
        ({"model": "somewhere"}, "both model and random_init"),
        ({"lengths": [5, 1]}, "lengths contains 1"),
        ({"reference_rows": -1}, "reference_rows is -1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        small(**changes)


@pytest.mark.parametrize(
    "wrong", ['{"hidden_size": 4}', "{broken", '{"model_type": "no such"}', "/no/such/file.json", "/no/such/folder"]
)
def test_a_configuration_of_no_model_is_refused(wrong: str) -> None:
    with pytest.raises(ConfigError, match="random_init"):
        run(small(random_init=wrong))


@pytest.mark.slow
def test_experts_are_measured_too() -> None:
    experts = TINY | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    result = run(small(random_init=json.dumps(experts)))
    assert result["max_abs_diff_vs_fp64"] < 1e-5


@pytest.mark.slow
def test_a_benchmark_needs_no_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DAVIR_TEST_DATA", raising=False)
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    result = run(small(random_init=str(tmp_path / "config.json"), lengths=[]))
    assert "drawn" in result["examples"]["origin"]
