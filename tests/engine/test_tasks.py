"""Plain tasks: every result once, in which order and how many at a time, and what ends them."""

import os
import signal
import time
from contextlib import closing
from pathlib import Path

import pytest
import ray
import ray.data

from davir_ray.engine.tasks import call, each_in_tasks, in_tasks, results_of
from davir_ray.errors import DataError, ProgressError

pytestmark = pytest.mark.usefixtures("ray_session")


def test_every_item_is_done_once_and_no_more_than_asked_for_at_a_time(tmp_path: Path) -> None:
    def work(item: int) -> int:
        mark = tmp_path / f"running-{item}"
        mark.touch()
        (tmp_path / f"seen-{item}").write_text(str(len(list(tmp_path.glob("running-*")))))
        time.sleep(0.05)
        mark.unlink()
        return item * item

    found = list(in_tasks(work, range(9), at_once=2))
    assert sorted(found) == [(item, item * item) for item in range(9)]
    assert max(int((tmp_path / f"seen-{item}").read_text()) for item in range(9)) <= 2


@pytest.mark.parametrize("worthwhile", [True, False])
@pytest.mark.parametrize("num_items", [0, 1, 7])
def test_groups_give_their_results_in_order(worthwhile: bool, num_items: int) -> None:
    here = os.getpid()
    found = each_in_tasks(lambda item: (item, os.getpid() == here), range(num_items), per_task=3, worthwhile=worthwhile)
    assert found == [(item, not worthwhile) for item in range(num_items)]


def test_an_error_of_a_task_is_raised_as_itself(tmp_path: Path) -> None:
    def work(item: int) -> None:
        if item == 3:
            raise DataError("row 3 is bad")
        (tmp_path / str(item)).touch()
        time.sleep(0.2)

    with pytest.raises(DataError, match=r"^row 3 is bad$"), closing(in_tasks(work, range(200), at_once=2)) as results:
        list(results)
    assert len(list(tmp_path.iterdir())) < 20, "what had not begun is not begun"


def test_a_task_whose_worker_dies_is_done_again(tmp_path: Path) -> None:
    def work(item: int) -> int:
        if item == 1 and not (tmp_path / "died").exists():
            (tmp_path / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return item

    assert sorted(in_tasks(work, range(3))) == [(0, 0), (1, 1), (2, 2)]
    assert (tmp_path / "died").exists()


def test_tasks_of_which_none_ends_are_given_up_and_cancelled(tmp_path: Path) -> None:
    def hang(item: int) -> None:
        (tmp_path / f"{item}.pid").write_text(str(os.getpid()))
        try:
            for _ in range(600):
                time.sleep(0.1)
        finally:
            (tmp_path / f"{item}.ended").touch()

    context = ray.data.DataContext.get_current().copy()
    context.execution_no_progress_timeout_s = 3
    job = ray.put(hang)
    with ray.data.DataContext.current(context), pytest.raises(ProgressError, match="1 are left"):
        list(results_of([call.remote(job, 0)]))
    deadline = time.monotonic() + 300
    while (tmp_path / "0.pid").exists() and not (tmp_path / "0.ended").exists():
        assert time.monotonic() < deadline, "it goes on"
        time.sleep(0.1)


def test_who_closes_the_results_begins_no_more_tasks(tmp_path: Path) -> None:
    def work(item: int) -> int:
        (tmp_path / str(item)).touch()
        time.sleep(0.2)
        return item

    with closing(in_tasks(work, range(100), at_once=2)) as results:
        next(results)
    num_begun = len(list(tmp_path.iterdir()))
    time.sleep(1)
    assert len(list(tmp_path.iterdir())) <= num_begun + 2
    assert num_begun < 10
