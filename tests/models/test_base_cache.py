"""The cache of base losses: a hit has the bits of a miss, and whatever the losses depend on makes a miss."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from scoring_tables import scoring_table
from transformers import AutoModelForCausalLM

from davir_ray.config.scoring import ScoreConfig
from davir_ray.models.base_cache import BaseCache, base_cache
from davir_ray.models.checkpoint import Checkpoint
from davir_ray.models.kernel.likelihood import Likelihood, Pack
from davir_ray.models.scorer import Scorer, ScorerSettings
from davir_ray.run.location import Location

SETTINGS = ScorerSettings(keep_token_nll="all")
Counted = Callable[[Scorer, pa.Table], tuple[pa.Table, int]]


def table_of(lengths: list[int], first_id: int = 0, first_token: int = 3) -> pa.Table:
    return scoring_table([([first_token, *range(4, length + 3)], [2, length]) for length in lengths], first_id)


TABLE = table_of([5, 9, 30, 4])


@pytest.fixture
def cache(tmp_path: Path) -> BaseCache:
    return BaseCache(Location.of(tmp_path / "cache"), "base")


def scorer_of(base: Path, reference: Path, cache: BaseCache | None, settings: ScorerSettings = SETTINGS) -> Scorer:
    return Scorer(Checkpoint.find(str(base)), Checkpoint.find(str(reference)), settings, cache)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    """Score a table, and count the base's forward passes."""

    def count(scorer: Scorer, table: pa.Table) -> tuple[pa.Table, int]:
        seen = []
        handle = scorer._base.register_forward_hook(lambda *_: seen.append(1))
        scores = scorer(table)
        handle.remove()
        return scores, len(seen)

    return count


def test_a_second_reference_costs_one_pass_and_has_the_bits_of_two(
    base_folder: Path, reference_folder: Path, cache: BaseCache, counted: Counted
) -> None:
    expected = scorer_of(base_folder, reference_folder, None)(TABLE)
    _, passes = counted(scorer_of(base_folder, base_folder, cache), TABLE)
    assert passes == 1
    found, passes = counted(scorer_of(base_folder, reference_folder, cache), TABLE)
    assert passes == 0
    assert found.equals(expected)


def test_an_empty_shard_is_kept_too(base_folder: Path, cache: BaseCache, counted: Counted) -> None:
    empty = TABLE.slice(0, 0)
    for _ in range(2):
        scores, passes = counted(scorer_of(base_folder, base_folder, cache), empty)
        assert (scores.num_rows, passes) == (0, 0)


def test_losses_of_a_float64_model_keep_their_bits(base_folder: Path, cache: BaseCache, counted: Counted) -> None:
    settings = replace(SETTINGS, precision="float64")
    first, _ = counted(scorer_of(base_folder, base_folder, cache, settings), TABLE)
    second, passes = counted(scorer_of(base_folder, base_folder, cache, settings), TABLE)
    assert passes == 0
    assert second.equals(first)


def test_a_cache_that_cannot_be_written_costs_a_warning(
    base_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    cache = BaseCache(Location.of(tmp_path / "file"), "base")
    scores = scorer_of(base_folder, base_folder, cache)(TABLE)
    assert set(scores["status"].to_pylist()) == {"ok"}
    assert any("not cached" in message for message in caplog.messages)


@pytest.mark.parametrize(
    "change",
    [
        {"table": table_of([5, 9, 30, 4], first_id=1)},
        {"table": table_of([5, 9, 30, 4], first_token=17)},
        {"table": table_of([5, 9, 30])},
        {"table": table_of([9, 5, 30, 4])},
        {"settings": replace(SETTINGS, precision="bfloat16")},
        {"settings": replace(SETTINGS, num_threads=2)},
        {"settings": replace(SETTINGS, compile=True)},
        {"base": "another model or tokenizer"},
        {"version": 10_000},
    ],
    ids=["ids", "tokens", "fewer", "order", "precision", "threads", "compiled", "base", "version"],
)
def test_what_the_losses_depend_on_never_hits(
    base_folder: Path, cache: BaseCache, counted: Counted, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    compile_module = torch.nn.Module.compile
    # The layers are traced, but no code is written.
    monkeypatch.setattr(torch.nn.Module, "compile", lambda layer, **how: compile_module(layer, **how, backend="eager"))
    counted(scorer_of(base_folder, base_folder, cache), TABLE)
    if "version" in change:
        monkeypatch.setattr("davir_ray.models.scorer.NUMERICS_VERSION", change["version"])
    other = BaseCache(cache.folder, change.get("base", cache.base))
    scorer = scorer_of(base_folder, base_folder, other, change.get("settings", SETTINGS))
    _, passes = counted(scorer, change.get("table", TABLE))
    assert passes == 1


def damage_bytes(file: Path) -> None:
    content = bytearray(file.read_bytes())
    for at in range(40, 80):  # within the compressed values
        content[at] ^= 255
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [damage_bytes, lambda file: file.write_bytes(file.read_bytes()[:40])])
def test_a_damaged_file_is_computed_again_and_mended(
    base_folder: Path, cache: BaseCache, counted: Counted, caplog: pytest.LogCaptureFixture, damage: Any
) -> None:
    expected, _ = counted(scorer_of(base_folder, base_folder, cache), TABLE)
    (file,) = Path(cache.folder.path).rglob("*.parquet")
    whole = file.read_bytes()
    damage(file)
    found, passes = counted(scorer_of(base_folder, base_folder, cache), TABLE)
    assert passes == 1
    assert found.equals(expected)
    assert any("computed again" in message for message in caplog.messages)
    assert file.read_bytes() == whole


def test_values_changed_in_a_readable_file_are_noticed(base_folder: Path, cache: BaseCache, counted: Counted) -> None:
    import pyarrow.parquet as pq

    expected, _ = counted(scorer_of(base_folder, base_folder, cache), TABLE)
    (file,) = Path(cache.folder.path).rglob("*.parquet")
    table = pq.read_table(file)
    wrong = [[value + 1 for value in row] for row in table["token_nll"].to_pylist()]
    pq.write_table(pa.table({"token_nll": pa.array(wrong, pa.list_(pa.float32()))}, schema=table.schema), file)
    found, passes = counted(scorer_of(base_folder, base_folder, cache), TABLE)
    assert passes == 1
    assert found.equals(expected)


def test_what_did_not_fit_the_device_is_not_kept(
    base_folder: Path, cache: BaseCache, counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = Likelihood.forward

    def limited(self: Likelihood, pack: Pack) -> torch.Tensor:
        if max(pack.sequence_lengths) > 20:
            raise torch.OutOfMemoryError("no room")
        return forward(self, pack)

    scorer = scorer_of(base_folder, base_folder, cache)
    with monkeypatch.context() as patch:
        patch.setattr(Likelihood, "forward", limited)
        scores = scorer(TABLE)
    assert scores["status"].to_pylist() == ["ok", "ok", "out_of_memory", "ok"]
    scores, passes = counted(scorer_of(base_folder, base_folder, cache), TABLE)
    assert passes == 1
    assert set(scores["status"].to_pylist()) == {"ok"}


def test_the_cache_may_lie_in_object_storage(base_folder: Path, counted: Counted) -> None:
    cache = BaseCache(Location.of("memory://base-losses"), "base")
    first, passes = counted(scorer_of(base_folder, base_folder, cache), TABLE)
    assert passes == 1
    second, passes = counted(scorer_of(base_folder, base_folder, cache), TABLE)
    assert passes == 0
    assert second.equals(first)
    assert np.isfinite(np.array(second["base_nll"].to_pylist())).all()


def plain_nlls(folder: Path) -> list[float]:
    """Summed losses of TABLE's responses by transformers alone, one example at a time in double precision."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").double().eval()
    sums = []
    for row in TABLE.to_pylist():
        ids = torch.tensor([row["input_ids"]])
        labels = ids.clone()
        labels[0, : row["num_prompt_tokens"]] = -100
        with torch.no_grad():
            sums.append(float(model(ids, labels=labels).loss) * row["num_response_tokens"])
    return sums


def test_models_that_are_folders_of_links_have_losses_of_their_own(
    base_folder: Path, reference_folder: Path, tmp_path: Path
) -> None:
    config = ScoreConfig(base_cache=str(tmp_path / "cache"), precision="float64")
    for folder in (base_folder, reference_folder):
        links = tmp_path / folder.name
        links.mkdir()
        for file in folder.iterdir():
            (links / file.name).symlink_to(file)
        base = Checkpoint.find(str(links))
        for _ in range(2):  # computed, then read
            scorer = Scorer(base, None, replace(SETTINGS, precision="float64"), base_cache(base, config))
            assert scorer(TABLE)["base_nll"].to_pylist() == pytest.approx(plain_nlls(folder), rel=1e-6)
    assert len(list((tmp_path / "cache").rglob("*.parquet"))) == 2
