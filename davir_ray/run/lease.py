"""One driver a run: a lease in the output names who writes there, and a heartbeat shows that it lives.

On the same machine a process that is gone is known at once. Elsewhere clocks differ, so nobody compares times: who
finds a lease watches whether its heartbeat moves.

A driver that finds a lease never writes over it while its heartbeat moves. Of drivers that begin at the same moment one
goes on: where the store refuses to create a file twice, because it does; elsewhere because the last to write wins, and
all read again when every write that may still count has ended. A write that took longer than that, to take the lease or
to renew it, is taken back: the driver that holds the run writes its own again at its next heartbeat. Not covered is a
store that does a write after its client gave it up; the heartbeat then ends one of the two within BEAT_S.
"""

import _thread
import json
import logging
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from davir_ray.errors import OutputError, StorageError
from davir_ray.run.access import translated
from davir_ray.run.location import Location
from davir_ray.run.storage_errors import explain

log = logging.getLogger(__name__)

LEASE_FILE = "lease.json"

BEAT_S = 10.0
"""Seconds between heartbeats."""

MISSED_BEATS = 4
"""After so many of them without a change the holder counts as dead."""

_SETTLE_S = 1.0
"""From seeing no lease to having written one takes at most this long, or the write does not count; so long after that a
driver sees whose the lease is.
"""


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Who has the lease. A lease that cannot be read has a holder without a name."""

    token: str = ""
    host: str = "?"
    machine: str = "?"
    """Boot and process namespace: only there do process ids mean the same processes."""
    pid: int = 0
    process_started: float = 0.0
    """Start of the process, seconds since the epoch: process ids are used again."""
    since: str = "?"
    beat: int = 0

    @classmethod
    def of_this_process(cls) -> Self:
        """A new holder: this process."""
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
        """The holder of a lease; None if there is no lease."""
        try:
            return cls(**json.loads(place.read_bytes()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):  # torn, or somebody else's
            return cls()

    def is_dead(self) -> bool:
        """Whether it was a process of this machine that is gone; false where that cannot be known."""
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
    """Holds a run's lease while its block runs. OutputError if another driver has it, or takes it."""

    def __init__(self, run: Location) -> None:
        self._place = run / LEASE_FILE
        self._holder = Holder.of_this_process()
        self._ended = threading.Event()
        self._lost_to: str | None = None
        self._heart = threading.Thread(target=self._beat, name="lease", daemon=True)

    def __enter__(self) -> Self:
        with translated(self._place, OutputError):
            self._acquire()
        self._heart.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        self._heart.join()
        if self._lost_to is not None:
            raise OutputError(f"{self._place.parent} was taken over by {self._lost_to}; this run ends here") from error
        with suppress(StorageError):  # the heartbeat of a lease that stays behind does not move
            if self._is_ours():
                self._place.remove()

    def _acquire(self) -> None:
        taken_over = False
        while True:
            begun = time.monotonic()
            holder = Holder.read(self._place)
            if holder is not None and holder.token != self._holder.token:
                if not holder.is_dead():
                    self._wait_for_end_of(holder)
                taken_over, begun = True, time.monotonic()
                if Holder.read(self._place) != holder:  # another was faster, or the holder has ended
                    continue
                log.warning("taking over the run from %s, which is gone", holder)
                self._place.remove()
            # Where the store's answer was lost and the request repeated, the lease that is there is our own.
            if not self._place.create(self._content()) and not self._is_ours():
                continue
            if self._place.is_local and not taken_over:  # no disk creates a file twice, but not every store refuses to
                return
            if time.monotonic() - begun <= _SETTLE_S:
                time.sleep(_SETTLE_S)
                now = Holder.read(self._place)
                if now is not None and now.token != self._holder.token:
                    raise _refusal(self._place, now)
                if now is not None:
                    return
            elif not taken_over and not self._place.create(self._content()) and self._is_ours():
                return  # this store does refuse to create a file twice
            self._take_back()
            taken_over = False

    def _take_back(self) -> None:
        """Remove what was written too late, and leave who may have held the lease the time to write it again."""
        log.warning("the lease %s was written too slowly to tell whose it is; trying again", self._place)
        if self._is_ours():
            self._place.remove()
        time.sleep(BEAT_S + _SETTLE_S)

    def _wait_for_end_of(self, holder: Holder) -> None:
        """Return when its heartbeat stood still for so long that it must be dead. OutputError when it moves."""
        if holder.is_here():
            raise _refusal(self._place, holder)
        patience = BEAT_S * MISSED_BEATS
        log.warning("%s has the run; waiting up to %g s for its heartbeat", holder, patience)
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            time.sleep(min(1.0, BEAT_S / 2))
            now = Holder.read(self._place)
            if now is None:
                return
            if now != holder:
                raise _refusal(self._place, now)

    def _beat(self) -> None:
        renewed, trouble = time.monotonic(), ""
        while not self._ended.wait(BEAT_S):
            begun = time.monotonic()
            if _is_overdue(renewed):
                self._lose(f"a driver that may take it for dead: its heartbeat failed: {trouble}")
                return
            try:
                found = Holder.read(self._place)
                if found is not None and found.token != self._holder.token:
                    self._lose(str(found))
                    return
                seen = time.monotonic()
                self._holder = replace(self._holder, beat=self._holder.beat + 1)
                self._place.write_bytes(self._content())
                # A driver that took the lease since it was seen to be ours sees this write before it has settled, and
                # leaves; after that time it may work already.
                if _is_overdue(renewed) and time.monotonic() - seen > _SETTLE_S:
                    self._place.remove()
                    self._lose("a driver that may take it for dead: its heartbeat came too late")
                    return
                renewed = begun
            except Exception as error:  # noqa: BLE001  # whatever the store's library raises: it may be back at the next beat
                trouble = explain(error, self._place)
                log.warning("the lease %s could not be renewed: %s", self._place, trouble)

    def _lose(self, to: str) -> None:
        self._lost_to = to
        _thread.interrupt_main()

    def _is_ours(self) -> bool:
        holder = Holder.read(self._place)
        return holder is not None and holder.token == self._holder.token

    def _content(self) -> bytes:
        return json.dumps(asdict(self._holder)).encode()


def _is_overdue(renewed: float) -> bool:
    """Whether another driver may by now have seen a heartbeat stand still that was last written then."""
    return time.monotonic() - renewed > BEAT_S * (MISSED_BEATS - 1)


def _refusal(place: Location, holder: Holder) -> OutputError:
    return OutputError(f"{place.parent} is being written by {holder}; wait for it, stop it, or choose another --output")
