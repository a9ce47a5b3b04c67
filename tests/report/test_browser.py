"""The report in a real browser: markup in the data stays text, nothing of it runs or loads."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from davir_ray.config import PrepareConfig, RunConfig, ScoreConfig, SelectConfig
from davir_ray.pipeline import run_all

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session")]

PLANTED = "<script>document.title='run by a script'</script><img src=x onerror=\"document.title='run by an image'\">"


@pytest.fixture(scope="module")
def browser() -> str:
    """Debian's Chromium; only in CI is its absence a failure."""
    found = shutil.which("chromium")
    if found is None:
        if os.environ.get("CI"):
            pytest.fail("chromium is not installed, and CI must open the report in it")
        pytest.skip("chromium is not installed")
    return found


def title_and_page(browser: str, page: Path, profile: Path) -> tuple[str, str]:
    """The title and the whole document after scripts had time to run."""
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={profile}", "--virtual-time-budget=3000", "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout.split("<title>")[1].split("</title>")[0], done.stdout


def test_a_script_in_a_page_would_run(browser: str, tmp_path: Path) -> None:
    """What the next test relies on."""
    (tmp_path / "page.html").write_text(f"<!doctype html><title>Page</title><body>{PLANTED}</body>")
    title, _ = title_and_page(browser, tmp_path / "page.html", tmp_path / "profile")
    assert title.startswith("run by")


def test_a_script_in_the_data_does_not(browser: str, base_folder: Path, reference_folder: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"{row} {PLANTED}", "response": f"{PLANTED} {row}"} for row in range(20)]
    name = "rows<img src=x onerror=alert(1)>.jsonl"
    (tmp_path / name).write_text("\n".join(json.dumps(row) for row in rows) + f"\n{PLANTED}")
    config = RunConfig(
        output=str(tmp_path / "run"),
        base=str(base_folder),
        reference=str(reference_folder),
        data=str(tmp_path / name),
        format="prompt_response",
        max_bad_fraction=0.5,
        prepare=PrepareConfig(max_tokens=256),
        score=ScoreConfig(num_actors=1),
        select=SelectConfig(top_k=5),
    )
    run_all(config)
    title, page = title_and_page(browser, tmp_path / "run" / "report.html", tmp_path / "profile")
    assert not title.startswith("run by")
    assert "davir" in title.lower()
    assert page.count("&lt;script&gt;document.title") >= 5
    assert "<script" not in page
    assert "<img" not in page
