"""The prepare stage beside `datasets` (load_dataset and map) with the same tokenizer, files and number of processes.

The rival does less: it renders Alpaca's prompt and tokenises prompt and response, without spans, ids, hashes, rejects
and the columns of text.
"""

import json
import logging
import os
import platform
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import ray
import torch
from transformers import PreTrainedTokenizerFast

from davir_ray.benchmarks.scaling import save_pair
from davir_ray.benchmarks.workload import SMALL_LLAMA, load_model, trained_tokenizer
from davir_ray.config.checks import check
from davir_ray.config.prepare import PrepareConfig
from davir_ray.config.sources import Source
from davir_ray.data.formats import ALPACA_PROMPT_WITH_INPUT, ALPACA_PROMPT_WITHOUT_INPUT
from davir_ray.engine.connect import connected
from davir_ray.models.checkpoint import Checkpoint
from davir_ray.run.folder import Run
from davir_ray.run.manifest import library_versions
from davir_ray.stages.prepare import Preparation, prepare

log = logging.getLogger(__name__)

_MAX_TOKENS = 512


@dataclass(frozen=True, kw_only=True)
class PrepareBenchmark:
    """Measure how many rows a second are prepared, and what that costs the driver.

    It runs on the cluster of RAY_ADDRESS or of the submitted job, else on a local Ray that it starts before the
    measurement.
    """

    data: str
    """File of JSON lines in Alpaca's form, plain or .gz, whose rows are repeated."""
    json: str | None = None
    """File for the result."""
    megabytes: int = 200
    """Size of the data, JSON lines that are not compressed."""
    files: int = 1
    """Number of files that the data are in."""
    repeats: int = 3
    """Number of times that each side prepares the data; they take turns, and the medians are printed."""
    rival: bool = True
    """Whether `datasets.map` takes turns, too."""

    def __post_init__(self) -> None:
        for name in ("megabytes", "files", "repeats"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")


def run(settings: PrepareBenchmark) -> dict[str, Any]:
    """Prepare the data again and again; returns the contents of the JSON file."""
    with tempfile.TemporaryDirectory() as folder, connected():
        return measure(Path(folder), settings)


def measure(folder: Path, settings: PrepareBenchmark) -> dict[str, Any]:
    """The result of `run`; leaves the runs in the folder."""
    tokenizer = trained_tokenizer(settings.data, SMALL_LLAMA["vocab_size"])
    num_rows = _write_data(folder / "data", settings)
    model, _ = load_model(None, json.dumps(SMALL_LLAMA), torch.float32, torch.device("cpu"))
    save_pair(folder, model)
    tokenizer.save_pretrained(folder / "base")
    preparation = Preparation(base=Checkpoint.find(str(folder / "base")), config=PrepareConfig(max_tokens=_MAX_TOKENS))
    source = Source(name="alpaca", path=str(folder / "data"), format="alpaca")
    num_cpus = max(1, int(ray.cluster_resources()["CPU"]) - 1)
    process, seconds, grown = psutil.Process(), dict[str, list[float]](), []
    for turn in range(settings.repeats):
        before, started = process.memory_info().rss, time.monotonic()
        manifest = prepare(Run.at(folder / f"run-{turn}"), [source], preparation, max_bad_fraction=0.1)
        seconds.setdefault("davir_ray", []).append(time.monotonic() - started)
        grown.append((process.memory_info().rss - before) / 2**20)
        if settings.rival:
            started = time.monotonic()
            _map(folder, turn, tokenizer, num_cpus)
            seconds.setdefault("datasets.map", []).append(time.monotonic() - started)
        log.info("benchmark: turn %d of %d, %s", turn + 1, settings.repeats, {k: v[-1] for k, v in seconds.items()})
    rates = {name: num_rows / median(taken) for name, taken in seconds.items()}
    machine = {"cpus": os.cpu_count(), "processor": platform.processor() or platform.machine()}
    return {
        "settings": asdict(settings),
        "rows": num_rows,
        "rejected": manifest.counts["rejected"],
        "rows_per_second": rates,
        "ratio": rates["davir_ray"] / rates["datasets.map"] if settings.rival else None,
        "driver_growth_mib": max(grown),
        "versions": library_versions(),
        "machine": {**machine, "processes": num_cpus, "date": time.strftime("%Y-%m-%d")},
    }


def _write_data(folder: Path, settings: PrepareBenchmark) -> int:
    """Write the rows again and again, each time with another number, until there are enough bytes; returns the rows."""
    import gzip

    with gzip.open(settings.data, "rt") if settings.data.endswith(".gz") else open(settings.data) as lines:
        rows = [json.loads(line) for line in lines]
    folder.mkdir()
    num_rows, least = 0, settings.megabytes * 10**6 // settings.files
    for number in range(settings.files):
        with (folder / f"{number:06d}.jsonl").open("w") as file:
            while file.tell() < least:
                row = rows[num_rows % len(rows)]
                file.write(json.dumps(row | {"instruction": f"{num_rows}. {row['instruction']}"}) + "\n")
                num_rows += 1
    return num_rows


def _map(folder: Path, turn: int, tokenizer: PreTrainedTokenizerFast, num_processes: int) -> None:
    """Tokenise the same files with `datasets`, into files of its own."""
    import datasets

    def encode(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        prompts = [
            (ALPACA_PROMPT_WITH_INPUT if context else ALPACA_PROMPT_WITHOUT_INPUT).format(
                instruction=instruction, input=context
            )
            for instruction, context in zip(rows["instruction"], rows["input"], strict=True)
        ]
        return {
            "prompt_ids": tokenizer(prompts, add_special_tokens=False)["input_ids"],
            "response_ids": tokenizer(rows["output"], add_special_tokens=False)["input_ids"],
        }

    cache = str(folder / f"cache-{turn}")
    files = [str(file) for file in sorted((folder / "data").iterdir())]
    num_loading = min(num_processes, len(files))
    data = datasets.load_dataset("json", data_files=files, split="train", cache_dir=cache, num_proc=num_loading)
    data.map(encode, batched=True, num_proc=num_processes, remove_columns=data.column_names)
