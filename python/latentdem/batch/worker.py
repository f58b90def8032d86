"""One worker: a prior, and the three stages of an image.  The same in every engine.

Several threads call :meth:`Worker.run` at once.  One computes; beside it another decodes the next
image or encodes the last one's pictures.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import torch

from latentdem.em.driver import check_device, deblur
from latentdem.em.result import DeblurResult
from latentdem.io import InputError, decode_image, to_batch
from latentdem.priors import load_kernel_prior, load_prior

DEPTH = 2
"""Images that a worker holds: one computes while the other is decoded or encoded."""

FOLDERS, FLAT = "folders", "flat"


@dataclass(frozen=True)
class Setup:
    """What a worker is made from; it travels to other processes.

    Args:
        prior: as in :class:`~latentdem.batch.request.Options`.
        prior_options: of :func:`latentdem.load_prior`, beside the prior.
        device: ``cpu``, ``cuda:1`` ...
        threads: of torch; None: as torch finds best.
        solve: called as :func:`latentdem.deblur`; a function that other processes can import.
    """

    prior: str | None = None
    prior_options: dict[str, Any] = field(default_factory=dict)
    device: str = "cpu"
    threads: int | None = None
    solve: Callable[..., DeblurResult] = deblur


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
    """

    id: str
    input: str
    content: bytes
    request: dict[str, Any]
    digest: str
    layout: str = FOLDERS
    checkpoint: str | None = None


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


class Worker:
    """Deblurs with one prior, one image at a time."""

    def __init__(self, setup: Setup) -> None:
        device = check_device(setup.device)
        dtype = torch.float16 if device.type == "cuda" else None
        self._solve = setup.solve
        self._device = setup.device
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
            decoded = time.perf_counter() - started
            result, computed = self._compute.submit(self._deblur, image, task).result()
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

    def _deblur(self, image: torch.Tensor, task: Task) -> tuple[DeblurResult, float]:
        def check(*_: object) -> None:
            if self._stop.is_set():
                raise _Stopped

        check()
        names = ("kernel_size", "noise_std", "blur", "scale", "grid", "method", "steps", "seed",
                 "boundary", "tile", "assume_blurred")  # fmt: skip
        started = time.perf_counter()
        result = self._solve(
            image,
            prior=self._prior,
            kernel_prior=self._kernel_prior,
            device=self._device,
            checkpoint=task.checkpoint,
            progress=check,
            **{name: task.request[name] for name in names},
        )
        return result, time.perf_counter() - started

    def stop(self) -> None:
        """End the computation that is going on after its next step; the process goes on."""
        self._stop.set()
        self._compute.shutdown(wait=True, cancel_futures=True)
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
