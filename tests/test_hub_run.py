"""The main job with models of the hub: the whole chain against a stand-in, named by HF_ENDPOINT as any hub is."""

from pathlib import Path

import pytest
from drivers import Driver
from hub_server import HubServer

from davir_ray.run.folder import Run

NUM_ROWS = 24
SETTINGS = {
    "format": "prompt_response",
    "select.top_k": 5,
    "score.num_actors": 2,
    "score.num_cpus": 0.5,
    "prepare.shard_rows": 6,
}


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    lines = [f'{{"prompt": "number {i} ", "response": "is followed by {i + 1}"}}\n' for i in range(NUM_ROWS)]
    file.write_text("".join(lines))
    return file


@pytest.mark.slow
def test_a_run_with_models_of_the_hub_downloads_each_file_once(
    rows: Path, base_folder: Path, reference_folder: Path, ray_address: str, tmp_path: Path
) -> None:
    options = {"data": rows, **SETTINGS}
    with HubServer().serving() as hub:
        commit = hub.publish("org/tiny", base_folder)
        hub.publish("org/tiny-ref", reference_folder, branch="v1")
        environment = hub.environment(tmp_path / "home")
        named = {"base": "org/tiny", "reference": "org/tiny-ref@v1", "output": tmp_path / "run"}
        driver = Driver("score.py", options | named, tmp_path / "log", environment, ray_address)
        assert driver.finish() == 0, driver.output
        files = [path.name for path in base_folder.iterdir()]
        assert hub.fetched() == {f"{name}/{file}": 1 for name in ("org/tiny", "org/tiny-ref") for file in files}
        asked = {path for method, path in hub.requests if "/revision/" in path or path == "/api/models/org/tiny"}
        assert {path: hub.requests["GET", path] for path in asked} == dict.fromkeys(asked, 1)
        assert len(asked) == 2  # each name, once

    scored = Run.at(tmp_path / "run").manifest("score")
    assert scored is not None
    assert scored.fingerprint["base"] == {"commit": commit}

    # Nothing listens there any more. The models are found by the names that the run remembers, and score the same.
    offline = environment | {"HF_HUB_OFFLINE": "1"}
    verified = Driver("verify.py", {"output": tmp_path / "run"}, tmp_path / "verify.log", offline, ray_address)
    assert verified.finish() == 0, verified.output
