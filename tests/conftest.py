"""Fixtures that everything shares: one local Ray for the session, small real checkpoints, the folder of real data."""

import argparse
import ast
import inspect
import json.decoder
import logging
import os
import shutil
import tempfile
import textwrap
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
import torch
from hub_server import HubServer
from huggingface_hub import constants
from object_store.stores import Store, moto
from stand_in import write_rows
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from davir_ray.demo.base import train_tokenizer
from davir_ray.models.hub import resolve
from davir_ray.models.kernel.attention import register_packed_attention
from davir_ray.run.location import Location

pytest_plugins = ["made_runs"]

# Ray starts its workers at nice 15, where any other process of the machine starves them.
os.environ.setdefault("RAY_worker_niceness", "0")

# Left to itself Ray ends idle workers after a second, and every test would start new ones, at several CPU seconds each.
# Those that no test needs any more end in time: eighty idle ones take two thirds of a core.
os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", str(120_000))

# An actor less for each fine-tune: nobody announces that a machine of the tests will be taken away.
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")

# How a training goes is looked at every other second, and each would end a second late. A group may start slowly.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "600")

# A node counts as dead after five checks without an answer, every three seconds if nothing is said.
os.environ.setdefault("RAY_health_check_period_ms", "500")

# What watches a node and its logs takes some percent of a core. Nobody reads the node's load; and a new log is found in
# half a second, instead of being looked for ten times a second.
os.environ.setdefault("REPORTER_UPDATE_INTERVAL_MS", str(120_000))
os.environ.setdefault("RAY_LOG_MONITOR_MANY_FILES_THRESHOLD", "0")

# Ray gives an agent of a node 15 s to start, which takes longer where several nodes start on two cores.
os.environ.setdefault("RAY_agent_register_timeout_ms", str(120_000))

# Digests of large files are kept in the user's cache; the tests leave nothing there.
os.environ.setdefault("DAVIR_RAY_CACHE", tempfile.mkdtemp(prefix="davir-cache-"))

# Tests build models of their own, which Checkpoint does not load.
register_packed_attention()

# Equal bits are promised for one thread; with more, a busy machine may split a sum otherwise.
torch.set_num_threads(1)

# A busy machine is no reason to fail.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

NUM_CPUS = 4
"""Logical: Ray may be given more than the machine has."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that have slow tests: at the end, the processes of pytest share out many short ones."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def ray_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The one local Ray of the test session."""
    import ray

    # All tests need this one start, which may fail on a busy machine.
    for attempt in range(3):
        try:
            _start_ray()
            break
        except Exception:
            ray.shutdown()
            if attempt == 2:
                raise
    yield
    ray.shutdown()


def _start_ray() -> None:
    import ray

    ray.init(
        "local",
        num_cpus=NUM_CPUS,
        include_dashboard=False,
        object_store_memory=200 * 2**20,
        logging_level="WARNING",
        # Lines of workers arrive at any time, in the output of whichever test runs then.
        log_to_driver=False,
    )


@pytest.fixture(scope="session")
def ray_address(ray_session: None) -> str:
    """Where other processes reach that Ray: a job that uses it saves the seconds and the processes of a start."""
    import ray

    return str(ray.get_runtime_context().gcs_address)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A hub for this process, which read HF_ENDPOINT when it started, and an empty cache."""
    with HubServer().serving() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        resolve.cache_clear()
        yield server
        resolve.cache_clear()


@pytest.fixture(scope="session")
def moto_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """A stand-in for S3 that checks credentials; each test makes a bucket of its own."""
    with moto(tmp_path_factory.mktemp("moto")) as store:
        yield store


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the data sets: the real ones of DAVIR_TEST_DATA, else 200 rows and what is made of them."""
    folder = os.environ.get("DAVIR_TEST_DATA")
    if folder and Path(folder).is_dir():
        return Path(folder)
    if folder or os.environ.get("CI"):
        pytest.fail("DAVIR_TEST_DATA names no folder, and CI must test on the real data")
    made = tmp_path_factory.mktemp("data")
    write_rows(made)
    return made


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with BOS, EOS and padding, trained on text that a change of this package leaves as it is."""
    modules = (argparse, ast, json.decoder, logging, shutil, textwrap)
    return train_tokenizer(inspect.getsource(module) for module in modules)


@pytest.fixture(scope="session")
def make_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast
) -> Callable[..., Path]:
    """Make a small Llama checkpoint from a seed.

    Its head is sharpened: random logits are nearly uniform, and would give a wrong target almost the right loss.
    """

    def make(seed: int, hidden_size: int = 64, num_layers: int = 2) -> Path:
        folder = tmp_path_factory.mktemp(f"model-{seed}")
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=hidden_size,
                intermediate_size=2 * hidden_size,
                num_hidden_layers=num_layers,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=1024,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        with torch.no_grad():
            model.lm_head.weight.mul_(8)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def base_folder(make_checkpoint: Callable[[int], Path]) -> Path:
    """A base checkpoint."""
    return make_checkpoint(0)


@pytest.fixture(scope="session")
def reference_folder(make_checkpoint: Callable[[int], Path]) -> Path:
    """Another model with the same tokenizer, to score against."""
    return make_checkpoint(1)


@pytest.fixture(params=["local", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Location]:
    """An empty folder, which does not exist yet, on a disk and in a store without folders."""
    if request.param == "local":
        yield Location.of(tmp_path / "run")
        return
    name = f"memory://{uuid.uuid4().hex}"
    yield Location.of(name)
    Location.of(name).remove()


@pytest.fixture
def local(tmp_path: Path) -> Location:
    """An empty folder on the disk, which does not exist yet."""
    return Location.of(tmp_path / "run")
