"""One worker: a prior, and the three stages of an image.  The same in every engine.

Several threads call :meth:`Worker.run` at once.  One computes; beside it others decode the next
images or encode the last ones' pictures.  With a batch size above one, what waits for the one that
computes is restored together, as far as size and request agree.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from io import BytesIO
from itertools import islice
from typing import Any

import torch

from latentdem.em.driver import deblur
from latentdem.em.memory import LARGEST_BATCH, batch_size_for, free_memory, graph_size
from latentdem.em.options import placement
from latentdem.em.result import DeblurResult
from latentdem.io import InputError, decode_image, to_batch
from latentdem.noise import coding_noise_std
from latentdem.priors import load_kernel_prior, load_prior

DEPTH = 2
"""Images that a worker holds: one computes while the other is decoded or encoded.

Of batches, two: see :attr:`Setup.depth`.
"""

FOLDERS, FLAT = "folders", "flat"

OPTIONS = (
    "kernel_size", "noise_std", "blur", "scale", "grid", "method", "steps", "seed", "boundary",
    "tile", "assume_blurred", "linear_light", "quality", "tiling",
)  # fmt: skip
"""Of :func:`latentdem.deblur`, as a request has them; some only where they were given."""


@dataclass(frozen=True)
class Setup:
    """What a worker is made from; it travels to other processes.

    Args:
        prior: as in :class:`~latentdem.batch.request.Options`.
        prior_options: of :func:`latentdem.load_prior`, beside the prior.
        device: ``cpu``, ``cuda:1`` ...
        threads: of torch; None: as torch finds best.
        dtype: of the networks, see :class:`~latentdem.batch.request.Options`.
        compile: as for :func:`latentdem.deblur`.
        slicing: as there.
        batch_size: images that are restored together, if they are of one size; ``auto``: on a GPU
            as many as fit, on a CPU one.
        solve: called as :func:`latentdem.deblur`; a function that other processes can import.
    """

    prior: str | None = None
    prior_options: dict[str, Any] = field(default_factory=dict)
    device: str = "cpu"
    threads: int | None = None
    dtype: str | None = None
    compile: str | None = None
    slicing: bool = False
    batch_size: int | str = 1
    solve: Callable[..., DeblurResult] = deblur

    @property
    def depth(self) -> int:
        """Images that a worker holds: a batch that is computed, and the next one."""
        largest = self.batch_size
        if isinstance(largest, str):
            largest = LARGEST_BATCH if self.device.startswith("cuda") else 1
        return DEPTH * largest


@dataclass(frozen=True)
class Task:
    """One image on its way to a worker.

    Args:
        id: its name in the output.
        input: its name for messages.
        content: the image file's bytes.
        request: what is asked, see :class:`~latentdem.batch.request.Requests`.
        digest: of ``request``.
        layout: ``folders`` or ``flat``.
        checkpoint: folder of finished tiles, where worker and driver share a disk.
        alone: not together with others: a worker died with it.
    """

    id: str
    input: str
    content: bytes
    request: dict[str, Any]
    digest: str
    layout: str = FOLDERS
    checkpoint: str | None = None
    alone: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of a task.

    Args:
        files: contents by name; none if it failed.
        reason: of the failure, in one line.
        decode_seconds: bytes to tensor.
        compute_seconds: the deblurring.
        encode_seconds: tensor to pictures.
    """

    files: dict[str, bytes]
    reason: str | None = None
    decode_seconds: float = 0.0
    compute_seconds: float = 0.0
    encode_seconds: float = 0.0


class _Stopped(Exception):
    """The run was stopped while this image was computed."""


@dataclass(eq=False)
class _Waiting:
    """A decoded image that waits to be computed, and what it becomes."""

    image: torch.Tensor
    task: Task
    coding_noise_std: float = 0.0
    done: Future[tuple[DeblurResult, float]] = field(default_factory=Future)

    @property
    def key(self) -> Any:
        """Images of equal keys can be restored together; None: this one cannot."""
        request = self.task.request
        if self.task.alone or self.image.shape[0] != 1 or request["method"] != "prox":
            return None
        height, width = self.image.shape[-2:]
        tile = request["tile"]
        if tile is not None and height * width > 2 * tile**2:
            return None
        options = [(name, str(request.get(name))) for name in OPTIONS]
        return (tuple(self.image.shape), *options)


class Worker:
    """Deblurs with one prior, one image or one batch of equal images at a time."""

    def __init__(self, setup: Setup) -> None:
        device, dtype = placement(setup.device, setup.dtype, torch.device("cpu"))
        self._solve = setup.solve
        self._device = setup.device
        self._options: dict[str, Any] = {"dtype": dtype}
        if setup.compile is not None:
            self._options["compile"] = setup.compile
        if setup.slicing:
            self._options["slicing"] = True
        self._batch_size = setup.batch_size
        self._bytes: dict[Any, int] = {}
        self._waiting: list[_Waiting] = []
        self._lock = threading.Lock()
        self._prior = load_prior(setup.prior, **setup.prior_options).to(device, dtype)
        self._kernel_prior = load_kernel_prior().to(device)
        self._stop = threading.Event()
        self._threads_before = torch.get_num_threads()
        if setup.threads is not None:
            torch.set_num_threads(setup.threads)
        # One thread computes: OpenMP keeps a team of threads for each that does.
        self._compute = ThreadPoolExecutor(1, "compute")

    def ready(self) -> None:
        """Return once the prior is loaded."""

    def run(self, task: Task) -> Outcome:
        """Decode, deblur, encode; thread-safe.  An image that cannot be restored has its reason."""
        try:
            started = time.perf_counter()
            image = to_batch(decode_image(BytesIO(task.content), task.input))
            coding = coding_noise_std(BytesIO(task.content))
            decoded = time.perf_counter() - started
            waiting = _Waiting(image, task, coding)
            with self._lock:
                self._waiting.append(waiting)
            self._compute.submit(self._compute_next)
            result, computed = waiting.done.result()
            started = time.perf_counter()
            result.report |= {
                "input": task.input,
                "request": task.request,
                "request_digest": task.digest,
            }
            files = encode(result, task.id, task.layout)
            return Outcome(files, None, decoded, computed, time.perf_counter() - started)
        except _Stopped:
            raise
        except (InputError, ValueError) as error:
            return Outcome({}, _one_line(error))
        except Exception as error:  # whatever one image does, the others go on
            return Outcome({}, f"{type(error).__name__}: {_one_line(error)}")

    def _take(self) -> list[_Waiting]:
        """What has waited longest, and what can be restored together with it."""
        with self._lock:
            if not self._waiting:  # it went with one before it
                return []
            first = self._waiting[0]
            taken = [first]
            if first.key is not None:
                limit = self._limit(first.key)
                mates = (each for each in self._waiting[1:] if each.key == first.key)
                taken.extend(islice(mates, limit - 1))
                if "compile" in self._options and len(taken) < limit:
                    taken = taken[: graph_size(len(taken))]
            self._waiting = [each for each in self._waiting if each not in taken]
            return taken

    def _limit(self, key: Any) -> int:
        if not isinstance(self._batch_size, str):
            return self._batch_size
        device = self._prior.device
        if device.type != "cuda":
            return 1
        return batch_size_for(self._bytes.get(key, 0), free_memory(device))

    def _compute_next(self) -> None:
        batch = self._take()
        try:
            if len(batch) > 1:
                self._answer(batch)
                return
        except _Stopped as stopped:
            for waiting in batch:
                waiting.done.set_exception(stopped)
            return
        except Exception:  # whose fault it is shows when each is tried by itself
            pass
        for waiting in batch:
            try:
                self._answer([waiting])
            except BaseException as error:
                waiting.done.set_exception(error)

    def _answer(self, batch: list[_Waiting]) -> None:
        """Restore images of one key together."""

        def check(*_: object) -> None:
            if self._stop.is_set():
                raise _Stopped

        check()
        task, count = batch[0].task, len(batch)
        started = time.perf_counter()
        result = self._solve(
            torch.cat([waiting.image for waiting in batch]),
            prior=self._prior,
            kernel_prior=self._kernel_prior,
            device=self._device,
            checkpoint=task.checkpoint,
            progress=check,
            coding_noise_std=[waiting.coding_noise_std for waiting in batch],
            **{name: task.request[name] for name in OPTIONS if name in task.request},
            **self._options,
            **({"batch_size": count} if count > 1 else {}),
        )
        seconds = (time.perf_counter() - started) / count
        # A photograph that was sharp took none.
        taken = max(result.report.get("peak_memory_bytes") or [0])
        self._bytes[batch[0].key] = max(self._bytes.get(batch[0].key, 0), taken)
        results = result.split() if count > 1 else [result]
        for waiting, one in zip(batch, results, strict=True):
            waiting.done.set_result((one, seconds))

    def stop(self) -> None:
        """End the computation that is going on after its next step; the process goes on."""
        self._stop.set()
        self._compute.shutdown(wait=True, cancel_futures=True)
        for waiting in self._waiting:
            waiting.done.set_exception(_Stopped())
        torch.set_num_threads(self._threads_before)


def _one_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:500]


def file_names(name: str, layout: str) -> list[str]:
    """The files of an image by its id, the one that says that it is complete last.

    >>> file_names("trip/0001", "flat")
    ['0001.png', '0001.json']
    """
    if layout == FOLDERS:
        return ["restored.png", "kernel.png", "kernel.npy", "comparison.png", "report.json"]
    stem = name.rpartition("/")[2]
    return [f"{stem}.png", f"{stem}.json"]


def encode(result: DeblurResult, name: str, layout: str) -> dict[str, bytes]:
    """The files of a result; ``flat``: the picture, and a report that holds the kernel."""
    files = result.files()
    if layout == FOLDERS:
        return files
    picture, report = file_names(name, layout)
    document = json.loads(files["report.json"]) | {"kernel": result.kernel[0].squeeze(0).tolist()}
    return {picture: files["restored.png"], report: (json.dumps(document) + "\n").encode()}
