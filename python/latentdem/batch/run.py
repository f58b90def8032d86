"""The driver: reads inputs, gives them to workers, writes results, keeps the manifest."""

from __future__ import annotations

import csv
import os
import sqlite3
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from latentdem.batch.engines import Engine, LocalEngine, ProcessEngine, WorkerLost
from latentdem.batch.inputs import Item, find_items
from latentdem.batch.manifest import DONE, FAILED, Manifest
from latentdem.batch.output import Output, locked
from latentdem.batch.request import Options, Requests, digest
from latentdem.batch.worker import FOLDERS, Outcome, Setup, Task
from latentdem.em.options import check_compile
from latentdem.em.together import check_batch_size
from latentdem.io import InputError, check_writable

ENGINES = ("auto", "local", "processes", "ray")

WINDOW = 256
"""Images that are sorted by size together, and bounds what the driver holds of the queue."""

LOSSES = 3
"""Workers that one image may take with it before it has failed."""

AHEAD = 4
"""Images read beyond those that workers hold."""

GOES_ON = "what is finished is kept, the same command goes on"


@dataclass
class Figures:
    """Seconds of a run by what they were spent on, added up over threads and workers."""

    read: float = 0.0
    decode: float = 0.0
    compute: float = 0.0
    encode: float = 0.0
    write: float = 0.0
    manifest: float = 0.0


@dataclass
class Summary:
    """How a run stands.

    Args:
        images: inputs of this run.
        before: those that were done or had failed already.
        done: with a complete result, those from before included.
        failed: likewise.
        computed: by this run.
        seconds: since workers were started.
        figures: where they went.
    """

    images: int = 0
    before: int = 0
    done: int = 0
    failed: int = 0
    computed: int = 0
    seconds: float = 0.0
    figures: Figures = field(default_factory=Figures)

    @property
    def rate(self) -> float:
        """Images a second, of those that this run has dealt with."""
        return (self.done + self.failed - self.before) / max(self.seconds, 1e-9)

    @property
    def left(self) -> float:
        """Seconds to go at this rate."""
        remaining = self.images - self.done - self.failed
        return remaining / self.rate if self.rate > 0 else float("inf")


Report = Callable[[Summary, str], None]
"""Called as ``report(summary, line)`` when an image is dealt with; the line tells of it."""


@dataclass
class _Prepared:
    """An image that was read: a task, or what became of it without one."""

    item: Item
    task: Task | None = None
    digest: str = ""
    seconds: float | None = None
    reason: str | None = None
    read_seconds: float = 0.0


def make_engine(
    name: str, workers: int | None, device: str, threads: int | None, setup: dict[str, Any],
    address: str | None = None,
) -> Engine:  # fmt: skip
    """The engine of the command line's options.

    Args:
        name: ``local`` (in this process), ``processes``, ``ray``, or ``auto``: the first for one
            worker, the second for several.
        workers: processes or actors; None: one a device.
        device: ``cpu``, ``cuda``, or a list such as ``cuda:0,cuda:1``, which workers share.
        threads: of each worker; None: all cores for one, an equal share for several.
        setup: of :class:`~latentdem.batch.worker.Setup`, the rest.
        address: of a Ray cluster.

    Raises:
        InputError: options that do not go together, or no worker could be started.
    """
    if name not in ENGINES:
        raise InputError(f"engine must be one of {', '.join(ENGINES)}, found '{name}'")
    devices = [part.strip() for part in device.split(",")]
    if len({place.split(":")[0] for place in devices}) > 1:
        raise InputError(f"all workers must be on cpu or all on cuda, found {device}")
    count = len(devices) if workers is None else workers
    if count < 1:
        raise InputError(f"workers must be at least 1, found {count}")
    if threads is not None and threads < 1:
        raise InputError(f"threads must be at least 1, found {threads}")
    if address is not None and name != "ray":
        raise InputError("--address belongs to --engine ray")
    if threads is None and (count > 1 or name in ("processes", "ray")):
        threads = max(1, len(os.sched_getaffinity(0)) // count)
    setups = [
        Setup(device=devices[index % len(devices)], threads=threads, **setup)
        for index in range(count)
    ]
    if name == "ray":
        from latentdem.batch.ray_engine import RayEngine

        if any(":" in place for place in devices):
            raise InputError("Ray gives each worker a GPU of its own: --device cuda")
        return RayEngine(setups, address)
    if name == "auto":
        name = "local" if count == 1 else "processes"
    if name == "local" and count > 1:
        raise InputError(f"the local engine is one worker, found {count}: --engine processes")
    return LocalEngine(setups[0]) if name == "local" else ProcessEngine(setups)


def run_batch(
    inputs: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    options: Options | None = None,
    *,
    engine: str = "auto",
    workers: int | None = None,
    device: str = "cpu",
    threads: int | None = None,
    address: str | None = None,
    layout: str = FOLDERS,
    share: tuple[int, int] | None = None,
    retry_failed: bool = False,
    group: bool = True,
    batch_size: int | str = 1,
    compile: str | None = None,
    slicing: bool = False,
    solve: Callable[..., Any] | None = None,
    report: Report | None = None,
) -> Summary:
    """Deblur many images; a run that was killed goes on where it was.

    Args:
        inputs: see :func:`~latentdem.batch.inputs.find_items`.
        output: folder of results and of the manifest.
        options: of :func:`latentdem.deblur`.
        engine: see :func:`make_engine`, with the four after it.
        workers: processes or actors.
        device: where they compute.
        threads: of each.
        address: of a Ray cluster.
        layout: ``folders`` (what :meth:`DeblurResult.save` writes) or ``flat``.
        share: ``(r, R)``: take every R-th image from the r-th on, with a manifest of one's own,
            beside other processes.
        retry_failed: failed images are tried again.
        group: neighbouring images get similar sizes.
        batch_size: images that a worker restores together, if they are of one size (and those that
            wait are); ``auto``: on a GPU as many as fit, on a CPU one.
        compile: as for :func:`latentdem.deblur`.
        slicing: as there.
        solve: see :class:`~latentdem.batch.worker.Setup`.
        report: told of every image.

    Returns:
        Counts of done and failed images; reasons are in the manifest and in ``failed.csv``.

    Raises:
        ValueError: inputs or options that cannot be used, an output in use, or no worker.

    >>> from latentdem.batch import Options, run_batch
    >>> run_batch(["photos"], "out", Options(kernel_size=25)).failed  # doctest: +SKIP
    0
    """
    options = (options or Options()).settled(device)
    if share is not None and not 0 <= share[0] < share[1]:
        raise InputError(f"share must be r of R with 0 <= r < R, found {share[0]} of {share[1]}")
    folder, suffix = Path(output), "" if share is None else f"-{share[0]}"
    check_batch_size(batch_size)
    check_compile(compile, options.method)
    place = Output(folder, layout, suffix)
    requests = Requests(options, device)
    check_writable(folder)
    with locked(folder, suffix):
        manifest = Manifest(folder / f"manifest{suffix}.sqlite")
        try:
            driver = _Driver(manifest, place, requests, group=group, report=report)
            driver.register(inputs, share, retry_failed)
            if driver.summary.before < driver.summary.images:
                setup: dict[str, Any] = {"prior": options.prior, "dtype": options.dtype}
                setup |= {"prior_options": options.prior_options()}
                setup |= {"compile": compile, "batch_size": batch_size, "slicing": slicing}
                setup |= {} if solve is None else {"solve": solve}
                place.clear()
                driver.run(make_engine(engine, workers, device, threads, setup, address))
            write_failures(manifest, folder / f"failed{suffix}.csv")
        except sqlite3.Error as error:
            raise InputError(f"{manifest.path}: {error}; {GOES_ON}") from None
        finally:
            # On a full disk neither may work, and what is wrong is being raised already.
            with suppress(OSError, sqlite3.Error):
                place.tidy()
                manifest.release()
            with suppress(sqlite3.Error):
                manifest.close()
    return driver.summary


def write_failures(manifest: Manifest, path: Path) -> None:
    """Write the images that failed, and why, as CSV; no file if there are none."""
    rows = [(f.id, f.input, f.attempts, f.reason) for f in manifest.failures()]
    if not rows:
        path.unlink(missing_ok=True)
        return
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="") as stream:
        csv.writer(stream).writerows([("id", "input", "attempts", "reason"), *rows])
    partial.replace(path)


class _Driver:
    """One run.  Futures do the reading, computing and writing; this thread keeps the manifest."""

    def __init__(
        self,
        manifest: Manifest,
        output: Output,
        requests: Requests,
        *,
        group: bool,
        report: Report | None,
    ) -> None:
        self.manifest, self.output, self.requests = manifest, output, requests
        self.group, self.report = group, report
        self.summary = Summary()
        self._losses: dict[str, int] = {}
        self._threads = ThreadPoolExecutor(4, "disk")

    def register(
        self,
        inputs: Sequence[str | os.PathLike[str]],
        share: tuple[int, int] | None,
        retry_failed: bool,
    ) -> None:
        """Enter the inputs in the manifest."""
        items = find_items(inputs, self.output.folder)
        if share is not None:
            items = (item for index, item in enumerate(items) if index % share[1] == share[0])
        summary = self.summary
        summary.images = self.manifest.register(
            items,
            lambda item: digest(self.requests.options(item)),
            lambda name: self.output.report(name).is_file(),
            retry_failed=retry_failed,
        )
        counts = self.manifest.counts(this_run=True)
        summary.done, summary.failed = counts[DONE], counts[FAILED]
        summary.before = summary.done + summary.failed

    def run(self, engine: Engine) -> None:
        """Deal with all that is pending."""
        started = time.perf_counter()
        queue, again = self._queue(), deque[Task]()
        reading: deque[Future[_Prepared]] = deque()  # taken in order: neighbours stay neighbours
        computing: dict[Future[Outcome], Task] = {}
        writing: dict[Future[float], tuple[Task, Outcome]] = {}
        figures, more = self.summary.figures, True
        try:
            while True:
                while more and len(reading) + len(again) < AHEAD + engine.slots:
                    item = next(queue, None)
                    more = item is not None
                    if item is not None:
                        reading.append(
                            self._threads.submit(self._prepare, item, engine.shares_disk)
                        )
                while reading and reading[0].done():
                    self._read(reading.popleft().result(), again)
                # Where the disk is the slowest, results must not pile up in memory.
                while again and len(computing) < engine.slots and len(writing) <= 2 * engine.slots:
                    task = again.popleft()
                    self.manifest.mark_running(task.id, task.digest)
                    computing[engine.submit(task)] = task
                waiting: list[Future[Any]] = [*computing, *writing]
                if reading:
                    waiting.append(reading[0])
                elif not waiting and not again and not more:
                    break
                tick = time.perf_counter()
                self.manifest.commit()
                figures.manifest += time.perf_counter() - tick
                ready, _ = wait(waiting, return_when=FIRST_COMPLETED) if waiting else ([], None)
                self.summary.seconds = time.perf_counter() - started
                for future in ready:
                    if future in writing:
                        task, outcome = writing.pop(future)
                        self._written(future, task, outcome)
                    elif future in computing:
                        task = computing.pop(future)
                        computed = self._computed(future, task, again)
                        if computed is not None:
                            write = self._threads.submit(self._write, task, computed)
                            writing[write] = (task, computed)
        finally:
            self.summary.seconds = time.perf_counter() - started
            engine.close()
            self._threads.shutdown(wait=True, cancel_futures=True)

    def _queue(self) -> Iterator[Item]:
        """Pending images, in windows sorted by size; those of shards in their order."""
        for window in self.manifest.pending(WINDOW):
            alone = [item for item in window if item.offset is None]
            yield from (item for item in window if item.offset is not None)
            if self.group and len(alone) > 1:
                sizes = dict(zip(alone, self._threads.map(_image_size, alone), strict=True))
                alone.sort(key=sizes.__getitem__)
            yield from alone

    def _prepare(self, item: Item, shares_disk: bool) -> _Prepared:
        started = time.perf_counter()
        try:
            content = item.read()
        except InputError as error:
            return _Prepared(item, reason=str(error))
        request = self.requests.request(item, content)
        name = digest(request)
        found = _Prepared(item, digest=name, seconds=self.output.seconds(item.id, name))
        if found.seconds is None:
            checkpoint = str(self.output.checkpoint(name)) if shares_disk else None
            layout = self.output.layout
            found.task = Task(item.id, item.input, content, request, name, layout, checkpoint)
        else:
            self.output.forget(name)
        found.read_seconds = time.perf_counter() - started
        return found

    def _read(self, found: _Prepared, again: deque[Task]) -> None:
        self.summary.figures.read += found.read_seconds
        if found.task is not None:
            again.append(found.task)
        elif found.seconds is not None:  # complete, but the manifest had not heard of it
            self._done(found.item.id, found.item.input, found.digest, found.seconds, "on disk")
        else:
            self._failed(found.item.id, found.item.input, found.reason or "", unread=True)

    def _computed(self, future: Future[Outcome], task: Task, again: deque[Task]) -> Outcome | None:
        try:
            outcome = future.result()
        except WorkerLost as error:
            losses = self._losses[task.id] = self._losses.get(task.id, 0) + 1
            if losses < LOSSES:
                # Whichever it died of, the others shall not die of it again.
                again.appendleft(replace(task, alone=True))
            else:
                self._failed(task.id, task.input, f"{losses} workers died with it, last: {error}")
            return None
        figures = self.summary.figures
        figures.decode += outcome.decode_seconds
        figures.compute += outcome.compute_seconds
        figures.encode += outcome.encode_seconds
        if outcome.reason is not None:
            self._failed(task.id, task.input, outcome.reason)
            return None
        return outcome

    def _write(self, task: Task, outcome: Outcome) -> float:
        started = time.perf_counter()
        self.output.write(task.id, task.digest, outcome.files)
        return time.perf_counter() - started

    def _written(self, future: Future[float], task: Task, outcome: Outcome) -> None:
        try:
            self.summary.figures.write += future.result()
        except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
            self._failed(task.id, task.input, f"{error.filename} is in the way of its output")
            return
        except OSError as error:
            place = self.output.place(task.id)
            raise InputError(
                f"cannot write to {place}: {error.strerror or error}; {GOES_ON}"
            ) from None
        self.summary.computed += 1
        seconds = round(outcome.compute_seconds, 3)
        self._done(task.id, task.input, task.digest, seconds, f"{seconds:.1f} s")

    def _done(self, name: str, source: str, request: str, seconds: float, note: str) -> None:
        self.manifest.mark_done(name, request, seconds)
        self.summary.done += 1
        self._tell(f"{source}: {note} -> {self.output.report(name).parent}")

    def _failed(self, name: str, source: str, reason: str, *, unread: bool = False) -> None:
        self.manifest.mark_failed(name, reason, unread=unread)
        self.summary.failed += 1
        self._tell(f"{source}: failed: {reason.removeprefix(f'{source}: ')}")

    def _tell(self, line: str) -> None:
        if self.report is not None:
            self.report(self.summary, line)


def _image_size(item: Item) -> tuple[int, int]:
    """Height and width by the file's header; what cannot be read comes first, and fails later."""
    try:
        with Image.open(item.path) as image:
            return image.height, image.width
    except Exception:
        return 0, 0
