"""Dynamic batches: photographs of one canvas are collected and restored together."""

from __future__ import annotations

from latentdem.em.memory import batch_size_for, free_memory, measured
from latentdem.em.settings import PaperSettings, ProxSettings
from latentdem.em.steps import EMState, Track, run_paper, run_prox, run_prox_together
from latentdem.io import InputError
from latentdem.operators.blur import BlurModel
from latentdem.priors.latent import LatentPrior

AUTO = "auto"


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
    GPU the first one of a canvas is measured, and what is free decides on the others.

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
        self._waiting: dict[tuple[int, int], list[tuple[int, Track]]] = {}
        self._bytes: dict[tuple[int, int], int] = {}
        self.states: dict[int, EMState] = {}
        """By the photograph's number; the images cropped to their observations."""

    def limit(self, canvas: tuple[int, int]) -> int:
        """Photographs of a canvas that are restored together."""
        if not isinstance(self._batch_size, str):
            return self._batch_size
        if self._prior.device.type != "cuda" or canvas not in self._bytes:
            return 1
        return batch_size_for(self._bytes[canvas], free_memory(self._prior.device))

    def add(self, number: int, track: Track) -> None:
        """Take one more; restores those that wait for it, when they are enough."""
        if not isinstance(self._settings, ProxSettings):
            self.states[number] = self.solve(track)
            return
        canvas = track.model.canvas
        self._waiting.setdefault(canvas, []).append((number, track))
        if len(self._waiting[canvas]) >= self.limit(canvas):
            self._restore(canvas)

    def finish(self) -> None:
        """Restore what still waits."""
        for canvas in list(self._waiting):
            self._restore(canvas)

    def solve(self, track: Track) -> EMState:
        """One photograph by itself, now, by either method."""
        settings = self._settings
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

    def _restore(self, canvas: tuple[int, int]) -> None:
        settings = self._settings
        assert isinstance(settings, ProxSettings)
        numbers, tracks = zip(*self._waiting.pop(canvas), strict=True)
        with measured(self._prior.device) as peak:
            states = run_prox_together(self._prior, tracks, settings, compile=self._compile)
        share = peak.bytes // len(tracks)
        self._bytes[canvas] = max(self._bytes.get(canvas, 0), share)
        for number, track, state in zip(numbers, tracks, states, strict=True):
            self.states[number] = _finished(state, track, share)


def _finished(state: EMState, track: Track, peak_memory_bytes: int) -> EMState:
    state.image = track.model.crop(state.image)
    state.peak_memory_bytes = peak_memory_bytes
    return state
