"""The output of a job: how it ended is in progress.json, and what is half removed is not taken for complete."""

import socket
from collections.abc import Callable

import jinja2
import pytest
from drivers import PACKAGE

from davir_ray.config.run import RunConfig
from davir_ray.config.yaml import dump
from davir_ray.errors import DataError, OutputError, StorageError
from davir_ray.run.folder import Run
from davir_ray.run.lease import LEASE_FILE
from davir_ray.run.location import Location
from davir_ray.run.manifest import Manifest
from davir_ray.run.progress import Progress
from davir_ray.run.stages import STAGES, from_stage


def find_no_template() -> None:
    jinja2.Environment(loader=jinja2.FileSystemLoader(PACKAGE), autoescape=True).get_template("report.html.j2")


def lose_connection() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
    socket.create_connection(address)


def find_no_column() -> None:
    {}["column"]


def find_bad_data() -> None:
    raise DataError("too much of it\nis bad")


@pytest.mark.parametrize(
    ("work", "kind", "expected"),
    [
        (find_no_template, jinja2.TemplateNotFound, "TemplateNotFound: "),
        (lose_connection, ConnectionRefusedError, "ConnectionRefusedError: [Errno 111] Connection refused"),
        (find_no_column, KeyError, "KeyError: 'column'"),
        (find_bad_data, DataError, "too much of it is bad"),
    ],
)
def test_an_error_stays_itself_and_is_in_the_progress(
    work: Callable[[], None], kind: type[Exception], expected: str, local: Location
) -> None:
    with pytest.raises(kind), Run(local).writing(dump(RunConfig())):
        work()
    progress = Progress.read(local)
    assert progress is not None
    assert progress.state == "failed"
    assert progress.error is not None
    assert progress.error.startswith(expected)
    assert not (local / LEASE_FILE).exists()


def test_a_disk_that_fails_is_a_storage_error(local: Location) -> None:
    with pytest.raises(StorageError, match="The same command continues"), Run(local).writing(dump(RunConfig())):
        (local / "config.yaml" / "below").write_bytes(b"x")
    progress = Progress.read(local)
    assert progress is not None
    assert progress.error is not None
    assert progress.error.startswith(f"{local}/config.yaml/below: FileExistsError")


@pytest.mark.parametrize("num_removed", range(6))
def test_a_removal_that_is_interrupted_leaves_no_stage_that_looks_complete_and_is_not(
    num_removed: int, local: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, stages, left = Run(local), ("score", "rank", "select"), iter(range(num_removed))
    for stage in stages:
        (run / STAGES[stage].writes[0] / "part.parquet").write_bytes(b"x")
        Manifest(stage=stage, fingerprint={}, counts={}, files=[]).write(local)
    remove = Location.remove

    def remove_until_killed(place: Location) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        remove(place)

    monkeypatch.setattr(Location, "remove", remove_until_killed)
    with pytest.raises(KeyboardInterrupt):
        run.clear("score")
    complete = [stage for stage in stages if run.manifest(stage)]
    assert complete == list(stages[: len(complete)]), "no stage outlasts one that it reads"
    assert all((run / STAGES[stage].writes[0] / "part.parquet").exists() for stage in complete)
    assert complete or num_removed >= len(stages)


def test_a_removal_takes_the_stage_and_what_follows_it_and_nothing_before(local: Location) -> None:
    run = Run(local)
    for stage in ("prepare", *from_stage("score")):
        for name in STAGES[stage].writes:
            (run / name / "part.parquet").write_bytes(b"x")
        Manifest(stage=stage, fingerprint={}, counts={}, files=[]).write(local)
    run.clear("score")
    assert [stage for stage in STAGES if run.manifest(stage)] == ["prepare"]
    assert {name for stage in STAGES.values() for name in stage.writes if (run / name).exists()} == {
        *STAGES["prepare"].writes
    }


def test_the_folder_of_other_scores_goes_with_the_last_of_them(local: Location) -> None:
    run = Run(local)
    for name in ("extra/seen", "extra/ifd", "extra/ifd_commits"):
        (run / name / "part.parquet").write_bytes(b"x")
    run.clear("ifd")
    assert sorted((run / "extra").entries()) == ["seen"]
    run.clear("seen")
    assert "extra" not in run.folder.entries()


def test_an_attempt_binds_the_next_one_unless_it_ended_by_the_users_mistake(local: Location) -> None:
    run = Run(local)
    assert not run.continues_attempt("finetune", "checkpoints", {"rate": 1})
    run.note_attempt("checkpoints", {"rate": 1})
    assert run.continues_attempt("finetune", "checkpoints", {"rate": 1})
    with pytest.raises(OutputError, match=r"an unfinished finetune with other settings or inputs \(rate: 1 → 2\)"):
        run.continues_attempt("finetune", "checkpoints", {"rate": 2})
    assert not Run(local, overwrite=True).continues_attempt("finetune", "checkpoints", {"rate": 2})
    run.note_attempt("checkpoints", {"rate": 1}, binding=False)
    assert not run.continues_attempt("finetune", "checkpoints", {"rate": 2})
    assert run.continues_attempt("finetune", "checkpoints", {"rate": 1})
