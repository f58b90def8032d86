"""``deblur``: blind deblurring of one photograph or a batch."""

from __future__ import annotations

import copy
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import latentdem_ext as ext
from latentdem.devices import find_device
from latentdem.em.result import DeblurResult
from latentdem.em.settings import PaperSettings, ProxSettings
from latentdem.em.steps import EMState, StepReport, run_paper, run_prox
from latentdem.em.tiles import request_key, solve_in_tiles
from latentdem.io import ImageLike, InputError, to_batch
from latentdem.operators.blur import BOUNDARIES, BlurModel
from latentdem.priors.kernel import KernelDenoiserNet, load_kernel_prior
from latentdem.priors.latent import LatentPrior, load_prior, weights_digest

METHODS = ("prox", "paper")
Progress = Callable[[int, int, StepReport], None]
"""Called as ``progress(index of the image, number of images, report)`` at every step."""


@lru_cache(maxsize=1)
def _packaged() -> tuple[LatentPrior, KernelDenoiserNet]:
    return load_prior(), load_kernel_prior()


def estimate_noise_std(image: Tensor) -> float:
    """Noise of ``image [1,C,H,W]`` from its finest diagonal detail: median(|HH|) / 0.6745.

    Source: Donoho and Johnstone 1994, with the Haar wavelet.  Blur leaves this band to the noise.
    Never below 0.002, half a step of 8-bit quantisation.
    """
    height, width = (side // 2 * 2 for side in image.shape[-2:])
    if min(height, width) < 2:
        return 0.01
    x = image[..., :height, :width]
    detail = x[..., ::2, ::2] - x[..., 1::2, ::2] - x[..., ::2, 1::2] + x[..., 1::2, 1::2]
    return max(0.002, float((detail / 2).abs().median()) / 0.6745)


def default_kernel_size(height: int, width: int) -> int:
    """An odd tenth of the shorter side, from 9 to 35 pixels: room for a visible blur."""
    side = min(height, width)
    size = min(max(side // 10, 9), 35) // 2 * 2 + 1
    return min(size, side - (1 - side % 2))


def deblur(
    image: ImageLike,
    *,
    prior: LatentPrior | None = None,
    kernel_prior: KernelDenoiserNet | None = None,
    kernel: Tensor | None = None,
    kernel_size: int | None = None,
    noise_std: float | None = None,
    method: str = "prox",
    steps: int | None = None,
    seed: int = 0,
    boundary: str = "auto",
    tile: int | None = 640,
    checkpoint: str | os.PathLike[str] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    settings: ProxSettings | PaperSettings | None = None,
    progress: Progress | None = None,
) -> DeblurResult:
    """Recover the sharp image and the blur kernel from a blurred image alone.

    Args:
        image: path, PIL image, array ``[H,W(,C)]`` or tensor ``[(B,)C,H,W]`` in [0, 1]; grey,
            RGB or RGBA (alpha is passed through), any size.
        prior: latent diffusion prior; by default the packaged one.
        kernel_prior: kernel denoiser of the M-step; by default the packaged one.
        kernel: the blur kernel ``[1,1,k,k]`` if it is known; only the image is sought then.
        kernel_size: odd side of the kernel in pixels, at least the length of the blur; by
            default a tenth of the image's shorter side, between 9 and 35.
        noise_std: noise of the observation in [0, 1] units; estimated by default.
        method: ``prox`` (proximal E-step) or ``paper`` (the published gradients).
        steps: steps of the reverse trajectory; by default the method's own.
        seed: seed of all random numbers; the same seed gives the same result.  Every image of
            a batch starts from it, so results do not depend on batch mates.
        boundary: ``valid`` (nothing is known beyond the border, what cameras do; also
            ``auto``), or ``circular``.
        tile: photographs of more than twice its square are restored in tiles of this side, which
            bounds memory and time: the kernel is found in their most informative window.  None:
            never.
        checkpoint: folder that finished tiles are kept in; the same call goes on from there.
        device: where to compute: ``cpu``, ``cuda``, ``cuda:1`` ...; by default where the prior is
            (the packaged one: on the CPU).  The result is on the CPU.
        dtype: of the networks; by default float16 on CUDA and the prior's own elsewhere.  Data
            term and kernel are float32.
        settings: everything else, a :class:`ProxSettings` or :class:`PaperSettings`.
        progress: called at every step.

    Returns:
        See :class:`DeblurResult`.

    Raises:
        ValueError: input or option that cannot be used; one line that says why.

    >>> import latentdem
    >>> result = latentdem.deblur("blurred.jpg", kernel_size=25)  # doctest: +SKIP
    >>> result.save("out")  # doctest: +SKIP
    """
    batch = to_batch(image)
    height, width = batch.shape[-2:]
    if kernel is not None:
        kernel = _check_kernel(kernel)
        kernel_size = kernel.shape[-1]
    size = default_kernel_size(height, width) if kernel_size is None else kernel_size
    check_options(size, method, boundary, noise_std, tile)
    if size > min(height, width):
        raise InputError(f"kernel_size {size} is larger than the image ({height} x {width} pixels)")
    options = solver_settings(method, steps, settings)
    defaults = _packaged() if prior is None or kernel_prior is None else (prior, kernel_prior)
    used, used_kernel = prior or defaults[0], kernel_prior or defaults[1]
    place = used.device if device is None else check_device(device)
    if dtype is None and place.type == "cuda" and device is not None:
        dtype = torch.float16
    used = used.to(place, dtype)
    if next(used_kernel.parameters()).device != place:
        used_kernel = copy.deepcopy(used_kernel).to(place)
    kernel = None if kernel is None else kernel.to(place)
    started = time.perf_counter()
    states: list[EMState] = []
    images: list[Tensor] = []
    sigmas: list[float] = []
    limit = "valid" if boundary == "auto" else boundary
    tiled = tile is not None and limit == "valid" and height * width > 2 * tile**2
    tiles: list[dict[str, Any]] = []
    for index, observed in enumerate(batch.split(1)):
        colour, alpha = observed[:, :3], observed[:, 3:]
        sigma = estimate_noise_std(colour) if noise_std is None else noise_std

        def callback(report: StepReport, index: int = index) -> None:
            if progress is not None:
                progress(index, len(batch), report)

        def solve(
            part: Tensor,
            known: Tensor | None,
            own_seed: int,
            callback: Callable[[StepReport], None],
            sigma: float = sigma,
        ) -> EMState:
            model = BlurModel(
                part,
                kernel_size=size,
                noise_std=sigma,
                boundary=limit,
                kernel_prior=used_kernel,
            )
            generator = torch.Generator().manual_seed(own_seed)
            if isinstance(options, ProxSettings):
                found = run_prox(used, model, options, generator, kernel=known, callback=callback)
            else:
                found = run_paper(used, model, options, generator, kernel=known, callback=callback)
            found.image = model.crop(found.image)
            return found

        whole = colour.expand(-1, 3, -1, -1).to(place).contiguous()
        if tiled:
            assert tile is not None
            facts: dict[str, object] = {}
            if checkpoint is not None:
                facts = {
                    "settings": asdict(options),
                    "numbers": [sigma, size, seed, tile],
                    "weights": [
                        weights_digest(net)
                        for net in (used.autoencoder, used.denoiser, used_kernel)
                    ],
                    "versions": versions(),
                }
            found = solve_in_tiles(
                whole,
                solve,
                kernel=kernel,
                kernel_size=size,
                steps=options.steps,
                tile=tile,
                seed=seed,
                checkpoint=None if checkpoint is None else Path(checkpoint) / f"{index:03d}",
                key=request_key(whole, kernel, facts),
                callback=callback,
            )
            state = found.state
            tiles.append({"window": found.window, "tiles": found.tiles})
        else:
            state = solve(whole, kernel, seed, callback)
        restored = state.image.clamp(0, 1).cpu()
        if colour.shape[1] == 1:
            restored = restored.mean(1, keepdim=True)
        images.append(torch.cat([restored, alpha], 1))
        states.append(state)
        sigmas.append(sigma)
    seconds = time.perf_counter() - started
    return DeblurResult(
        image=torch.cat(images),
        kernel=torch.cat([state.kernel.cpu() for state in states]),
        observation=batch,
        history=[state.history for state in states],
        report={
            "method": method,
            "seed": seed,
            "kernel_size": size,
            "kernel_given": kernel is not None,
            "noise_std": sigmas,
            "noise_std_estimated": noise_std is None,
            "boundary": limit,
            "tiles": tiles,
            "settings": asdict(options),
            "prior": used.name,
            "device": str(place),
            "dtype": str(used.dtype).removeprefix("torch."),
            "image_size": [height, width],
            "seconds": round(seconds, 3),
            "seconds_by_phase": _add_up([state.seconds for state in states]),
            "network_evaluations": sum(state.evaluations for state in states),
            "backward_passes": sum(state.backward_passes for state in states),
            "residual_std": [state.history[-1]["residual_std"] for state in states],
            "versions": versions(),
        },
    )


def check_device(name: torch.device | str) -> torch.device:
    """The device called ``name``, if this machine and the native module have it.

    Raises:
        InputError: they don't; a line that says what to do.
    """
    try:
        device = find_device(name, "the operators run")
    except ValueError as error:
        raise InputError(str(error)) from None
    if device.type == "cuda" and not ext.build_info()["cuda"]:
        raise InputError(
            f"device '{name}' cannot be used: latentdem_ext was built without CUDA; build it "
            "beside a CUDA torch and its nvcc with LATENTDEM_CUDA=on"
        )
    return device


def _add_up(seconds: list[dict[str, float]]) -> dict[str, float]:
    """Seconds of each phase over all images."""
    phases = dict.fromkeys(phase for image in seconds for phase in image)
    return {p: round(sum(image.get(p, 0.0) for image in seconds), 3) for p in phases}


def versions() -> dict[str, str]:
    """Versions that a result depends on."""

    def of(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    return {
        "latentdem": str(ext.build_info()["version"]),
        "torch": torch.__version__,
        "diffusers": of("diffusers"),
        "python": platform.python_version(),
    }


def _check_kernel(kernel: Any) -> Tensor:
    kernel = torch.as_tensor(kernel, dtype=torch.float32)
    kernel = kernel.reshape(1, 1, *kernel.shape[-2:])
    if kernel.shape[-1] != kernel.shape[-2]:
        raise InputError(f"kernel must be square, found {tuple(kernel.shape[-2:])}")
    if not torch.isfinite(kernel).all() or float(kernel.min()) < 0 or float(kernel.sum()) <= 0:
        raise InputError("kernel must be finite, non-negative and not all zero")
    return kernel / kernel.sum()


def check_options(
    kernel_size: int, method: str, boundary: str, noise_std: float | None, tile: int | None
) -> None:
    """Check what can be checked of :func:`deblur`'s options before there is an image.

    Raises:
        InputError: an option that no image can be deblurred with.
    """
    if method not in METHODS:
        raise InputError(f"method must be one of {', '.join(METHODS)}, found '{method}'")
    if boundary not in BOUNDARIES:
        raise InputError(f"boundary must be one of {', '.join(BOUNDARIES)}, found '{boundary}'")
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise InputError(f"kernel_size must be odd and positive, found {kernel_size}")
    if noise_std is not None and not 0 < noise_std < 1:
        raise InputError(f"noise_std must lie between 0 and 1, found {noise_std}")
    if tile is not None and tile < 64:
        raise InputError(f"tile must be at least 64 pixels, or None, found {tile}")


def solver_settings(
    method: str, steps: int | None, settings: ProxSettings | PaperSettings | None = None
) -> ProxSettings | PaperSettings:
    """The settings of ``method``: those given, or its own, with ``steps`` put in.

    Raises:
        ValueError: settings of the other method, or steps that cannot be taken.
    """
    kind = ProxSettings if method == "prox" else PaperSettings
    if settings is None:
        settings = kind()
    if not isinstance(settings, kind):
        raise InputError(
            f"method '{method}' takes {kind.__name__}, found {type(settings).__name__}"
        )
    return settings if steps is None else replace(settings, steps=steps)
