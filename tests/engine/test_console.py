"""What a driver shows of the lines that Ray hands it: its own workers' and the news of nodes, each once."""

import logging
from typing import Any

import pytest

from davir_ray.engine import console
from davir_ray.engine.console import LogStream, WorkerLines

WARNING, INFO = "davir_ray|WARNING|low on memory", "davir_ray|INFO|score: an actor is ready"


def batch(*lines: str, pid: object = 7, ip: str = "10.0.0.1") -> dict[str, Any]:
    """As Ray's log monitor sends it."""
    return {"lines": list(lines), "pid": pid, "ip": ip, "localhost": "10.0.0.1", "actor_name": "MapWorker"}


@pytest.fixture
def shown(caplog: pytest.LogCaptureFixture) -> Any:
    caplog.set_level(logging.INFO, logger="davir_ray")
    return lambda: [(record.levelname, record.getMessage()) for record in caplog.records]


def test_lines_of_workers_are_shown_once_and_other_lines_are_not(shown: Any) -> None:
    lines = WorkerLines()
    lines(batch(WARNING, INFO, "Traceback of a library", "[10:00:00 E 1 1] core_worker.cc: noise"))
    lines(batch(WARNING, INFO, pid=8))
    assert shown() == [("WARNING", "low on memory"), ("INFO", "score: an actor is ready")]


def test_a_warning_of_another_node_says_which(shown: Any) -> None:
    WorkerLines()(batch(WARNING, INFO, ip="10.0.0.2"))
    assert shown() == [("WARNING", "low on memory (node 10.0.0.2)"), ("INFO", "score: an actor is ready")]


def test_a_terminal_has_bars_instead_of_news(shown: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setattr(console, "filter_autoscaler_events", iter)  # Ray's asks the cluster how it writes them
    lines = WorkerLines()
    lines(batch(INFO, WARNING))
    lines(batch("2 workers were killed: out of memory", pid="raylet"))
    lines(batch("Resized to 4 CPUs.", "Error: no node of 8 GPUs.", pid="autoscaler"))
    told = [message for level, message in shown() if level == "WARNING"]
    assert told == ["low on memory", "2 workers were killed: out of memory", "Error: no node of 8 GPUs."]
    assert [level for level, _ in shown()] == ["WARNING"] * 3


def test_debug_shows_every_line_and_whose_it_is(shown: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="davir_ray")
    lines = WorkerLines()
    lines(batch("a print", INFO))
    lines(batch("a print", ip="10.0.0.2"))
    assert shown() == [
        ("DEBUG", "(MapWorker pid=7) a print"),
        ("INFO", "(MapWorker pid=7) score: an actor is ready"),
        ("DEBUG", "(MapWorker pid=7, node 10.0.0.2) a print"),
    ]


def test_what_is_printed_is_logged_line_by_line(shown: Any) -> None:
    stream = LogStream()
    print("a worker", end="", file=stream)
    print(" died\n\nanother", file=stream)
    print("(raylet) WARNING: 8 PYTHON worker processes have been started on node: 04, which is 4x the …", file=stream)
    assert shown() == [("WARNING", "a worker died"), ("WARNING", "another")]
