"""What a run would do: the first records as examples, and the rate that its devices are reckoned to sustain."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from davir_ray.config.run import EstimateConfig, InputConfig
from davir_ray.config.sources import Source
from davir_ray.config.training import FinetuneConfig
from davir_ray.data.files import list_files, plan_tasks
from davir_ray.data.reader import ExampleRow
from davir_ray.data.records import Reject, estimate_rows
from davir_ray.engine.connect import accelerators, has_gpu
from davir_ray.engine.pool import plan_pool
from davir_ray.engine.ray_train import check_workers
from davir_ray.errors import ConfigError
from davir_ray.models.device import gemm_flops
from davir_ray.models.size import ModelSize
from davir_ray.run.folder import Run
from davir_ray.run.location import Location
from davir_ray.stages.estimate import CPU_SHARE, GPU_SHARE, PEAK_TFLOPS, DataSize, estimate, told
from davir_ray.stages.prepare import UNLIMITED, Preparation, are_pairs


def foresee(
    run: Run,
    config: InputConfig,
    preparation: Preparation,
    training: FinetuneConfig | None,
    written: Sequence[Location],
) -> list[str]:
    """Lines that say what a job would do: the first examples, what they will take, the pool. Nothing is written.

    `training` is None where nothing is trained; what lies where the job writes (`written`) is no data.
    """
    lines, data = preview(config.all_sources(), preparation, written=written)
    run.check_claim()
    if training is not None:
        check_workers(training)
    pool = plan_pool(config.score)
    rate = device_rate(config.estimate)
    examples_per_unit = 2 if are_pairs(config.all_sources()) else 1
    found = estimate(ModelSize.of(preparation.base), data, config.prepare.shard_rows, training, examples_per_unit)
    lines += told(found, *rate, pool.initial_size, config.estimate.price_per_device_hour)
    return [*lines, f"cluster: {pool} to score", f"output: {run}"]


class Preview(NamedTuple):
    """What the first records become."""

    lines: list[str]
    """For the user: examples with the scored tokens between ⟦ and ⟧, and bad rows."""
    data: DataSize


def preview(
    sources: list[Source],
    preparation: Preparation,
    num_records: int = 100,
    num_shown: int = 3,
    written: Sequence[Location] = (),
) -> Preview:
    """Prepare the first records of each source, without Ray; what lies where the job writes (`written`) is no data."""
    tokenizer = preparation.base.tokenizer()
    reader = preparation.reader(sources)
    lines, sizes = [], []
    for source in sources:
        files = list_files(source, written)
        slices = [part for task in plan_tasks(files, UNLIMITED) for part in task]
        items = list(reader.read(source, slices, num_records))
        rejects = [item for item in items if isinstance(item, Reject)]
        examples = [row for item in items if not isinstance(item, Reject) for row in item]
        lines.append(f"{source.name}: {len(items) - len(rejects)} of the first {len(items)} records can be prepared")
        lines += [f"  {r.source_file} row {r.source_row}: {r.reason} ({r.detail})" for r in rejects[:num_shown]]
        lines += [_marked(tokenizer, row["input_ids"], row["response_spans"]) for row in examples[:num_shown]]
        num_rows = min(estimate_rows(files), preparation.limit or UNLIMITED)
        sizes.append((num_rows, num_rows / max(1, len(items)), examples))
    return Preview(lines, _data_size(sizes))


def _data_size(sizes: list[tuple[int, float, list[ExampleRow]]]) -> DataSize:
    """From each source's rows, rows for each that was read, and the examples that were read."""
    columns = ("num_prompt_tokens", "num_response_tokens")
    prompt, scored = (sum(scale * sum(row[name] for row in rows) for _, scale, rows in sizes) for name in columns)
    return DataSize(
        num_rows=sum(num_rows for num_rows, _, _ in sizes),
        num_examples=round(sum(scale * len(rows) for _, scale, rows in sizes)),
        num_tokens=round(prompt + scored),
        num_scored=round(scored),
    )


def _marked(tokenizer: Any, input_ids: npt.NDArray[np.int32], spans: list[int]) -> str:
    """The tokens as text, the scored ones between ⟦ and ⟧."""
    edges = [0, *spans, len(input_ids)]
    pieces = [tokenizer.decode(input_ids[start:end]) for start, end in pairwise(edges)]
    return "".join(f"⟦{piece}⟧" if number % 2 else piece for number, piece in enumerate(pieces))


def device_rate(config: EstimateConfig) -> tuple[float, str]:
    """TFLOP/s that one device is reckoned to sustain, and where the number comes from."""
    if config.device_tflops is not None:
        return config.device_tflops, "as given"
    names = accelerators()
    known = [name for name in names if name in PEAK_TFLOPS]
    if known:
        slowest = min(known, key=lambda name: PEAK_TFLOPS[name])
        return GPU_SHARE * PEAK_TFLOPS[slowest], f"assumed {GPU_SHARE:.0%} of the peak of {slowest}"
    if has_gpu():
        raise ConfigError(
            f"the rate of the cluster's GPUs ({', '.join(names) or 'unnamed'}) is not known; "
            "give --estimate.device_tflops, what one sustains"
        )
    of_a_thread = gemm_flops(torch.float32, torch.device("cpu")) / 1e12  # of CPU time, so of one thread
    return CPU_SHARE * of_a_thread, f"{CPU_SHARE:.0%} of a matrix product here; a device is one CPU thread"
