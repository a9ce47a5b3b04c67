"""Compiled layers: the losses of eager ones, one compilation for packs of any lengths, and no silent way back."""

import copy
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo
import torch._inductor.config
from families import EXPERTS, VOCABULARY, Example, config_of, draw_examples, make
from scoring_tables import scoring_table
from torch._inductor.compile_fx import compile_fx
from transformers import AutoModelForCausalLM

from davir_ray.errors import ModelError
from davir_ray.models.checkpoint import Checkpoint
from davir_ray.models.kernel import layers
from davir_ray.models.kernel.likelihood import Likelihood, Pack
from davir_ray.models.kernel.self_check import self_check
from davir_ray.models.scorer import Scorer, ScorerSettings

Graph = torch.fx.GraphModule
Backend = Callable[[Graph, list[Any]], Any]

NUM_LAYERS = 12
"""More than the graphs that a layer is compiled to."""

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler, which torch's compiler needs")


@pytest.fixture
def compile_with(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Backend], list[Graph]]]:
    """Compile layers by another backend than torch's; it returns the list that every compiled graph is added to."""
    compile_module = torch.nn.Module.compile

    def install(backend: Backend) -> list[Graph]:
        graphs: list[Graph] = []

        def counted(graph: Graph, inputs: list[Any]) -> Any:
            graphs.append(graph)
            return backend(graph, inputs)

        monkeypatch.setattr(
            torch.nn.Module, "compile", lambda layer, **how: compile_module(layer, **how, backend=counted)
        )
        return graphs

    torch._dynamo.reset()
    yield install
    torch._dynamo.reset()


def traced(graph: Graph, _inputs: list[Any]) -> Any:
    """No code is written: the graph is run as it was found."""
    return graph.forward


def compiled(family: str, num_layers: int = NUM_LAYERS) -> Likelihood:
    config = config_of(family)
    config.num_hidden_layers = num_layers
    if kinds := getattr(config, "layer_types", None):
        config.layer_types = (kinds * num_layers)[:num_layers]
    likelihood = Likelihood(make(config))
    likelihood.compile_layers()
    return likelihood


def draw_packs(count: int = 20) -> list[list[Example]]:
    """Packs of 1 to 8 sequences, of 2 to 60 tokens each; no two have the same lengths."""
    draw = np.random.default_rng(0)
    shapes = [draw.integers(2, 60, draw.integers(1, 9)).tolist() for _ in range(count)]
    return [
        [(draw.integers(0, VOCABULARY, length, dtype=np.int32), (1, length)) for length in lengths]
        for lengths in shapes
    ]


def plain_losses(model: Any, pack: list[Example]) -> torch.Tensor:
    """By transformers alone: a copy with eager attention, one sequence at a time."""
    plain = AutoModelForCausalLM.from_config(copy.deepcopy(model.config), attn_implementation="eager").eval()
    plain.load_state_dict(model.state_dict())
    losses = []
    for ids, _ in pack:
        ids_T = torch.from_numpy(ids.astype(np.int64))
        with torch.no_grad():
            logits_TV = plain(input_ids=ids_T[None], use_cache=False).logits[0]
        losses.append(torch.nn.functional.cross_entropy(logits_TV[:-1], ids_T[1:], reduction="none"))
    return torch.cat(losses)


@torch.inference_mode()
def score(likelihood: Likelihood, pack: list[Example]) -> torch.Tensor:
    return torch.as_tensor(likelihood(Pack.of(pack)))


@pytest.mark.parametrize(
    "family",
    ["Llama", "Gemma3Text", *(pytest.param(name, marks=pytest.mark.slow) for name in ("Gemma2", "GPT2", *EXPERTS))],
)
def test_all_layers_and_packs_run_what_was_compiled_at_start_up(
    compile_with: Callable[[Backend], list[Graph]], family: str
) -> None:
    graphs = compile_with(traced)
    likelihood = compiled(family)
    assert self_check(likelihood) == "packed"
    num_compiled = len(graphs)
    assert 0 < num_compiled < NUM_LAYERS
    for pack in draw_packs():
        torch.testing.assert_close(score(likelihood, pack), plain_losses(likelihood.model, pack), rtol=0, atol=1e-3)
    assert len(graphs) == num_compiled


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("family", ["Llama", "Gemma3Text", "Mixtral"])
def test_the_code_that_torch_writes_has_the_losses_of_transformers(
    compile_with: Callable[[Backend], list[Graph]], family: str
) -> None:
    graphs = compile_with(lambda graph, inputs: compile_fx(graph, inputs))
    likelihood = compiled(family, num_layers=2)
    assert self_check(likelihood) == "packed"
    num_compiled = len(graphs)
    for pack in draw_packs():
        torch.testing.assert_close(score(likelihood, pack), plain_losses(likelihood.model, pack), rtol=0, atol=1e-4)
    examples = draw_examples()
    together = torch.split(score(likelihood, examples), Pack.of(examples).num_scored)
    for at, (example, nll_R) in enumerate(zip(examples, together, strict=True)):
        torch.testing.assert_close(nll_R, score(likelihood, [example]), rtol=1e-5, atol=1e-5)
        others = [
            each if index == at else ((each[0] + 37) % VOCABULARY, each[1]) for index, each in enumerate(examples)
        ]
        again = torch.split(score(likelihood, others), Pack.of(others).num_scored)[at]
        torch.testing.assert_close(again, nll_R, rtol=1e-5 if family in EXPERTS else 0, atol=0)
    assert len(graphs) == num_compiled


@pytest.mark.parametrize("autocast", ["float32", "bfloat16"])
def test_a_scorer_compiles_when_it_starts_and_never_while_it_scores(
    compile_with: Callable[[Backend], list[Graph]], base_folder: Path, reference_folder: Path, autocast: str
) -> None:
    graphs = compile_with(traced)
    base, reference = (Checkpoint.find(str(folder)) for folder in (base_folder, reference_folder))
    scorer = Scorer(base, reference, ScorerSettings(compile=True, autocast=autocast, tokens_per_pack=64))
    num_compiled = len(graphs)
    assert num_compiled > 0
    for pack in draw_packs(4):
        scores = scorer(scoring_table([(ids + 3, spans) for ids, spans in pack]))
        assert set(scores["status"].to_pylist()) == {"ok"}
    assert len(graphs) == num_compiled


def changing_floats(change: Callable[[torch.Tensor], torch.Tensor]) -> Backend:
    """A compiler whose code changes every result of a layer, [1, T, H]."""

    def backend(graph: Graph, _inputs: list[Any]) -> Any:
        def run(*inputs: Any) -> Any:
            found = graph.forward(*inputs)
            return [
                change(each) if isinstance(each, torch.Tensor) and each.ndim == 3 and each.is_floating_point() else each
                for each in found
            ]

        return run

    return backend


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda hidden: 1.01 * hidden, "losses differ by .* nats, where 0.002 are allowed"),
        (lambda hidden: hidden + 1e-5 * hidden.mean(dim=1, keepdim=True), "with the other sequences of its pack"),
    ],
    ids=["moved losses", "a trace of the neighbours"],
)
def test_code_that_is_not_exact_is_refused_by_the_name_of_the_setting(
    compile_with: Callable[[Backend], list[Graph]], change: Callable[[torch.Tensor], torch.Tensor], fault: str
) -> None:
    compile_with(changing_floats(change))
    with pytest.raises(ModelError, match=rf"score.compile is true.*{fault}.*; leave score.compile false"):
        self_check(compiled("Llama", num_layers=2))


def test_layers_that_are_compiled_again_and_again_are_refused_instead_of_run_eagerly(
    compile_with: Callable[[Backend], list[Graph]], monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_with(traced)
    likelihood = compiled("Llama", num_layers=2)
    monkeypatch.setattr(layers, "MAX_VARIANTS", 1)
    self_check(likelihood)
    with torch.no_grad(), pytest.raises(ModelError, match=r"more than 1 compiled variant.*leave score.compile false"):
        likelihood(Pack.of(draw_examples()))  # torch compiles for another mode again


def test_a_machine_without_a_c_compiler_is_told_what_it_lacks(
    compile_with: Callable[[Backend], list[Graph]], monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_with(lambda graph, inputs: compile_fx(graph, inputs))
    monkeypatch.setenv("CXX", "/nowhere/g++")
    with (
        torch._inductor.config.patch({"cpp.cxx": ("/nowhere/g++",), "force_disable_caches": True}),
        pytest.raises(ModelError, match=r"score.compile is true.*cannot be compiled here.*a C\+\+ compiler"),
    ):
        self_check(compiled("Llama", num_layers=1))


def test_a_model_that_names_no_layers_is_not_compiled() -> None:
    likelihood = Likelihood(make(config_of("Llama")))
    likelihood.model._no_split_modules = set()
    with pytest.raises(ModelError, match=r"does not name its layers; leave score.compile false"):
        likelihood.compile_layers()


def test_layers_that_are_not_to_be_compiled_are_not(compile_with: Callable[[Backend], list[Graph]]) -> None:
    graphs = compile_with(traced)
    likelihood = Likelihood(make(config_of("Llama")))
    self_check(likelihood)
    score(likelihood, draw_examples())
    assert not graphs
