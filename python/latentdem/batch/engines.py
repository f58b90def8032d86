"""Engines: where workers run.  The driver sees a queue; results do not depend on the engine."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

from latentdem.batch.worker import Outcome, Setup, Task, Worker
from latentdem.io import InputError

START_SECONDS = 600.0
"""A prior of gigabytes on a network's disk takes a while."""


class WorkerLost(Exception):
    """The worker that held a task died: killed, out of memory, or its machine went away."""


class Engine(Protocol):
    """What the driver asks of an engine.

    Attributes:
        slots: tasks that it takes at once; each worker holds :attr:`Setup.depth`.
        shares_disk: whether workers see the driver's output folder.
    """

    slots: int
    shares_disk: bool

    def submit(self, task: Task) -> Future[Outcome]:
        """Give a task to a worker; the future raises :class:`WorkerLost` if that dies.

        Raises:
            InputError: there is no worker any more, and none can be started.
        """

    def close(self) -> None:
        """Stop at once; tasks that are going on are given up."""


class LocalEngine:
    """One worker in this process: threads decode and encode beside it."""

    shares_disk = True

    def __init__(self, setup: Setup) -> None:
        self.slots = setup.depth
        self._worker = Worker(setup)
        self._threads = ThreadPoolExecutor(setup.depth, "stage")

    def submit(self, task: Task) -> Future[Outcome]:
        """See :class:`Engine`."""
        return self._threads.submit(self._worker.run, task)

    def close(self) -> None:
        """See :class:`Engine`; waits for the step that is being computed."""
        self._worker.stop()
        self._threads.shutdown(wait=True, cancel_futures=True)


@dataclass
class Seat:
    """A worker's place in a pool.

    Args:
        index: of its setup.
        held: tasks that it was given and has not answered.
        alive: not, once it has died; the next task has another one started.
    """

    index: int
    held: int = 0
    alive: bool = True
    details: Any = field(default=None)


class Pool:
    """What process and Ray engines share: the least busy worker gets a task, the dead are replaced.

    Subclasses start workers in :meth:`_start` and give tasks away in :meth:`_send`, which calls
    :meth:`_answered` in any thread.
    """

    shares_disk = True

    def __init__(self, setups: Sequence[Setup]) -> None:
        self.slots = sum(setup.depth for setup in setups)
        self._setups = list(setups)
        self._lock = threading.Lock()
        self._seats = [Seat(index) for index in range(len(setups))]

    def _start(self, seat: Seat) -> None:
        """Start a worker and return without waiting for it."""
        raise NotImplementedError

    def _wait(self, seat: Seat) -> None:
        """Return when a worker is ready; InputError if it cannot be."""
        raise NotImplementedError

    def _send(self, seat: Seat, task: Task, future: Future[Outcome]) -> None:
        raise NotImplementedError

    def _start_all(self) -> None:
        for seat in self._seats:
            self._start(seat)
        for seat in self._seats:
            self._wait(seat)

    def submit(self, task: Task) -> Future[Outcome]:
        """See :class:`Engine`."""
        for seat in [seat for seat in self._seats if not seat.alive]:
            fresh = Seat(seat.index)
            self._start(fresh)
            self._seats[seat.index] = fresh
            self._wait(fresh)
        with self._lock:
            seat = min(self._seats, key=lambda seat: seat.held)
            seat.held += 1
        future: Future[Outcome] = Future()
        self._send(seat, task, future)
        return future

    def _answered(
        self, seat: Seat, future: Future[Outcome], answer: Outcome | BaseException
    ) -> None:
        with self._lock:
            seat.held -= 1
            if isinstance(answer, WorkerLost):
                seat.alive = False
        if isinstance(answer, BaseException):
            future.set_exception(answer)
        else:
            future.set_result(answer)


@dataclass
class _Child:
    process: BaseProcess
    connection: Connection
    tasks: dict[int, Future[Outcome]] = field(default_factory=dict)
    sent: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


class ProcessEngine(Pool):
    """A process a worker on this machine, each with a prior of its own.

    Args:
        setups: one a worker.
    """

    def __init__(self, setups: Sequence[Setup]) -> None:
        super().__init__(setups)
        self._context = multiprocessing.get_context("spawn")
        try:
            self._start_all()
        except BaseException:
            self.close()
            raise

    def _start(self, seat: Seat) -> None:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=serve, args=(theirs, self._setups[seat.index]), daemon=True
        )
        process.start()
        theirs.close()  # else nobody would see that the worker is gone
        seat.details = _Child(process, ours)

    def _wait(self, seat: Seat) -> None:
        child: _Child = seat.details
        try:
            found = child.connection.recv() if child.connection.poll(START_SECONDS) else "too slow"
        except (EOFError, OSError):
            child.process.join()
            found = f"it ended with code {child.process.exitcode}, perhaps for want of memory"
        if found is not None:
            raise InputError(f"a worker could not start: {found}")
        threading.Thread(target=self._listen, args=(seat,), daemon=True).start()

    def _send(self, seat: Seat, task: Task, future: Future[Outcome]) -> None:
        child: _Child = seat.details
        with child.lock:
            number, child.sent = child.sent, child.sent + 1
            child.tasks[number] = future
        try:
            child.connection.send((number, task))
        except OSError:  # it died just now, and the listener may have emptied the list already
            self._lost(seat)

    def _listen(self, seat: Seat) -> None:
        child: _Child = seat.details
        while True:
            try:
                number, answer = child.connection.recv()
            except (EOFError, OSError):
                break
            with child.lock:
                future = child.tasks.pop(number)
            self._answered(seat, future, answer)
        self._lost(seat)

    def _lost(self, seat: Seat) -> None:
        child: _Child = seat.details
        child.process.join()
        with child.lock:
            tasks, child.tasks = list(child.tasks.values()), {}
        with self._lock:
            seat.alive = False
        lost = f"process {child.process.pid} ended with code {child.process.exitcode}"
        for future in tasks:
            self._answered(seat, future, WorkerLost(lost))

    def close(self) -> None:
        """See :class:`Engine`."""
        for seat in self._seats:
            if seat.details is not None:
                child: _Child = seat.details
                child.process.kill()
                child.process.join()
                child.connection.close()


def serve(connection: Connection, setup: Setup) -> None:
    """A worker process: answer tasks until the driver is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's to handle
    try:
        worker = Worker(setup)
    except Exception as error:
        connection.send(f"{type(error).__name__}: {str(error).splitlines()[0]}")
        return
    lock = threading.Lock()

    def answer(number: int, task: Task) -> None:
        try:
            outcome = worker.run(task)
            with lock:
                connection.send((number, outcome))
        except BaseException:
            os._exit(1)  # an answer that never comes would be waited for; a dead worker is replaced

    threads = ThreadPoolExecutor(setup.depth, "stage")
    try:
        connection.send(None)
        while True:
            threads.submit(answer, *connection.recv())
    except (EOFError, OSError):
        os._exit(0)  # at once, whatever is being computed: nobody waits for it
