"""One owner at a time of a run folder: a file or object with a heartbeat.

Stores and shared file systems have no lock that all of them share, so an owner writes its lease, waits, and reads it back: of
two that come at the same moment the later writer stays. One whose write was delayed for longer than that wait can still come
second to an owner that has begun; then the first one finds another's name in the lease at its next heartbeat, at most
`BEAT_SECONDS` later, and ends. The age of a heartbeat is told by the clock of the store or file system alone, where it has one.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from ray_ensemble.errors import InputError, RunError
from ray_ensemble.storage.store import Stored

LEASE = "lease.json"
BEAT_SECONDS = 10.0
SETTLE_SECONDS = 2.0
LOCAL_SETTLE_SECONDS = 0.5  # in a folder: a write is seen by others once it is renamed
_LOOKS = (0.0, 0.5, 1.0)  # seconds before each look for a lease that seems to have gone
_NANOSECOND = 1e-9
_HELD: set[str] = set()  # ids of the leases that this process holds


class Place(Protocol):
    """Where a lease lies: a `Store`, or a `LocalFolder`."""

    def where(self, name: str) -> str:
        """The place, or something there, as messages name it."""

    def about(self, name: str) -> Stored | None:
        """Size and time of what has this name, or None."""

    def read(self, name: str) -> bytes | None:
        """Its bytes, or None."""

    def write(self, name: str, data: bytes) -> None:
        """Put bytes under a name, whole or not at all."""

    def delete(self, names: Iterable[str]) -> None:
        """Delete what has these names, where there is any."""


class Lease:
    """The lease of a run folder.

    Args:
        store: of the run folder.
        started: tells when a process of this machine started, None for one that does not run.
        expires: seconds without a heartbeat after which another run may take over.
        beat: seconds between heartbeats; `BEAT_SECONDS` by default.
        settle: seconds between writing the lease and reading it back; `SETTLE_SECONDS` by default.
    """

    def __init__(
        self,
        store: Place,
        started: Callable[[int], str | None],
        *,
        expires: float,
        beat: float | None = None,
        settle: float | None = None,
    ) -> None:
        self._store, self._started = store, started
        self._expires = expires
        self._beat = BEAT_SECONDS if beat is None else beat
        self._settle = SETTLE_SECONDS if settle is None else settle
        self._id = uuid.uuid4().hex
        self._owner = {
            "id": self._id,
            "host": socket.gethostname(),
            "machine": _machine(),
            "pid": os.getpid(),
            "started": started(os.getpid()),
        }
        self._lost: str | None = None
        self._own = threading.Lock()  # nobody looks while the heartbeat is written

    @contextmanager
    def held(self) -> Iterator[None]:
        """Own the folder within the block.

        Raises:
            InputError: another living run owns it, or nothing can be written there.
            RunError: another run took the folder over, which it may after 60 s without a heartbeat.
        """
        self._refuse_living_owner()
        self._write()
        time.sleep(self._settle)
        held = self._read()
        if held is None or held.get("id") != self._id:
            raise InputError(self._refusal(held or {}, "it came at the same moment"))
        _HELD.add(self._id)
        stop = threading.Event()
        interrupts = threading.current_thread() is threading.main_thread()
        thread = threading.Thread(target=self._keep, args=(stop, interrupts), daemon=True)
        thread.start()
        try:
            yield
        except KeyboardInterrupt:
            self._end_if_lost()
            raise
        finally:
            stop.set()
            thread.join()
            _HELD.discard(self._id)
            self._release()
        self._end_if_lost()

    def confirm(self) -> None:
        """Look whether the lease is still there, before something is changed.

        Raises:
            RunError: another run took the folder over, or the store does not answer.
        """
        with self._own:
            self._is_ours()
        self._end_if_lost()

    def _end_if_lost(self) -> None:
        if self._lost is not None:
            raise RunError(self._lost)

    def _is_ours(self) -> bool:
        """Whether the lease is this one; it is not once it was another's."""
        if self._lost is not None:
            return False
        for pause in _LOOKS:
            time.sleep(pause)
            held = self._read()
            if held is not None:  # a store that moves objects into place may have none for a moment
                break
        if held is not None and held.get("id") == self._id:
            return True
        by = f"process {held.get('pid')} on {held.get('host')}" if held else "someone who removed the lease"
        self._lost = f"{self._store.where('')}: taken over by {by}; this run has ended and left the folder to it"
        return False

    def _release(self) -> None:
        try:
            held = self._read()
            if held is not None and held.get("id") == self._id:
                self._store.delete([LEASE])
        except (InputError, RunError) as error:  # it expires by itself
            print(error, flush=True)

    def _keep(self, stop: threading.Event, interrupts: bool) -> None:
        while not stop.wait(self._beat):
            try:
                with self._own:
                    if self._is_ours():
                        self._write()
                        continue
            except (InputError, RunError) as error:
                print(f"{error}; trying again", flush=True)
                continue
            while interrupts and not stop.is_set():
                # What it computes now could not be kept. A real signal, since it may be waiting for something; again, since a
                # library may have swallowed it.
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
                stop.wait(BEAT_SECONDS)
            return

    def _refuse_living_owner(self) -> None:
        clock = f"clock-{self._owner['id']}"
        self._store.write(clock, b"")  # what cannot be written is told before anything else
        now = self._store.about(clock)
        self._store.delete([clock])
        about, held = self._store.about(LEASE), self._read()
        if about is None or held is None:
            return
        ours = held.get("machine") == self._owner["machine"] is not None
        if ours and held.get("pid") == self._owner["pid"] and held.get("id") not in _HELD:
            return  # left by an earlier run of this process
        try:
            age = time.time() - float(held["heartbeat"])
        except (KeyError, TypeError, ValueError):
            return  # a lease without a heartbeat has no living owner
        if now is not None and now.written is not None and about.written is not None:
            age = (now.written - about.written) * _NANOSECOND
        alive = self._started(int(held["pid"])) == held["started"] if ours else age < self._expires
        if alive:
            raise InputError(self._refusal(held, f"heartbeat {max(0.0, age):.0f} s ago"))

    def _refusal(self, held: dict[str, Any], why: str) -> str:
        return (
            f"{self._store.where('')}: another run owns this folder (process {held.get('pid')} on {held.get('host')}, {why}); "
            "wait for it or choose another folder"
        )

    def _write(self) -> None:
        # Whole seconds, so that all heartbeats have one length: a reader that asks for the length first must not get half of one.
        self._store.write(LEASE, json.dumps({**self._owner, "heartbeat": int(time.time())}, indent=2).encode())

    def _read(self) -> dict[str, Any] | None:
        """The lease that is there. One that cannot be read is looked at again: another length may just have taken its place."""
        for pause in _LOOKS:
            time.sleep(pause)
            data = self._store.read(LEASE)
            if data is None:
                return None
            try:
                held = json.loads(data)
            except ValueError:
                continue
            return held if isinstance(held, dict) else None
        return None


def _machine() -> str | None:
    """What tells processes that can see each other's numbers: one boot of one kernel, and one namespace of processes."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return None
