"""What both tabs share: visitors and their jobs, uploads, buttons, downloads."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

import latentdem
from latentdem.io import InputError
from latentdem.serve.files import FORMATS, Store, check_picture
from latentdem.serve.jobs import Job, Limits, Snapshot, Worker
from latentdem.serve.models import Models

EXAMPLES = Path(latentdem.__file__).parents[1] / "examples"
"""Photographs; in a checkout only."""

TYPES = [f".{name.lower()}" for name in (*FORMATS, "JPG", "TIF")]
"""Of files that can be chosen."""

PAUSE = 0.3
"""Seconds between pictures, at least: a browser that cannot keep up would lag behind."""

PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
"""Of all events: no programmatic interface beside the page, and no spinners over its pictures."""


class Page:
    """Handlers of the page; which visitor runs which job.

    Args:
        worker: that runs the jobs.
        store: for uploads and results.
        limits: of both.
        models: what the jobs compute with; the packaged priors by default.
    """

    def __init__(
        self, worker: Worker, store: Store, limits: Limits, models: Models | None = None
    ) -> None:
        self.worker, self.store, self.limits = worker, store, limits
        self.models = models or Models()
        self._jobs: dict[tuple[str, str], Job] = {}
        self._lock = threading.Lock()

    def run(
        self, key: tuple[str, str], make: Callable[[Path], Callable[[Job], Any]]
    ) -> Iterator[Snapshot]:
        """Snapshots of a new job; when nobody looks any more, it is cancelled.

        Args:
            key: visitor and tab; what was run there before is cancelled.
            make: the work, for a folder of results.
        """
        try:
            work = make(self.store.new_folder())
            with self._lock:
                before = self._jobs.pop(key, None)
                if before is not None:
                    before.cancel()
                job = self._jobs[key] = self.worker.submit(work, self.limits.seconds)
        except ValueError as error:
            yield Snapshot("failed", message=str(error))
            return
        try:
            yield from job.watch(least=PAUSE)
        finally:
            job.cancel()
            with self._lock:
                if self._jobs.get(key) is job:
                    del self._jobs[key]

    def cancel(self, key: tuple[str, str]) -> None:
        """Stop what runs there, if anything does."""
        with self._lock:
            job = self._jobs.get(key)
        if job is not None:
            job.cancel()

    def leave(self, visitor: str) -> None:
        """Stop everything of a visitor whose page is closed."""
        for tab in ("deblur", "objects"):
            self.cancel((visitor, tab))

    def check_upload(self, upload: dict[str, Any] | None) -> str:
        """Empty, or why a picture cannot be taken; ``upload`` as the page sends it."""
        if not upload:
            return ""
        path = str(upload.get("path") or "")
        try:
            if not self.store.holds(path):
                raise InputError("the picture is no longer there; choose it again")
            check_picture(Path(path), self.limits)
        except InputError as error:
            return str(error)
        return ""


def number(text: str | float | None, name: str) -> float | None:
    """What was typed into a field; None if it is empty.

    Raises:
        InputError: it is no number.

    >>> number(" 0,01 ", "the noise"), number("", "the noise")
    (0.01, None)
    """
    typed = str("" if text is None else text).strip().replace(",", ".")
    if not typed:
        return None
    try:
        value = float(typed)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"{name} must be a number, or empty, found '{typed[:40]}'")
    return value


def whole(text: str | float | None, name: str) -> int | None:
    """The same for whole numbers.

    >>> whole("25", "the kernel size")
    25
    """
    value = number(text, name)
    if value is None:
        return None
    if value != int(value):
        raise InputError(f"{name} must be a whole number, found {value:g}")
    return int(value)


class Downloads:
    """A row of buttons, one for each file, that is shown when there are files.

    Args:
        names: of the files, in the order that a job's answer has them; the archive comes last.
        prefix: of the buttons' ids.
    """

    def __init__(self, names: Sequence[str], prefix: str) -> None:
        self.names = [*names, "everything (zip)"]
        with gr.Row(visible=False, elem_classes="downloads", elem_id=f"{prefix}-files") as self.row:
            self.buttons = [
                gr.DownloadButton(
                    name, size="sm", variant="primary" if k == len(names) else "secondary"
                )
                for k, name in enumerate(self.names)
            ]

    @property
    def outputs(self) -> list[Any]:
        """Components that :meth:`show` and :meth:`hide` change."""
        return [self.row, *self.buttons]

    def show(self, files: Sequence[Path]) -> dict[Any, Any]:
        """Updates for the files that are there; others' buttons are hidden."""
        there = {file.name: str(file) for file in files[:-1]}
        change: dict[Any, Any] = {self.row: gr.update(visible=True)}
        for name, button in zip(self.names[:-1], self.buttons):
            change[button] = gr.update(visible=name in there, value=there.get(name))
        change[self.buttons[-1]] = gr.update(value=str(files[-1]))
        return change

    def hide(self) -> dict[Any, Any]:
        """Updates before another run."""
        return {self.row: gr.update(visible=False)}


def connect(
    page: Page,
    tab: str,
    start: gr.Button,
    stop: gr.Button,
    run: Callable[..., Iterator[dict[Any, Any]]],
    inputs: list[Any],
    outputs: list[Any],
) -> Any:
    """Start and stop a tab's job with its two buttons; returns the event of the start."""

    def cancel(request: gr.Request) -> Any:
        page.cancel((str(request.session_hash), tab))
        return gr.update(interactive=False, value="Stopping")

    # The worker bounds how much is computed and waits; each visitor's line of progress must run.
    event = start.click(run, inputs, [*outputs, start, stop], concurrency_limit=None, **PRIVATE)
    stop.click(cancel, None, stop, concurrency_limit=None, **PRIVATE)
    return event
