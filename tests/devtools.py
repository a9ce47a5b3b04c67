"""Chromium through its DevTools protocol, over a pipe: a page opened for real, measured and photographed."""

import base64
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_OPTIONS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-pipe",
]  # fmt: skip
# Chromium reads commands from descriptor 3 and writes answers and events to 4.
_WITH_PIPES = """
import fcntl, os, sys
pipes = [fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3]]
os.dup2(pipes[0], 3), os.dup2(pipes[1], 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


def chromium() -> str:
    """Debian's Chromium; only in CI is its absence a failure."""
    found = shutil.which("chromium")
    if found is None:
        if os.environ.get("CI"):
            pytest.fail("chromium is not installed, and CI must open the report in it")
        pytest.skip("chromium is not installed")
    return found


class Tab:
    """One page of the browser. `events` holds what Chromium told since the page was opened."""

    def __init__(self, commands: int, answers: int) -> None:
        self.events: list[dict[str, Any]] = []
        self._commands, self._answers = commands, answers
        self._buffer, self._session, self._number = b"", None, 0
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **arguments: Any) -> Any:
        """Give a command and wait for its answer."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": arguments}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._number:
            self.events.append(answer)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def open(self, page: Path, width: int, scheme: str) -> None:
        """Load a page at a width in CSS pixels, in the light or dark scheme, and wait until it is all there."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.events.clear()
        self.call("Page.navigate", url=page.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._read())

    def run(self, script: str) -> Any:
        """Value of an expression in the page."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def photograph(self, place: Path, whole: bool = True) -> None:
        """Write a PNG of the whole page, or of what is in sight."""
        data = self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
        place.write_bytes(base64.b64decode(data))

    def complaints(self) -> list[str]:
        """Console messages, uncaught errors and entries of the browser's log since the page was opened."""
        loud = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [json.dumps(event["params"]) for event in self.events if event.get("method") in loud]

    def requests(self) -> list[str]:
        """Addresses that were asked for since the page was opened, the page itself included."""
        sent = [event for event in self.events if event.get("method") == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in sent]

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            part = os.read(self._answers, 1 << 16)
            assert part, "chromium ended"
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found


@contextmanager
def browse(profile: Path) -> Iterator[Tab]:
    """A headless Chromium with a profile of its own, ended with the block."""
    theirs, commands = os.pipe()
    answers, mine = os.pipe()
    command = [
        sys.executable, "-c", _WITH_PIPES, str(theirs), str(mine), chromium(), *_OPTIONS, f"--user-data-dir={profile}"
    ]  # fmt: skip
    with subprocess.Popen(command, pass_fds=(theirs, mine), stderr=subprocess.DEVNULL) as process:
        os.close(theirs)
        os.close(mine)
        try:
            yield Tab(commands, answers)
        finally:
            os.close(commands)  # Chromium ends when the pipe does
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
            os.close(answers)
