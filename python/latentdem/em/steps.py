"""The E-steps: what one method does to the latent at one noise level."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.profiler import record_function

import latentdem_ext as ext
from latentdem.em.finish import finish
from latentdem.em.schedules import annealing, descending, takes_gradient
from latentdem.em.settings import PaperSettings, ProxSettings
from latentdem.operators.blur import BlurModel
from latentdem.operators.forward_model import ForwardModel
from latentdem.priors.finishing import FinishingNet
from latentdem.priors.latent import LatentPrior

StepCallback = Callable[["StepReport"], None]

PHASE = "latentdem."
"""Before the names of the phases in a profile."""


@dataclass
class StepReport:
    """What one step leaves behind, for the history, the progress bar, and pictures.

    Args:
        step: from zero.
        steps: of the whole run.
        timestep: t.
        residual_std: root mean square residual over the observed pixels.
        kernel_peak: largest value of the kernel.
        image: current estimate under the observation, ``[1,3,H,W]``, not clamped.
        kernel: current parameters of the forward model; of a blur ``[1,1,k,k]``.
    """

    step: int
    steps: int
    timestep: int
    residual_std: float
    kernel_peak: float
    image: Tensor = field(repr=False)
    kernel: Tensor = field(repr=False)


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


@torch.no_grad()
def run_prox(
    prior: LatentPrior,
    model: ForwardModel,
    settings: ProxSettings,
    generator: torch.Generator,
    *,
    kernel: Tensor | None = None,
    first_kernel: Tensor | None = None,
    finishing: FinishingNet | None = None,
    callback: StepCallback | None = None,
) -> EMState:
    """EM with the proximal E-step.

    ``kernel``: the parameters, if they are known, so that only the image is sought.
    ``first_kernel``: what step 0 would give.  ``finishing``: the network of step 5, or none.

    0. first parameters from the observation; of a blur from its edges, coarse to fine
    1. z_0 <- prior at z_t; x_hat = D(z_0)
    2. E-step: x* = prox of the data term at x_hat with s^2 / r_t^2, where
       s^2 = sigma^2 + excess residual
    3. M-step: parameters from the chains' mean of x*; of a blur from its salient edges
    4. z* = z_0 + E(x*) - E(x_hat), and
       z_{t'} = sqrt(abar') z* + sqrt(1 - abar') (predicted and fresh noise)
    5. after the last level: total variation takes what the inverse of the blur amplified, the
       mean with a deconvolution under sparse gradients follows, and a network corrects that
    """
    blind = kernel is None
    state = EMState(model.padded, torch.empty(0))
    with state.phase("first_kernel"):
        if kernel is None:
            kernel = first_kernel
        state.kernel = model.start_parameters() if kernel is None else kernel
    schedule = descending(round(settings.start * (prior.timesteps - 1)), settings.steps)
    abar = float(prior.alphas_cumprod[schedule[0]])
    latents = prior.encode(model.padded).expand(settings.chains, -1, -1, -1)
    z = abar**0.5 * latents + (1 - abar) ** 0.5 * _noise(latents, generator)
    for step, timestep in enumerate(schedule):
        with state.phase("prior"):
            z0, _ = prior.predict(z, timestep)
            estimate = prior.decode(z0, model.canvas)
            state.evaluations += settings.chains
        with state.phase("e_step"):
            variance = model.residual_variance(estimate, state.kernel)
            excess = max(0.0, variance - model.noise_std**2)
            s2 = model.noise_std**2 + settings.excess_weight * excess
            r = settings.error_scale * prior.error_std(timestep)
            images = model.proximal(
                estimate, state.kernel, ratio=s2 / r**2, imputations=settings.imputations
            )
            state.image = images.mean(0, keepdim=True)
        residual = model.residual_variance(state.image, state.kernel) ** 0.5
        state.record(model, step, len(schedule), timestep, residual, callback)
        if step + 1 == len(schedule):
            break
        if blind:
            with state.phase("m_step"):
                state.kernel = model.update(state.image, state.kernel, settings.m_step)
        with state.phase("encoder"):
            # One by one, which bounds the memory of the full-resolution layers.
            change = torch.cat([prior.encode(x[None]) for x in (*images, *estimate)])
            target = z0 + change[: len(z0)] - change[len(z0) :]
            abar = float(prior.alphas_cumprod[timestep])
            predicted = (z - abar**0.5 * target) / (1 - abar) ** 0.5
            abar = float(prior.alphas_cumprod[schedule[step + 1]])
            fresh = settings.fresh_noise
            noise = (1 - fresh) ** 0.5 * predicted + fresh**0.5 * _noise(z, generator)
            z = abar**0.5 * target + (1 - abar) ** 0.5 * noise
    with state.phase("finish"):
        state.image = finish(model, images, state.kernel, settings, finishing)
    return state


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
