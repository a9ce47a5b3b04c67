"""One driver per run: a lease in the output names the process that writes there; a heartbeat shows that it is alive.

On the same machine a dead process is recognised at once. Clocks of different machines differ, so times are never
compared: a driver that finds another machine's lease watches whether its heartbeat changes, and never overwrites the
lease while it does.

If several drivers start at the same moment, one continues. Where the store refuses to create a file twice, that is the
first to create the lease. Elsewhere it is the last to write it: every driver waits as long as a write may take (see
_SETTLE_S), then looks whose lease is there. A write of a new lease or of a heartbeat that took longer is undone; the
driver that holds the run writes its own lease again at its next heartbeat. One case is not covered: a store that
carries out a write after its client gave up on it. The heartbeat then ends one of the two drivers within BEAT_S.
"""

import hashlib
import json
import logging
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import psutil

from davir_ray.errors import OutputError, StorageError
from davir_ray.run.location import Location, file_info
from davir_ray.run.storage_errors import CONTINUES, explain, user_errors

log = logging.getLogger(__name__)

LEASE_FILE = "lease.json"

BEAT_S = 10.0
"""Seconds between heartbeats."""

MISSED_BEATS = 4
"""Number of missed heartbeats after which the holder counts as dead."""

_SETTLE_S = 1.0
"""Seconds in which a driver that sees no lease must write its own; a slower write does not count. The driver then waits
as long again and looks whose lease is there."""


@dataclass(frozen=True, kw_only=True)
class Holder:
    """The process that holds the lease. For a lease that cannot be read, all fields have their defaults."""

    token: str = ""
    host: str = "?"
    machine: str = "?"
    """Boot id and process namespace, within which a process id names one process."""
    pid: int = 0
    process_started: float = 0.0
    """Start of the process in seconds since the epoch: process ids are reused."""
    since: str = "?"
    """Time in UTC when the lease was taken."""
    beat: int = 0
    """Number of heartbeats so far."""

    @classmethod
    def of_this_process(cls) -> Self:
        """A new holder for this process."""
        process = psutil.Process()
        return cls(
            token=uuid.uuid4().hex,
            host=socket.gethostname(),
            machine=_machine(),
            pid=process.pid,
            process_started=process.create_time(),
            since=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    @classmethod
    def read(cls, place: Location) -> Self | None:
        """The holder in a lease file; None if there is no file."""
        try:
            return cls(**json.loads(place.read_bytes()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):  # half-written, or not written by us
            return cls()

    def is_dead(self) -> bool:
        """Whether it was a process of this machine and has ended; false for a process of another machine."""
        if not self.is_here():
            return False
        try:
            return bool(abs(psutil.Process(self.pid).create_time() - self.process_started) > 1)
        except psutil.NoSuchProcess:
            return True

    def is_here(self) -> bool:
        """Whether it is a process of this machine, dead or alive."""
        return self.machine == _machine()

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


def _machine() -> str:
    parts = ["/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"]
    with suppress(OSError):
        return f"{Path(parts[0]).read_text().strip()} {os.readlink(parts[1])}"
    return f"{socket.gethostname()} {int(psutil.boot_time())}"


class Lease:
    """Context manager that holds a run's lease; raises OutputError if another driver holds it or takes it over.

    Its value is what is in the folder of the run, by name, listed when the lease was this driver's.
    """

    def __init__(self, run: Location) -> None:
        self._place = run / LEASE_FILE
        self._holder = Holder.of_this_process()
        self._ended = threading.Event()
        self._loss: str | None = None
        self._ignores_interrupts = False
        self._heart = threading.Thread(target=self._beat, name="lease", daemon=True)

    def __enter__(self) -> dict[str, dict[str, Any]]:
        try:
            with user_errors(self._place, OutputError):
                there = self._acquire()
        except BaseException:
            with suppress(StorageError):  # a refusal leaves the lease of another alone
                if self._is_ours():
                    self._place.remove_file()
            raise
        # A shell script's background process ignores SIGINT, and with it the interrupt that a loss causes.
        is_main = threading.current_thread() is threading.main_thread()
        self._ignores_interrupts = is_main and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        if self._ignores_interrupts:
            signal.signal(signal.SIGINT, self._stop_if_lost)
        self._heart.start()
        return there

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        self._ended.set()
        self._heart.join()
        if self._ignores_interrupts:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        if self._loss is not None:
            raise OutputError(f"{self._place.parent} {self._loss}; this run ends here. {CONTINUES}") from error
        with suppress(StorageError):  # a lease that is left behind has no heartbeat
            if self._is_ours():
                self._place.remove_file()

    def _acquire(self) -> dict[str, dict[str, Any]]:
        """Write the lease, after waiting for another holder to be dead; raises OutputError if it is alive or faster.

        Returns what is in the folder of the run.
        """
        taken_over = False
        while True:
            begun = time.monotonic()
            holder = Holder.read(self._place)
            if holder is not None and holder.token != self._holder.token:
                if not holder.is_dead():
                    self._wait_for_end_of(holder)
                taken_over, begun = True, time.monotonic()
                if Holder.read(self._place) != holder:  # another driver was faster, or the holder has ended
                    continue
                log.warning("taking over the run from %s, which has died", holder)
                self._place.remove_file()
            # If the store's answer was lost and the request repeated, the lease that exists is our own.
            if not self._place.create(self._content()) and not self._is_ours():
                continue
            if self._place.is_local and not taken_over:  # a disk never creates a file twice; a store may
                return self._place.parent.entries()
            if time.monotonic() - begun <= _SETTLE_S:
                time.sleep(_SETTLE_S)
                there = self._place.parent.entries()
                now = self._holder if self._shown_by(there) else Holder.read(self._place)
                if now is not None and now.token != self._holder.token:
                    raise _refusal(self._place, now)
                if now is not None and LEASE_FILE in there:  # else the listing is not up to date
                    return there
            elif not taken_over and not self._place.create(self._content()) and self._is_ours():
                return self._place.parent.entries()  # this store refuses to create a file twice
            self._undo()
            taken_over = False

    def _undo(self) -> None:
        """Remove a lease that was written too late, and wait long enough for its holder to write its own again."""
        log.warning("writing the lease %s took too long to know who holds it; trying again", self._place)
        if self._is_ours():
            self._place.remove_file()
        time.sleep(BEAT_S + _SETTLE_S)

    def _wait_for_end_of(self, holder: Holder) -> None:
        """Return once the holder counts as dead; raises OutputError if its heartbeat changes."""
        if holder.is_here():
            raise _refusal(self._place, holder)
        patience = BEAT_S * MISSED_BEATS
        log.warning("%s holds the run; waiting up to %g s for its heartbeat", holder, patience)
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            time.sleep(min(1.0, BEAT_S / 2))
            now = Holder.read(self._place)
            if now is None:
                return
            if now != holder:
                raise _refusal(self._place, now)

    def _beat(self) -> None:
        renewed, problem = time.monotonic(), "the store did not answer in time"
        while not self._ended.wait(BEAT_S):
            begun = time.monotonic()
            if _is_overdue(renewed):
                self._lose(f"may have been taken over by another driver, because the heartbeat failed: {problem}")
                return
            try:
                found = Holder.read(self._place)
                if found is not None and found.token != self._holder.token:
                    self._lose(f"was taken over by {found}")
                    return
                seen = time.monotonic()
                self._holder = replace(self._holder, beat=self._holder.beat + 1)
                self._place.write_bytes(self._content())
                # A driver that took the lease after we read it sees this write within _SETTLE_S, and gives up. If our
                # write came later, that driver may be at work already.
                if _is_overdue(renewed) and time.monotonic() - seen > _SETTLE_S:
                    self._place.remove_file()
                    self._lose("may have been taken over by another driver, because the heartbeat came too late")
                    return
                renewed = begun
            except Exception as error:  # noqa: BLE001  # of any store's library; the next heartbeat tries again
                problem = explain(error, self._place)
                log.warning("the lease %s could not be renewed: %s", self._place, problem)

    def _lose(self, how: str) -> None:
        self._loss = how
        # A signal to the thread itself, which ends a wait; _thread.interrupt_main would take effect only after it. One
        # that comes just before a wait begins does not end it, so it is repeated.
        while not self._ended.is_set():
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            self._ended.wait(BEAT_S)

    def _stop_if_lost(self, *_signal: object) -> None:
        if self._loss is not None:
            raise KeyboardInterrupt

    def _is_ours(self) -> bool:
        holder = Holder.read(self._place)
        return holder is not None and holder.token == self._holder.token

    def _shown_by(self, there: Mapping[str, Mapping[str, Any]]) -> bool:
        """Whether a listing of the folder shows that the lease is ours.

        S3's etag of a small file is the MD5 of its content, except under some encryptions: then the lease must be read.
        """
        content = hashlib.md5(self._content(), usedforsecurity=False).hexdigest()
        return LEASE_FILE in there and file_info(there[LEASE_FILE]).mark == content

    def _content(self) -> bytes:
        return json.dumps(asdict(self._holder)).encode()


def _is_overdue(renewed: float) -> bool:
    """Whether another driver may take this one for dead, whose last heartbeat was written at `renewed`."""
    return time.monotonic() - renewed > BEAT_S * (MISSED_BEATS - 1)


def _refusal(place: Location, holder: Holder) -> OutputError:
    return OutputError(f"{place.parent} is being written by {holder}; wait for it, stop it, or choose another --output")
