"""What the job that reads writes, what other runs wrote, and what models hold: none of it is data."""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest

from davir_ray.config.sources import Source
from davir_ray.data.files import list_files
from davir_ray.errors import DataError
from davir_ray.run.location import Location
from davir_ray.run.manifest import CONFIG_HEAD

LINE = '{"instruction": "Name a colour.", "output": "Blue."}\n'
OF_A_RUN = ["lease.json", "report.json", "manifests/prepare.json", "selected/part-0.parquet", "jsonl/part-0.jsonl"]


def fill(root: str, *names: str) -> None:
    fs, path = fsspec.core.url_to_fs(root)
    for name in names:
        fs.makedirs(os.path.dirname(f"{path}/{name}"), exist_ok=True)
        fs.pipe_file(f"{path}/{name}", LINE.encode())


def fill_run(root: str) -> None:
    fill(root, *OF_A_RUN)
    fs, path = fsspec.core.url_to_fs(root)
    fs.pipe_file(f"{path}/config.yaml", f"{CONFIG_HEAD}limit: 3\n".encode())


def listed(path: Any, *written: Any) -> list[str]:
    source = Source(name="s", path=path if isinstance(path, list) else str(path), format="alpaca")
    return [file.relative_path for file in list_files(source, [Location.of(str(place)) for place in written])]


@pytest.fixture(params=["local", "memory"])
def proj(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A data folder with an output in it that has begun, and a folder whose name begins as the output's does."""
    root = str(tmp_path / "proj") if request.param == "local" else f"memory://{tmp_path.name}/proj"
    fill(root, "train.jsonl", "run2/more.jsonl", "run/lease.json", "run/examples/part-0.parquet", "run/deep/x.jsonl")
    return root


WAYS: dict[str, Callable[[str], Any]] = {
    "a folder": lambda root: root,
    "a folder with a slash": lambda root: f"{root}/",
    "a glob": lambda root: f"{root}/*",
    "a deep glob": lambda root: f"{root}/**",
    "a deep glob of files": lambda root: f"{root}/**/*.jsonl",
    "a list": lambda root: [f"{root}/*.jsonl", f"{root}/r*"],
}


@pytest.mark.parametrize("way", WAYS)
def test_what_lies_in_the_output_is_not_listed(proj: str, way: str) -> None:
    assert (
        listed(WAYS[way](proj), f"{proj}/run")
        == listed(WAYS[way](proj), f"{proj}/run/")
        == [
            "run2/more.jsonl",
            "train.jsonl",
        ]
    )


@pytest.mark.parametrize("named", ["run/deep/x.jsonl", "run/deep", "run", "run/", "run/*.json", "run/deep/**"])
def test_a_path_in_the_output_is_refused_by_name(proj: str, named: str) -> None:
    with pytest.raises(DataError, match=rf"{named.rstrip('/').replace('*', '.')}.* is in .*proj/run, which this job"):
        listed([f"{proj}/train.jsonl", f"{proj}/{named}"], f"{proj}/run")


def test_the_data_folder_itself_as_output_is_refused(proj: str) -> None:
    with pytest.raises(DataError, match="which this job writes; choose another --output"):
        listed(proj, proj)


def test_a_folder_with_nothing_but_the_output_has_no_data(proj: str) -> None:
    with pytest.raises(DataError, match=r"no data files in .*: there are 3 files in .*proj/run, which this job writes"):
        listed(f"{proj}/r*n", f"{proj}/run")


def test_links_and_relative_paths_lead_to_the_same_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(str(tmp_path / "proj"), "train.jsonl", "run/x.jsonl")
    (tmp_path / "link").symlink_to(tmp_path / "proj")
    (tmp_path / "proj" / "one.jsonl").symlink_to(tmp_path / "proj" / "run" / "x.jsonl")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path / "proj" / "run")
    for data in (tmp_path / "proj", tmp_path / "link", "..", "../../link", "~/proj", "../run/.."):
        for output in (tmp_path / "proj" / "run", tmp_path / "link" / "run", ".", "~/link/run", "../run/../run"):
            assert listed(data, output) == ["train.jsonl"], (data, output)


def test_another_output_is_left_out_and_named(proj: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    assert listed(proj, f"{proj}/run") == ["run2/more.jsonl", "train.jsonl"] and not caplog.text
    fill_run(f"{proj}/old/run1")
    fill_run(f"{proj}/.hidden")
    for path in (proj, f"{proj}/*", f"{proj}/**", f"{proj}/**/*.jsonl"):
        caplog.clear()
        assert listed(path, f"{proj}/run") == ["run2/more.jsonl", "train.jsonl"]
        assert "proj/old/run1, the output of another run" in caplog.text and ".hidden" not in caplog.text
    caplog.clear()
    assert listed(proj, f"{proj}/run") == ["run2/more.jsonl", "train.jsonl"]
    assert "6 files in " in caplog.text and "3 files" not in caplog.text


def test_what_is_named_in_another_output_is_read(proj: str) -> None:
    fill_run(f"{proj}/run1")
    assert listed(f"{proj}/run1/selected", f"{proj}/run") == ["part-0.parquet"]
    assert listed(f"{proj}/run*/jsonl/*.jsonl", f"{proj}/run") == ["run1/jsonl/part-0.jsonl"]
    with pytest.raises(DataError, match="proj/run1 is the output of a run; give a folder in it"):
        listed(f"{proj}/run1", f"{proj}/run")


def test_links_in_the_output_lead_to_no_data(tmp_path: Path) -> None:
    """To a folder or a file elsewhere, or to nothing."""
    fill(str(tmp_path / "proj"), "train.jsonl", "run/x.jsonl")
    fill(str(tmp_path / "disk"), "part-0.parquet")
    run = tmp_path / "proj" / "run"
    (run / "examples").symlink_to(tmp_path / "disk")
    (run / "one.parquet").symlink_to(tmp_path / "disk" / "part-0.parquet")
    (run / "config.yaml").symlink_to(tmp_path / "gone")
    assert listed(tmp_path / "proj", run) == listed(f"{tmp_path}/proj/**", run) == ["train.jsonl"]
    for named in (run / "examples", run / "examples" / "part-0.parquet", run / "one.parquet"):
        with pytest.raises(DataError, match="proj/run, which this job writes"):
            listed(named, run)


def test_a_configuration_of_another_program_is_no_output(tmp_path: Path) -> None:
    fill(str(tmp_path), "train.jsonl", "theirs/more.jsonl", "theirs/config.yaml", "folder/config.yaml/x.txt")
    assert listed(tmp_path) == ["theirs/more.jsonl", "train.jsonl"]


def test_the_json_of_a_model_is_left_out_and_named(
    tmp_path: Path, base_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fill(str(tmp_path), "train.jsonl", "more.json", "base/also.jsonl", "features/x.json", "features/x.safetensors")
    for file in base_folder.iterdir():
        (tmp_path / "base" / file.name).write_bytes(file.read_bytes())
    num_json = len(list(base_folder.glob("*.json")))
    assert num_json >= 3 and all(json.loads(file.read_bytes()) for file in base_folder.glob("*.json"))
    caplog.set_level(logging.WARNING)
    assert listed(tmp_path) == ["base/also.jsonl", "features/x.json", "more.json", "train.jsonl"]
    assert f"left out {num_json} JSON files of the model in {tmp_path}/base" in caplog.text
