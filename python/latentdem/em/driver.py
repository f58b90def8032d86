"""``deblur``: blind deblurring of one photograph or a batch."""

from __future__ import annotations

import copy
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import latentdem_ext as ext
from latentdem.devices import dtype_name
from latentdem.em.memory import memory_kind
from latentdem.em.models import ModelOptions
from latentdem.em.options import (
    check_coding_noise,
    check_compile,
    check_options,
    placement,
    solver_settings,
)
from latentdem.em.recording import unrecorded
from latentdem.em.result import DeblurResult
from latentdem.em.settings import PaperSettings, ProxSettings, for_kernel_alone
from latentdem.em.sharp import SHARP, untouched
from latentdem.em.steps import EMState, StepReport, Track
from latentdem.em.tiles import WINDOW, informative_window, request_key, solve_in_tiles
from latentdem.em.together import Batches, check_batch_size
from latentdem.io import ImageLike, InputError, to_batch
from latentdem.noise import coding_noise_std as noise_of_coding
from latentdem.noise import estimate_noise_std
from latentdem.operators.initialization import find_kernel, touches_frame
from latentdem.operators.super_resolution import upsample
from latentdem.priors.kernel import KernelDenoiserNet, load_kernel_prior
from latentdem.priors.latent import LatentPrior, load_prior, weights_digest

DOT = 0.2
"""A kernel whose largest value is above this blurs over few pixels, if at all."""

Progress = Callable[[int, int, StepReport], None]
"""Called as ``progress(index of the image, number of images, report)`` at every step."""


@lru_cache(maxsize=1)
def _packaged() -> tuple[LatentPrior, KernelDenoiserNet]:
    return load_prior(), load_kernel_prior()


def deblur(
    image: ImageLike,
    *,
    prior: LatentPrior | None = None,
    kernel_prior: KernelDenoiserNet | None = None,
    kernel: Tensor | None = None,
    kernel_size: int | None = None,
    noise_std: float | None = None,
    coding_noise_std: float | Sequence[float] | None = None,
    blur: str = "motion",
    scale: int = 1,
    grid: int | tuple[int, int] = 1,
    method: str = "prox",
    steps: int | None = None,
    quality: str = "standard",
    seed: int = 0,
    boundary: str = "auto",
    tile: int | None = 640,
    assume_blurred: bool = False,
    linear_light: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    compile: str | None = None,
    slicing: bool = False,
    tiling: bool = False,
    batch_size: int | str = 1,
    settings: ProxSettings | PaperSettings | None = None,
    progress: Progress | None = None,
) -> DeblurResult:
    """Recover the sharp image and the blur kernel from a blurred image alone.

    Args:
        image: path, PIL image, array ``[H,W(,C)]`` or tensor ``[(B,)C,H,W]`` in [0, 1]; grey,
            RGB or RGBA (alpha is passed through), any size.
        prior: latent diffusion prior; by default the packaged one.
        kernel_prior: kernel denoiser of the M-step; by default the packaged one.
        kernel: the blur kernel ``[1,1,k,k]`` (with a grid ``[1,P,k,k]``) if it is known; only
            the image is sought then.
        kernel_size: odd side of the kernel in pixels, at least the length of the blur.  By
            default a tenth of the image's shorter side, between 9 and 35, and of motion blur as
            much more, up to 65, as it takes for the kernel not to touch its frame.
        blur: ``motion`` (a kernel of any shape), ``defocus`` (a disc of unknown radius) or
            ``gaussian`` (of unknown width).
        scale: 2 to 4 for blind super-resolution: the photograph is blurred by an unknown kernel
            and ``scale`` times too small.
        grid: rows and columns (or one number for both) of a blur that differs over the
            photograph, each patch with a kernel of its own, cross-faded.
        noise_std: noise of the observation in [0, 1] units; estimated by default.
        coding_noise_std: what lossy coding left of it, of all images or of each, where noise is
            estimated.  By default a JPEG's own tables tell (of a path, or a PIL image as
            ``Image.open`` gave it), and of others nothing is known, 0.
        method: ``prox`` (proximal E-step) or ``paper`` (the published gradients).
        steps: steps of the reverse trajectory; by default the method's own.
        quality: of ``prox``: ``standard``, or ``fast``, in half the time; the README
            tells what it costs.
        seed: seed of all random numbers; the same seed gives the same result.  Every image of
            a batch starts from it, so results do not depend on batch mates.
        boundary: ``valid`` (nothing is known beyond the border, what cameras do; also
            ``auto``), or ``circular``.
        tile: photographs of more than twice its square are restored in tiles of at most this
            side, which bounds memory and time: the kernel is found in their most informative
            window.  None: never.
        assume_blurred: deblur what looks sharp, too.  By default a photograph that a classifier
            is sure to be sharp is left as it is, with a warning in the report.
        linear_light: blur adds light, and not the values of a file, in which sRGB's curve has
            compressed it.  For photographs as a camera wrote them; not with method ``paper``.
        checkpoint: folder that finished tiles are kept in; the same call goes on from there.
        device: where to compute: ``cpu``, ``cuda``, ``cuda:1`` ...; by default where the prior is
            (the packaged one: on the CPU).  The result is on the CPU.
        dtype: of the networks, ``fp16``, ``bf16`` or ``fp32`` (or torch's own); by default float16
            on CUDA and the prior's own elsewhere.  ``auto``, the commands' default, takes
            bfloat16 on processors that have instructions for it: half the networks' time there.
            Data term and kernel are float32.
        compile: compile the E-step into one graph, in a mode of :func:`torch.compile`: ``default``,
            or with CUDA graphs ``reduce-overhead`` or ``max-autotune``.  Worth it for many
            photographs of one size: the first one waits for the compiler.
        slicing: pictures pass the autoencoder one by one, which takes less memory and more time.
        tiling: the autoencoder works in overlapping tiles, for canvases that it could not hold.
        batch_size: photographs of a batch that the networks see at once (method ``prox``), or
            ``auto``: as many as fit on a GPU, one on a CPU.
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
    if coding_noise_std is None:
        coding_noise_std = noise_of_coding(image)
    codings = check_coding_noise(coding_noise_std, len(batch))
    patches = (grid, grid) if isinstance(grid, int) else grid
    model_options = ModelOptions(blur, scale, patches, linear_light)
    if kernel is not None:
        kernel = model_options.check_kernel(kernel)
        kernel_size = kernel.shape[-1]
    automatic = kernel_size is None and model_options.searches_size
    if kernel_size is None:
        kernel_size = model_options.default_kernel_size(height, width)
    check_options(kernel_size, method, boundary, noise_std, tile)
    check_compile(compile, method)
    check_batch_size(batch_size)
    if kernel_size > min(height, width) * scale:
        raise InputError(
            f"kernel_size {kernel_size} is larger than the image ({height} x {width} pixels)"
        )
    model_options.check_method(method)
    options = solver_settings(method, steps, settings, quality)
    defaults = _packaged() if prior is None or kernel_prior is None else (prior, kernel_prior)
    used, used_kernel = prior or defaults[0], kernel_prior or defaults[1]
    place, dtype = placement(device, dtype, used.device)
    used = used.to(place, dtype)
    if slicing or tiling:
        used = used.economical(slicing=slicing or used.slicing, tiling=tiling)
    if next(used_kernel.parameters()).device != place:
        used_kernel = copy.deepcopy(used_kernel).to(place)
    kernel = None if kernel is None else kernel.to(place)
    started = time.perf_counter()
    sigmas: list[float] = []
    sizes: list[int] = []
    searches: list[float] = []
    sharp_odds: list[float] = []
    sharp: set[int] = set()
    may_be_sharp = kernel is None and scale == 1 and not assume_blurred
    limit = "valid" if boundary == "auto" else boundary
    large = tile is not None and limit == "valid" and height * width * scale**2 > 2 * tile**2
    tiled = large and scale == 1 and not model_options.varies
    if large and not tiled:
        raise InputError(
            f"super-resolution and varying blur work in one piece, and {height} x {width} pixels "
            "are many: crop or shrink the photograph, or pass tile=None (--tile 0) and have memory"
        )
    tiles: list[dict[str, Any]] = []
    batches = Batches(used, options, batch_size=batch_size, compile=compile)
    for index, observed in enumerate(batch.split(1)):
        colour = observed[:, :3]
        sigma = estimate_noise_std(colour, codings[index]) if noise_std is None else noise_std

        def callback(report: StepReport, index: int = index) -> None:
            if progress is not None:
                progress(index, len(batch), report)

        whole = colour.expand(-1, 3, -1, -1).to(place).contiguous()
        if may_be_sharp:
            odds, as_it_is = untouched(whole, kernel_size, model_options.patches)
            sharp_odds.append(odds)
            if as_it_is is not None:
                batches.states[index] = as_it_is
                sharp.add(index)
                sizes.append(kernel_size)
                sigmas.append(sigma)
                searches.append(0.0)
                tiles += [{}] if tiled else []
                continue
        size, first, searching = kernel_size, None, time.perf_counter()
        if automatic:
            top, left, tall, wide = (0, 0, height, width)
            if tiled:
                top, left, tall, wide = informative_window(whole, WINDOW)
            with unrecorded():
                first = find_kernel(
                    model_options.light(whole[..., top : top + tall, left : left + wide]),
                    smallest=kernel_size,
                    largest=max(kernel_size, model_options.largest_kernel_size(tall, wide)),
                    boundary=limit,
                    kernel_prior=used_kernel,
                )
            size = first.shape[-1]
        searches.append(time.perf_counter() - searching)
        sizes.append(size)
        sigmas.append(sigma)
        told = None if progress is None else callback

        def prepare(
            part: Tensor,
            known: Tensor | None,
            own_seed: int,
            callback: Callable[[StepReport], None] | None,
            sigma: float = sigma,
            size: int = size,
            first: Tensor | None = None if tiled or model_options.varies else first,
        ) -> Track:
            model = model_options.build(
                part,
                kernel_size=size,
                noise_std=sigma,
                boundary=limit,
                kernel_prior=used_kernel,
            )
            # What told the size is one of those that a model which searches will try.
            given = None if model.searches else first
            return Track(model, torch.Generator().manual_seed(own_seed), known, given, callback)

        def solve(
            part: Tensor,
            known: Tensor | None,
            own_seed: int,
            callback: Callable[[StepReport], None],
            prepare: Callable[..., Track] = prepare,
        ) -> EMState:
            track = prepare(part, known, own_seed, callback)
            return batches.solve(track, kernel_alone=known is None)

        if tiled:
            assert tile is not None
            facts: dict[str, object] = {}
            if checkpoint is not None:
                facts = {
                    "settings": asdict(options),
                    "blur": blur,
                    "numbers": [sigma, size, seed, tile],
                    "weights": [*used.digests(), weights_digest(used_kernel)],
                    "versions": versions(),
                }
                # Parts from before there was this stay what was asked for.
                facts |= {"linear_light": True} if linear_light else {}
            found = solve_in_tiles(
                whole,
                solve,
                kernel=kernel,
                kernel_size=size,
                steps=options.steps,
                kernel_steps=for_kernel_alone(options).steps,
                tile=tile,
                seed=seed,
                checkpoint=None if checkpoint is None else Path(checkpoint) / f"{index:03d}",
                key=request_key(whole, kernel, facts),
                callback=told,
            )
            batches.states[index] = found.state
            tiles.append({"window": found.window, "tiles": found.tiles})
        else:
            batches.add(index, prepare(whole, kernel, seed, told))
    batches.finish()
    states = [batches.states[index] for index in range(len(batch))]
    for state, searched in zip(states, searches, strict=True):
        if automatic and "first_kernel" in state.seconds:
            state.seconds["first_kernel"] += searched
    images = [
        x if index in sharp else _like_input(state.image, x, scale)
        for index, (state, x) in enumerate(zip(states, batch.split(1), strict=True))
    ]
    warnings = [
        [SHARP] if index in sharp else [] if kernel is not None else kernel_warnings(state.kernel)
        for index, state in enumerate(states)
    ]
    seconds = time.perf_counter() - started
    return DeblurResult(
        image=torch.cat(images),
        kernel=_stack_kernels([state.kernel.cpu() for state in states]),
        observation=batch,
        history=[state.history for state in states],
        report={
            "method": method,
            "quality": quality,
            "seed": seed,
            "kernel_size": max(sizes),
            "kernel_sizes": sizes,
            "kernel_size_estimated": automatic,
            "kernel_given": kernel is not None,
            "noise_std": sigmas,
            "noise_std_estimated": noise_std is None,
            "coding_noise_std": codings,
            "boundary": limit,
            "blur": blur,
            "scale": scale,
            "grid": list(model_options.grid),
            "linear_light": linear_light,
            "tiling": tiling,
            "tiles": tiles,
            "settings": asdict(options),
            "prior": used.name,
            "device": str(place),
            "dtype": dtype_name(used.dtype),
            "image_size": [height, width],
            "peak_memory_bytes": [state.peak_memory_bytes for state in states],
            "peak_memory_kind": memory_kind(place),
            "seconds": round(seconds, 3),
            "seconds_by_phase": _add_up([state.seconds for state in states]),
            "network_evaluations": sum(state.evaluations for state in states),
            "backward_passes": sum(state.backward_passes for state in states),
            "residual_std": [state.history[-1]["residual_std"] for state in states],
            "sharp_log_odds": sharp_odds,
            "assume_blurred": assume_blurred,
            "warnings": warnings,
            "versions": versions(),
        },
    )


def _like_input(restored: Tensor, observed: Tensor, scale: int) -> Tensor:
    """The restored ``[1,3,H,W]`` on the CPU, in [0, 1] and in the observation's channels."""
    restored = restored.clamp(0, 1).cpu()
    colour, alpha = observed[:, :3], observed[:, 3:]
    if colour.shape[1] == 1:
        restored = restored.mean(1, keepdim=True)
    if alpha.shape[1]:
        restored = torch.cat([restored, upsample(alpha, scale).clamp(0, 1)], 1)
    return restored


def kernel_warnings(kernel: Tensor) -> list[str]:
    """What a found kernel ``[1,P,k,k]`` says against itself; one line each."""
    warnings = []
    if float(kernel.amax((-2, -1)).mean()) > DOT:
        warnings.append(
            "the kernel is little more than a dot: the photograph may be sharp already, and the "
            "result worse than it"
        )
    if touches_frame(kernel.mean(1, keepdim=True)):
        warnings.append("the kernel touches its frame: a larger kernel_size may be needed")
    return warnings


def _stack_kernels(kernels: list[Tensor]) -> Tensor:
    """``[B,P,k,k]`` of kernels of any odd sides: smaller ones get a frame of zeros."""
    side = max(kernel.shape[-1] for kernel in kernels)
    frames = [(side - kernel.shape[-1]) // 2 for kernel in kernels]
    return torch.cat([F.pad(kernel, (f, f, f, f)) for kernel, f in zip(kernels, frames)])


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
