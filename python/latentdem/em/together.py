"""Dynamic batches: photographs of one canvas are collected and restored together."""

from __future__ import annotations

from latentdem.em.memory import batch_size_for, free_memory, graph_size, measured
from latentdem.em.settings import PaperSettings, ProxSettings, for_kernel_alone
from latentdem.em.steps import EMState, Track, run_paper, run_prox, run_prox_together
from latentdem.io import InputError
from latentdem.operators.blur import BlurModel
from latentdem.priors.latent import LatentPrior

AUTO = "auto"

Key = tuple[int, ...]
"""Height and width of a canvas, and for compiled steps the kernel's size."""


def check_batch_size(batch_size: int | str) -> None:
    """Refuse what is neither ``auto`` nor a positive number.

    Raises:
        InputError: it is not.
    """
    if batch_size != AUTO and (isinstance(batch_size, str) or batch_size < 1):
        raise InputError(f"batch_size must be at least 1, or 'auto', found {batch_size!r}")


class Batches:
    """Restores photographs by the canvas, ``batch_size`` of them at once.

    ``auto`` restores one by one on a CPU, where the networks are busy with one photograph.  On a
    GPU the first one of a canvas is measured, and what is free decides on the others.  Compiled
    batches that are not full are halved, and hold kernels of one size: each shape is a graph.

    Args:
        prior: latent diffusion prior.
        settings: of all photographs; those of ``paper`` are restored one by one.
        batch_size: photographs at once, or ``auto``.
        compile: a mode of :func:`torch.compile`, or none.
    """

    def __init__(
        self,
        prior: LatentPrior,
        settings: ProxSettings | PaperSettings,
        *,
        batch_size: int | str = 1,
        compile: str | None = None,
    ) -> None:
        self._prior, self._settings = prior, settings
        self._batch_size, self._compile = batch_size, compile
        self._waiting: dict[Key, list[tuple[int, Track]]] = {}
        self._bytes: dict[Key, int] = {}
        self.states: dict[int, EMState] = {}
        """By the photograph's number; the images cropped to their observations."""

    def _limit(self, key: Key) -> int:
        """Photographs that are restored together."""
        if not isinstance(self._batch_size, str):
            return self._batch_size
        if self._prior.device.type != "cuda" or key not in self._bytes:
            return 1
        return batch_size_for(self._bytes[key], free_memory(self._prior.device))

    def add(self, number: int, track: Track) -> None:
        """Take one more; restores those that wait for it, when they are enough."""
        if not isinstance(self._settings, ProxSettings):
            self.states[number] = self.solve(track)
            return
        key: Key = track.model.canvas
        if self._compile is not None:
            key = (*key, getattr(track.model, "kernel_size", 0))
        waiting = self._waiting.setdefault(key, [])
        waiting.append((number, track))
        if len(waiting) >= self._limit(key):
            self._restore(key, len(waiting))

    def finish(self) -> None:
        """Restore what still waits."""
        for key, waiting in self._waiting.items():
            while waiting:
                # By halves, if compiled: each size of a batch is a graph of its own.
                count = len(waiting)
                self._restore(key, count if self._compile is None else graph_size(count))

    def solve(self, track: Track, *, kernel_alone: bool = False) -> EMState:
        """One photograph by itself, now, by either method; for its kernel alone, in less time."""
        settings = for_kernel_alone(self._settings) if kernel_alone else self._settings
        with measured(self._prior.device) as peak:
            if isinstance(settings, ProxSettings):
                state = run_prox(
                    self._prior,
                    track.model,
                    settings,
                    track.generator,
                    kernel=track.kernel,
                    first_kernel=track.first_kernel,
                    callback=track.callback,
                    compile=self._compile,
                )
            else:
                assert isinstance(track.model, BlurModel)  # as ModelOptions.check_method sees to
                state = run_paper(
                    self._prior,
                    track.model,
                    settings,
                    track.generator,
                    kernel=track.kernel,
                    callback=track.callback,
                )
        return _finished(state, track, peak.bytes)

    def _restore(self, key: Key, count: int) -> None:
        """Restore the first ``count`` of those that wait."""
        settings = self._settings
        assert isinstance(settings, ProxSettings)
        waiting = self._waiting[key]
        numbers, tracks = zip(*waiting[:count], strict=True)
        del waiting[:count]
        with measured(self._prior.device) as peak:
            states = run_prox_together(self._prior, tracks, settings, compile=self._compile)
        share = peak.bytes // len(tracks)
        self._bytes[key] = max(self._bytes.get(key, 0), share)
        for number, track, state in zip(numbers, tracks, states, strict=True):
            self.states[number] = _finished(state, track, share)


def _finished(state: EMState, track: Track, peak_memory_bytes: int) -> EMState:
    state.image = track.model.crop(state.image)
    state.peak_memory_bytes = peak_memory_bytes
    return state
