"""What the documents say: commands that parse or run, links that lead somewhere, every column and reason explained."""

import gzip
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from drivers import PACKAGE

from davir_ray.cli import parse_as, parse_rank
from davir_ray.config.align import AlignRunConfig
from davir_ray.config.compare import CompareConfig
from davir_ray.config.export import ExportOptions
from davir_ray.config.run import OutputConfig, RunConfig
from davir_ray.schema import COLUMNS, FOLD_COLUMNS, RejectReason, Status

DOCS = PACKAGE / "docs"
DOCUMENTS = [
    PACKAGE / "README.md", PACKAGE / "CONTRIBUTING.md", PACKAGE / "CHANGELOG.md", PACKAGE / "cluster" / "README.md",
    PACKAGE / "davir_ray" / "benchmarks" / "RESULTS.md", *sorted(DOCS.glob("*.md")),
]  # fmt: skip
GUIDE = DOCS / "guide.md"
SETTINGS: dict[str, type[OutputConfig | ExportOptions]] = {
    "score.py": RunConfig, "finetune.py": RunConfig, "align.py": AlignRunConfig, "compare.py": CompareConfig,
    "export.py": ExportOptions,
}  # fmt: skip


def commands(text: str) -> list[str]:
    """Every `python jobs/…` of a document, continued lines joined, up to what ends a command in prose."""
    joined = text.replace("\\\n", " ")
    return [match.rstrip(" .,:;)") for match in re.findall(r"python jobs/\w+\.py[^\n`|&]*", joined)]


def boxes(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


ALL_COMMANDS = [(document, command) for document in DOCUMENTS for command in commands(document.read_text())]


def test_the_documents_have_commands() -> None:
    assert len(ALL_COMMANDS) > 12
    assert {document.name for document, _ in ALL_COMMANDS} >= {"README.md", "guide.md", "compare.md", "align.md"}


@pytest.mark.parametrize(("document", "command"), ALL_COMMANDS)
def test_a_command_names_a_job_and_options_that_exist(document: Path, command: str, tmp_path: Path) -> None:
    words = shlex.split(command.replace("…", ""))
    assert (PACKAGE / words[1]).is_file(), command
    if words[1] == "jobs/rank.py":
        parse_rank(words[2:])
    settings = SETTINGS.get(Path(words[1]).name)
    if settings is None or "--help" in words:
        return
    if "--config" in words:  # of the user: it stands for any
        at = words.index("--config")
        (tmp_path / "run.yaml").write_text("base: some/model\n")
        if not (PACKAGE / words[at + 1]).is_file():
            words[at + 1] = str(tmp_path / "run.yaml")
    parse_as(settings, words[2:])


CONFIGS = {"alpaca_gsm8k.yaml": RunConfig, "compare_mixture.yaml": CompareConfig}


def test_every_configuration_is_known() -> None:
    assert CONFIGS.keys() == {path.name for path in (PACKAGE / "jobs" / "configs").iterdir()}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_parses_and_so_do_the_commands_in_its_head(name: str) -> None:
    file = PACKAGE / "jobs" / "configs" / name
    parse_as(CONFIGS[name], ["--config", str(file)])
    text = file.read_text()
    assert commands(text)
    for command in commands(text):
        words = [str(PACKAGE / word) if word.startswith("jobs/configs/") else word for word in shlex.split(command)]
        if words[1] == "jobs/rank.py":
            parse_rank(words[2:])
        else:
            parse_as(SETTINGS[Path(words[1]).name], words[2:])


@pytest.fixture(scope="module")
def known_options() -> set[str]:
    """Of the help of every job with a configuration, in this process: each of its own would import for seconds."""
    found: set[str] = set()
    for job in (["score.py"], ["align.py"], ["compare.py"], ["export.py"], ["benchmark.py", "gpu"]):
        script, help_text = str(PACKAGE / "jobs" / job[0]), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(help_text):
            patch.setattr(sys, "argv", [script, *job[1:], "--help"])
            with pytest.raises(SystemExit):
                runpy.run_path(script, run_name="__main__")
        found |= set(re.findall(r"--([a-z_]+(?:\.[a-z_]+)*)", help_text.getvalue()))
    return found


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_option_of_a_job_that_is_mentioned_exists(document: Path, known_options: set[str]) -> None:
    options = set(re.findall(r"`--([a-z_]+(?:\.[a-z_]+)*)[ `=]", document.read_text()))
    assert options - known_options <= {"json", "rows", "rare"}, "of jobs with options of their own"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_to_files_and_headings(document: Path) -> None:
    for target, heading in re.findall(r"\]\((?!https?://)([^)#]*)(?:#([^)]+))?\)", document.read_text()):
        file = document.parent / target if target else document
        assert file.exists(), target
        headings = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE) if heading else []
        assert not heading or heading in {re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings}


def test_the_readme_leads_to_every_page_of_the_docs() -> None:
    linked = re.findall(r"\]\(docs/([^)#]+)", (PACKAGE / "README.md").read_text())
    assert set(linked) >= {path.name for path in DOCS.iterdir() if path.suffix != ".py"}


def test_the_page_of_options_has_every_setting_as_it_is() -> None:
    made = subprocess.run([sys.executable, DOCS / "make_options.py"], capture_output=True, text=True, check=True).stdout
    assert made == (DOCS / "options.md").read_text(), "run: python docs/make_options.py > docs/options.md"


def test_every_column_status_and_reason_is_explained() -> None:
    lines = (DOCS / "columns.md").read_text().splitlines()
    rows = {line.split("|")[1].strip(): line for line in lines if line.startswith("| `")}
    for folder, columns in [*COLUMNS.items(), ("examples", FOLD_COLUMNS)]:
        for column in columns:
            told = rows[f"`{column.name}`"]
            assert folder in told
            assert column.meaning.partition("(see")[0].strip() in told
    assert {f"`{name}`" for name in (*Status, *RejectReason)} <= rows.keys()


@pytest.mark.slow
def test_the_guide_word_by_word(
    data_folder: Path, make_checkpoint: Callable[..., Path], ray_address: str, tmp_path: Path
) -> None:
    """The run starts a Ray of its own, as a newcomer's does; the other commands use one that runs, which is quicker."""
    (tmp_path / "jobs").symlink_to(PACKAGE / "jobs")
    (tmp_path / "my-base").symlink_to(make_checkpoint(0))
    (tmp_path / "my-data").mkdir()
    lines = gzip.decompress((data_folder / "alpaca_9k.jsonl.gz").read_bytes()).decode().splitlines()[:120]
    (tmp_path / "my-data" / "rows.jsonl").write_text("\n".join(lines))
    alone = {"PYTHONPATH": str(PACKAGE), "HOME": str(tmp_path)}
    on_running_ray = {**os.environ, "PYTHONPATH": str(PACKAGE), "RAY_ADDRESS": ray_address}
    ran = []
    for command in "".join(boxes(GUIDE.read_text(), "sh")).splitlines():
        words = shlex.split(command)
        assert words[0] == "python"
        environment = alone if words[1] == "jobs/score.py" and "--dry_run" not in words else on_running_ray
        ended = subprocess.run(
            [sys.executable, *words[1:]], cwd=tmp_path, env=environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600, check=False,
        )  # fmt: skip
        assert ended.returncode == 0, f"{command}\n{ended.stdout}"
        ran.append(ended.stdout)
    assert "⟦" in ran[0]
    assert "estimate" in ran[0]
    assert ran[2].splitlines()[-1] == "complete"
    assert "largest difference" in ran[3]
    (snippet,) = boxes(GUIDE.read_text(), "python")
    ended = subprocess.run(
        [sys.executable, "-c", f"{snippet}\nprint(len(rows), sorted(rows[0]))"], cwd=tmp_path, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert ended.stdout == "20 ['input', 'instruction', 'output']\n"
