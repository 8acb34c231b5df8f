"""Ray Train runs beside each other in threads that an interrupted caller does not wait for."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager

from ray_ensemble.runtime import kill_controllers, living_controllers, release_orphaned_groups

Call = Callable[[threading.Event], None]

_END_SECONDS = 10.0  # for the threads to see that their runs were ended


@contextmanager
def in_background(calls: Sequence[Call], at_once: int) -> Iterator[list[Future[None]]]:
    """Make calls of `TorchTrainer.fit` in threads, in their order and at most `at_once` at a time.

    An executor of the standard library waits for its threads when its block is left: for hours after Ctrl-C, since nothing
    interrupts `fit` outside the main thread. When this block is left by an exception, no further call is made, and the Ray Train
    runs that began in the block are ended with all their workers.

    Args:
        calls: what to do; each is given an event that is set when it is no longer to try again.
        at_once: threads at most.

    Returns:
        A future of every call.
    """
    futures: list[Future[None]] = [Future() for _ in calls]
    given_up = threading.Event()
    waiting = deque(zip(calls, futures, strict=True))
    before = living_controllers()
    for _ in range(min(at_once, len(calls))):
        threading.Thread(target=_call_all, args=(waiting, given_up), daemon=True).start()
    try:
        yield futures
    except BaseException:
        given_up.set()
        for future in futures:
            future.cancel()
        _end(futures, before)
        raise


def _call_all(waiting: deque[tuple[Call, Future[None]]], given_up: threading.Event) -> None:
    while True:
        try:
            call, future = waiting.popleft()
        except IndexError:
            return
        if not future.set_running_or_notify_cancel():
            continue
        try:
            call(given_up)
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(None)


def _end(futures: Sequence[Future[None]], before: set[str]) -> None:
    """End the runs; again and again, since one may only be about to start. Ray gives back what dead controllers hold if told."""
    deadline = time.monotonic() + _END_SECONDS
    while time.monotonic() < deadline:
        living = living_controllers() - before
        kill_controllers(living)
        release_orphaned_groups()
        if not wait(futures, timeout=0.2).not_done and not living:
            return
