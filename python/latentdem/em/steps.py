"""The E-steps: what one method does to the latent at one noise level."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.profiler import record_function

import latentdem_ext as ext
from latentdem.em.e_step import Levels, step_compiled, step_eagerly
from latentdem.em.finish import finish
from latentdem.em.recording import (
    PHASE,
    PhaseClock,
    Recorder,
    StepCallback,
    StepReport,
    unrecorded,
)
from latentdem.em.schedules import annealing, descending, takes_gradient
from latentdem.em.settings import PaperSettings, ProxSettings
from latentdem.operators.blur import BlurModel
from latentdem.operators.forward_model import ForwardModel
from latentdem.priors.latent import LatentPrior


@dataclass
class EMState:
    """Image ``[1,3,H,W]`` (of the methods: on their canvas), parameters, and the cost.

    ``kernel`` holds the forward model's parameters phi, whatever they are: of a blur the kernel
    ``[1,1,k,k]``.
    """

    image: Tensor
    kernel: Tensor
    evaluations: int = 0
    backward_passes: int = 0
    peak_memory_bytes: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Book the seconds within, under a name that torch.profiler (and so NVTX) sees, too."""
        started = time.perf_counter()
        with record_function(PHASE + name):
            yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def record(
        self,
        model: ForwardModel,
        step: int,
        steps: int,
        timestep: int,
        residual_std: float,
        callback: StepCallback | None,
    ) -> None:
        """Append a step, as the state now is, to the history and tell the caller."""
        peak = float(self.kernel.max())
        self.history.append(
            {
                "step": step,
                "timestep": timestep,
                "residual_std": residual_std,
                "kernel_peak": peak,
            }
        )
        if callback is not None:
            image = model.crop(self.image)
            callback(StepReport(step, steps, timestep, residual_std, peak, image, self.kernel))


def _noise(like: Tensor, generator: torch.Generator) -> Tensor:
    # Drawn on the CPU: the same seed gives the same noise on every device.
    return torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device)


def run_prox(
    prior: LatentPrior,
    model: ForwardModel,
    settings: ProxSettings,
    generator: torch.Generator,
    *,
    kernel: Tensor | None = None,
    first_kernel: Tensor | None = None,
    callback: StepCallback | None = None,
    compile: str | None = None,
) -> EMState:
    """EM with the proximal E-step.

    ``kernel``: the parameters, if they are known, so that only the image is sought.
    ``first_kernel``: what step 0 would give.  ``compile``: a mode of :func:`torch.compile`.

    0. first parameters from the observation; of a blur from its edges, coarse to fine
    1. z_0 <- prior at z_t; x_hat = D(z_0)
    2. E-step: x* = prox of the data term at x_hat with s^2 / r_t^2, where
       s^2 = sigma^2 + excess residual
    3. M-step: parameters from the chains' mean of x*; of a blur from its salient edges
    4. z* = z_0 + E(x*) - E(x_hat), and
       z_{t'} = sqrt(abar') z* + sqrt(1 - abar') (predicted and fresh noise)
    5. after the last level: total variation takes what the inverse of the blur amplified, and the
       mean with a deconvolution under sparse gradients is the result
    """
    track = Track(model, generator, kernel, first_kernel, callback)
    return run_prox_together(prior, [track], settings, compile=compile)[0]


@dataclass
class Track:
    """One photograph among those that are restored together; arguments as for :func:`run_prox`."""

    model: ForwardModel
    generator: torch.Generator
    kernel: Tensor | None = None
    first_kernel: Tensor | None = None
    callback: StepCallback | None = None


@torch.no_grad()
def run_prox_together(
    prior: LatentPrior,
    tracks: Sequence[Track],
    settings: ProxSettings,
    *,
    compile: str | None = None,
) -> list[EMState]:
    """:func:`run_prox` of several photographs on one canvas: the networks see all chains at once.

    Data terms and M-steps are each photograph's own, so that the results are those of
    :func:`run_prox` up to rounding.  The loop never waits for the device.

    Args:
        prior: latent diffusion prior, on the observations' device.
        tracks: at least one, with forward models of the same canvas.
        settings: of all.
        compile: a mode of :func:`torch.compile`, or none.

    Returns:
        A state for each track, with its share of the seconds.

    Raises:
        ValueError: canvases of different sizes, or an E-step that cannot be compiled.
    """
    sizes = {track.model.canvas for track in tracks}
    if len(sizes) != 1:
        raise ValueError(
            f"photographs restored together must share a canvas, found {sorted(sizes)}"
        )
    states = []
    for track in tracks:
        state = EMState(track.model.padded, torch.empty(0))
        with state.phase("first_kernel"):
            given = track.first_kernel if track.kernel is None else track.kernel
            if given is None:
                with unrecorded():
                    given = track.model.start_parameters()
            state.kernel = given
        states.append(state)
    schedule = descending(round(settings.start * (prior.timesteps - 1)), settings.steps)
    levels = Levels.of(prior, schedule, settings.error_scale)
    starts, noises = [], []
    for track in tracks:
        latents = prior.encode(track.model.padded).expand(settings.chains, -1, -1, -1)
        signal, noise = levels.numbers[0, :2]
        starts.append(signal * latents + noise * _noise(latents, track.generator))
        # All of it now: an upload would make the loop wait.
        noises.append(
            torch.stack([_noise(latents, track.generator) for _ in schedule[1:]] or [latents])
        )
    device = starts[0].device
    recorders = [Recorder(schedule, track.callback, device) for track in tracks]
    clock = PhaseClock(device)
    _trajectory(
        prior, tracks, states, recorders, clock, levels,
        torch.cat(starts), torch.cat(noises, 1), settings, compile,
    )  # fmt: skip
    seconds = clock.seconds()
    for track, state, recorder in zip(tracks, states, recorders, strict=True):
        state.history = recorder.history()
        state.evaluations = settings.chains * len(schedule)
        state.seconds |= {name: each / len(tracks) for name, each in seconds.items()}
        with state.phase("finish"):
            state.image = finish(track.model, state.image, state.kernel, settings)
    return states


def _trajectory(
    prior: LatentPrior,
    tracks: Sequence[Track],
    states: Sequence[EMState],
    recorders: Sequence[Recorder],
    clock: PhaseClock,
    levels: Levels,
    z: Tensor,
    noises: Tensor,
    settings: ProxSettings,
    compile: str | None,
) -> None:
    """The loop over the noise levels.  Nothing in it may ask a tensor for its value."""
    models = [track.model for track in tracks]
    variances = torch.stack([model.padded.new_full((), model.noise_std**2) for model in models])
    steps = len(levels.timesteps)
    for step in range(steps):
        last = step + 1 == steps
        arguments = (
            prior, models, z, noises[min(step, len(noises) - 1)],
            [state.kernel for state in states], variances,
            levels.timesteps[step], levels.numbers[step], settings,
        )  # fmt: skip
        if compile is None:
            found = step_eagerly(clock.phase, last, *arguments)
        else:
            with clock.phase("e_step"):
                found = step_compiled(compile, *arguments)
        z = found.latents
        for track, state, recorder, image, variance in zip(
            tracks, states, recorders, found.images, found.variances, strict=True
        ):
            state.image = image
            recorder.record(variance, track.model.crop(image), state.kernel)
            if track.kernel is None and not last:
                with clock.phase("m_step"):
                    state.kernel = track.model.update(image, state.kernel, settings.m_step)


def run_paper(
    prior: LatentPrior,
    model: BlurModel,
    settings: PaperSettings,
    generator: torch.Generator,
    *,
    kernel: Tensor | None = None,
    callback: StepCallback | None = None,
) -> EMState:
    """The published EM (arXiv 2407.01027): DDIM, and gradients through all networks.

    1. z_0, epsilon <- prior at z_t; z' = DDIM step with eta = 0
    2. M-step on x_hat = D(z_0)
    3. L = ||k * x_hat - y|| + gamma ||E(glued x_hat) - z_0||
    4. z_{t-1} = z' - s_t grad_{z_t} L
    """
    state = EMState(model.padded, _delta(model) if kernel is None else kernel)
    schedule = descending(prior.timesteps - 1, settings.steps)
    with torch.no_grad():
        z = _noise(prior.encode(model.padded), generator)
    for step, timestep in enumerate(schedule):
        active = takes_gradient(step, len(schedule), every=settings.every, last=settings.last)
        with torch.set_grad_enabled(active):
            z = z.detach().requires_grad_(active)
            with state.phase("prior"):
                z0, epsilon = prior.predict(z, timestep)
                state.evaluations += 1
            if step + 1 < len(schedule):
                abar = float(prior.alphas_cumprod[schedule[step + 1]])
                moved = abar**0.5 * z0 + (1 - abar) ** 0.5 * epsilon
            else:
                moved = z0
            if not active:
                z = moved
                continue
            with state.phase("prior"):
                estimate = prior.decode(z0, model.canvas)
            if kernel is None:
                with state.phase("m_step"):
                    state.kernel = model.m_step(
                        estimate.detach(),
                        state.kernel,
                        image_std=0.5 * prior.error_std(timestep),
                        settings=settings.m_step,
                    )
            with state.phase("e_step"):
                data = (
                    2
                    * ext.blur_data_term(
                        estimate, state.kernel, model.padded, boundary="circular", mask=model.mask
                    )
                ).sqrt()
                glued = _glue(model, estimate, state.kernel, settings.gluing_adjoint)
                loss = data.sum() + settings.gluing * (prior.encode(glued) - z0).norm()
                (gradient,) = torch.autograd.grad(loss, z)
                state.backward_passes += 1
                residual = float(data.detach()) / model.observation.numel() ** 0.5
                weight = settings.step_size * annealing(
                    settings.annealing, timestep / (prior.timesteps - 1), residual / model.noise_std
                )
                z = (moved - weight * gradient).detach()
            state.image = estimate.detach()
            state.record(model, step, len(schedule), timestep, residual, callback)
    with torch.no_grad():
        state.image = prior.decode(z.detach(), model.canvas)
    return state


def _delta(model: BlurModel) -> Tensor:
    kernel = torch.zeros_like(model.initial_kernel())
    kernel[..., model.kernel_size // 2, model.kernel_size // 2] = 1
    return kernel


def _glue(model: BlurModel, estimate: Tensor, kernel: Tensor, adjoint: bool) -> Tensor:
    """The image with its observed part corrected: ``x + A' (y - A x)``, or without A'."""
    misfit = model.mask * (model.padded - model.simulate(estimate, kernel))
    if adjoint:
        misfit = ext.blur_conv2d_adjoint(misfit, kernel, boundary="circular")
    return estimate + misfit
