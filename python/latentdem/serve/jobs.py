"""Work in a thread of its own: one job at a time, a few that wait, each can be stopped.

Nothing here knows the page: :mod:`latentdem.serve.tasks` says what a job does, and
:mod:`latentdem.serve.app` shows what :meth:`Job.watch` tells.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from latentdem.io import InputError

STATES = ("waiting", "running", "done", "cancelled", "late", "failed")
"""Of a job; the last four are final.  ``late``: over its limit of time."""


@dataclass(frozen=True)
class Limits:
    """What a visitor may ask for.

    Args:
        megapixels: of the largest picture, before it is shrunk.
        megabytes: of its file.
        seconds: that a request may compute; its time in the queue does not count.
        waiting: requests in the queue beside the one that computes.
        keep_minutes: uploads and results are deleted after so long.
    """

    megapixels: float = 24.0
    megabytes: float = 25.0
    seconds: float = 900.0
    waiting: int = 4
    keep_minutes: float = 60.0

    def __post_init__(self) -> None:
        for name in ("megapixels", "megabytes", "seconds", "keep_minutes"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, found {getattr(self, name)}")
        if self.waiting < 0:
            raise ValueError(f"waiting must be >= 0, found {self.waiting}")


class StoppedError(Exception):
    """Raised within the work of a job that was cancelled or is over its time."""


@dataclass(frozen=True)
class Snapshot:
    """A job as it stands.

    Args:
        state: one of :data:`STATES`.
        ahead: jobs before it, while it waits.
        seconds: since it began to compute.
        update: what the work reported last; None before it did.
        fresh: whether ``update`` is another one than in the snapshot before.
        stopping: whether it was told to stop, and has not yet.
        result: what the work returned, when it is done.
        message: why it failed, in one line.
    """

    state: str
    ahead: int = 0
    seconds: float = 0.0
    update: Any = None
    fresh: bool = False
    stopping: bool = False
    result: Any = None
    message: str = ""

    @property
    def final(self) -> bool:
        """Whether nothing more will happen."""
        return self.state in STATES[2:]


class Job:
    """One piece of work; made by :meth:`Worker.submit`."""

    def __init__(self, worker: Worker, work: Callable[[Job], Any], seconds: float) -> None:
        self._worker, self._work, self._limit = worker, work, seconds
        self._changed = worker._changed
        self._state, self._message = "waiting", ""
        self._update: Any = None
        self._result: Any = None
        self._version = 0
        self._started = self._ended = 0.0
        self._cancelled = False

    def cancel(self) -> None:
        """Stop: at once if it waits, else at the work's next report."""
        with self._changed:
            self._cancelled = True
            if self._state == "waiting":
                self._worker._forget(self)
                self._state = "cancelled"
            self._changed.notify_all()

    def check(self) -> None:
        """To be called by the work every now and then.

        Raises:
            StoppedError: the job was cancelled, or is over its time.
        """
        if self._cancelled or self._late():
            raise StoppedError

    def report(self, update: Any) -> None:
        """Publish how far the work is; :meth:`check` included."""
        self.check()
        with self._changed:
            self._update = update
            self._version += 1
            self._changed.notify_all()

    def watch(self, every: float = 1.0, *, least: float = 0.0) -> Iterator[Snapshot]:
        """Snapshots at every change and every ``every`` seconds, the last one final.

        Of updates that come faster than they are taken, or than every ``least`` seconds, only the
        newest is seen.
        """
        seen = 0
        while True:
            with self._changed:
                snapshot = self._snapshot(seen)
                seen = self._version
            yield snapshot
            if snapshot.final:
                return
            with self._changed:
                self._changed.wait_for(lambda: self._state in STATES[2:], least)
                self._changed.wait_for(partial(self._differs, snapshot, seen), every)

    def _late(self) -> bool:
        return self._started > 0 and time.monotonic() - self._started > self._limit

    def _differs(self, before: Snapshot, seen: int) -> bool:
        """Whether there is something to tell, after ``before`` and the update ``seen``."""
        now = self._snapshot(seen)
        told = (before.state, before.ahead, before.stopping)
        return now.fresh or (now.state, now.ahead, now.stopping) != told

    def _snapshot(self, seen: int) -> Snapshot:
        running = self._state == "running"
        end = self._ended or time.monotonic()
        return Snapshot(
            state=self._state,
            ahead=self._worker._ahead(self) if self._state == "waiting" else 0,
            seconds=end - self._started if self._started else 0.0,
            update=self._update,
            fresh=self._version != seen,
            stopping=running and (self._cancelled or self._late()),
            result=self._result,
            message=self._message,
        )

    def _run(self) -> None:
        """In the worker's thread."""
        result, state, message = None, "done", ""
        try:
            result = self._work(self)
        except StoppedError:
            state = "cancelled" if self._cancelled else "late"
        except (ValueError, FileNotFoundError) as error:
            state, message = "failed", str(error)
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            state = "failed"
            message = f"{type(error).__name__}: {error or 'no details'}; the terminal says more"
        with self._changed:
            self._state, self._result, self._message = state, result, message
            self._ended = time.monotonic()
            self._changed.notify_all()


class Worker:
    """One thread that does jobs in their order.

    Args:
        waiting: jobs that may wait beside the one that runs.

    >>> worker = Worker(waiting=1)
    >>> job = worker.submit(lambda job: 6 * 7, seconds=10)
    >>> list(job.watch())[-1].result
    42
    >>> worker.close()
    """

    def __init__(self, waiting: int) -> None:
        self.waiting = waiting
        self._changed = threading.Condition()
        self._queue: deque[Job] = deque()
        self._current: Job | None = None
        self._closed = False
        # A daemon: whoever ends the program does not wait for a step to end.
        self._thread = threading.Thread(target=self._loop, name="latentdem-serve", daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[Job], Any], seconds: float) -> Job:
        """Queue ``work``, which gets its job, and may compute for ``seconds``.

        Raises:
            InputError: too many wait already.
        """
        with self._changed:
            if self._closed:
                raise InputError("the server is stopping")
            if len(self._queue) + (self._current is not None) > self.waiting:
                raise InputError(
                    f"the queue is full ({self.waiting} waiting); try again in a few minutes"
                )
            job = Job(self, work, seconds)
            self._queue.append(job)
            self._changed.notify_all()
            return job

    def close(self, seconds: float = 3.0) -> None:
        """Cancel all jobs, and wait a little for the one that runs."""
        with self._changed:
            self._closed = True
            for job in [*self._queue, *([] if self._current is None else [self._current])]:
                job.cancel()
            self._changed.notify_all()
        self._thread.join(seconds)

    def _loop(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closed)
                if self._closed:
                    return
                job = self._current = self._queue.popleft()
                job._state, job._started = "running", time.monotonic()
                self._changed.notify_all()
            job._run()
            with self._changed:
                self._current = None
                self._changed.notify_all()

    def _ahead(self, job: Job) -> int:
        return self._queue.index(job) + (self._current is not None)

    def _forget(self, job: Job) -> None:
        self._queue.remove(job)
