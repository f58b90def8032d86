"""What a job of the page does: deblur a photograph, or reconstruct an object."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import latentdem
from latentdem.em.sharp import SHARP
from latentdem.em.steps import StepReport
from latentdem.io import InputError, from_pil, kernel_picture, to_pil
from latentdem.noise import coding_noise_std
from latentdem.serve.files import check_picture, open_picture, zip_files
from latentdem.serve.jobs import Job, Limits
from latentdem.serve.models import Models

SHOWN = 640
"""Longer side of the pictures that are shown while a run is going on."""

SLIDER = 1600
"""Longer side of those in the comparison; the downloads have them all."""

MOST_VIEWS = 8
"""Pictures of one object; all pairs of them are compared."""

ARCHIVE = "latentdem.zip"

SHARP_ADVICE = (
    "The photograph looks sharp, so it was left as it is. More options has a box to deblur it all "
    "the same."
)


@dataclass(frozen=True)
class DeblurRequest:
    """What was asked for.

    Args:
        photo: the file.
        side: longer side to shrink it to; None: as it is.
        kernel_size: as in :func:`latentdem.deblur`, as are the others.
        noise_std: see there.
        steps: see there.
        seed: see there.
        assume_blurred: see there.
    """

    photo: Path
    side: int | None = None
    kernel_size: int | None = None
    noise_std: float | None = None
    steps: int | None = None
    seed: int = 0
    assume_blurred: bool = False


@dataclass(frozen=True)
class DeblurFrame:
    """One step: pictures of image and kernel, and name and value of what is known, in words."""

    step: int
    steps: int
    image: Image.Image
    kernel: Image.Image
    facts: list[tuple[str, str]]


@dataclass(frozen=True)
class DeblurAnswer:
    """A finished deblurring.

    Args:
        before: picture of the photograph, as large as ``after``.
        after: picture of the result.
        kernel: picture of the kernel.
        facts: name and value, in words.
        advice: what to do next, one line each.
        files: for download, the archive of all of them last.
    """

    before: Path
    after: Path
    kernel: Path
    facts: list[tuple[str, str]]
    advice: list[str]
    files: list[Path]


def deblur(
    request: DeblurRequest, folder: Path, limits: Limits, models: Models | None = None
) -> Callable[[Job], DeblurAnswer]:
    """Work for :meth:`latentdem.serve.jobs.Worker.submit`; results go to ``folder``.

    Raises:
        InputError: the photograph cannot be taken (at once, not in the worker).
    """
    check_picture(request.photo, limits)
    options = (models or Models()).of_deblur()

    def work(job: Job) -> DeblurAnswer:
        photo = from_pil(open_picture(request.photo, limits))
        original, photo = photo, _shrink(photo, request.side)
        # Shrinking averages blocks and errors: then the pixels tell what is left of them.
        coding = coding_noise_std(request.photo) if photo is original else 0.0

        def show(index: int, count: int, report: StepReport) -> None:
            kernel = kernel_picture(report.kernel[0, 0], 256)
            picture = to_pil(_shrink(report.image, SHOWN)[0])
            height, width = report.image.shape[-2:]
            size = report.kernel.shape[-1]
            facts = [
                ("Picture", f"{width} x {height} pixels"),
                ("Kernel", f"{size} x {size} pixels"),
                ("Residual", f"{100 * report.residual_std:.2f} % of white"),
                ("Noise level", f"t = {report.timestep}"),
            ]
            job.report(DeblurFrame(report.step, report.steps, picture, kernel, facts))

        result = latentdem.deblur(
            photo,
            kernel_size=request.kernel_size,
            noise_std=request.noise_std,
            coding_noise_std=coding,
            steps=request.steps,
            seed=request.seed,
            assume_blurred=request.assume_blurred,
            progress=show,
            **options,
        )
        job.check()
        result.report |= {"input": request.photo.name, "longer_side": request.side}
        result.save(folder)
        before, after = folder / "before.png", folder / "after.png"
        to_pil(_shrink(result.observation, SLIDER)[0]).save(before)
        to_pil(_shrink(result.image, SLIDER)[0]).save(after)
        large = folder / "kernel_large.png"
        kernel_picture(result.kernel[0, 0], 512).save(large)
        names = ("restored.png", "kernel.png", "kernel.npy", "comparison.png", "report.json")
        files = [folder / name for name in names]
        return DeblurAnswer(
            before=before,
            after=after,
            kernel=large,
            facts=_deblur_facts(result.report, result.kernel[0, 0]),
            advice=[SHARP_ADVICE]
            if SHARP in result.report["warnings"][0]
            else deblur_advice(result.kernel[0, 0], result.report["noise_std"][0]),
            files=[*files, zip_files(folder / ARCHIVE, files)],
        )

    return work


def blur_extent(kernel: Tensor) -> tuple[int, int]:
    """Width and height in pixels of what is above a tenth of the peak of ``kernel [k,k]``.

    >>> kernel = torch.zeros(9, 9)
    >>> kernel[4, 2:7] = 0.2
    >>> blur_extent(kernel)
    (5, 1)
    """
    inside = kernel > 0.1 * kernel.max()
    rows, columns = (torch.nonzero(inside.any(axis))[:, 0] for axis in (1, 0))
    return int(columns[-1] - columns[0]) + 1, int(rows[-1] - rows[0]) + 1


def deblur_advice(kernel: Tensor, noise_std: float) -> list[str]:
    """What to try next, as ``kernel [k,k]`` and the noise that was taken suggest."""
    size = kernel.shape[-1]
    width, height = blur_extent(kernel)
    lines = []
    if max(width, height) >= size - 1:
        lines.append(
            f"The kernel reaches its frame. Try a larger kernel size, such as {size // 2 * 3 | 1}."
        )
    elif float(kernel.max()) > 0.5:
        lines.append(
            "The kernel is nearly a dot: the photograph may be sharp already, or the blur differs "
            "from place to place."
        )
    more = max(0.01, round(2 * noise_std, 3))
    lines.append(
        f"If edges ring, or it is grainy: give a noise of {more:g}, or a kernel size just above "
        "the length of the blur."
    )
    return lines


def _deblur_facts(report: dict[str, Any], kernel: Tensor) -> list[tuple[str, str]]:
    height, width = report["image_size"]
    across, down = blur_extent(kernel)
    found = "estimated" if report["noise_std_estimated"] else "given"
    return [
        ("Picture", f"{width} x {height} pixels"),
        ("Time", f"{report['seconds']:.0f} s, {report['settings']['steps']} steps"),
        ("Noise", f"{100 * report['noise_std'][0]:.1f} % of white, {found}"),
        ("Kernel", f"{report['kernel_size']} x {report['kernel_size']} pixels"),
        ("Blur", f"{across} x {down} pixels wide and high"),
    ]


@dataclass(frozen=True)
class ObjectsRequest:
    """What was asked for; see :func:`latentdem.reconstruct`."""

    views: Sequence[Path]
    elevation: float | None = None
    rounds: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class ObjectsFrame:
    """How far a reconstruction is: the phase, and the share that is done."""

    phase: str
    share: float


@dataclass(frozen=True)
class ObjectsAnswer:
    """A finished reconstruction.

    Args:
        poses: name, elevation, azimuth with its uncertainty, and distance, in words.
        sheet: picture of given and novel views.
        turntable: animation.
        mesh: file of the mesh; None if there is no surface.
        warnings: of the reconstruction, one line each.
        files: for download, the archive of all of them last.
    """

    poses: list[tuple[str, str, str, str]]
    sheet: Path
    turntable: Path
    mesh: Path | None
    warnings: list[str]
    files: list[Path]


def reconstruct(
    request: ObjectsRequest, folder: Path, limits: Limits, models: Models | None = None
) -> Callable[[Job], ObjectsAnswer]:
    """Work for :meth:`latentdem.serve.jobs.Worker.submit`; results go to ``folder``.

    Raises:
        InputError: the pictures cannot be taken (at once, not in the worker).
    """
    if len(request.views) < 2:
        raise InputError(
            f"two or more pictures of the object are needed, found {len(request.views)}; add one "
            "from another side"
        )
    if len(request.views) > MOST_VIEWS:
        raise InputError(f"at most {MOST_VIEWS} pictures are taken, found {len(request.views)}")
    for view in request.views:
        check_picture(view, limits)
    options = (models or Models()).of_reconstruct()

    def work(job: Job) -> ObjectsAnswer:
        result = latentdem.reconstruct(
            request.views,
            elevation=request.elevation,
            rounds=request.rounds,
            seed=request.seed,
            progress=lambda phase, share: job.report(ObjectsFrame(phase, share)),
            **options,
        )
        result.save(folder)
        job.check()
        names = (
            "mesh.glb",
            "turntable.webp",
            "novel_views.png",
            "poses.json",
            "field.safetensors",
            "report.json",
        )
        files = [folder / name for name in names if (folder / name).exists()]
        mesh = folder / "mesh.glb"
        return ObjectsAnswer(
            poses=[
                (name, f"{e:.0f}°", f"{a:.0f}° ± {spread:.0f}°", f"{radius:.2f}")
                for name, (e, a, radius), spread in zip(
                    result.views.names,
                    result.poses.tolist(),
                    result.uncertainty.tolist(),
                    strict=True,
                )
            ],
            sheet=folder / "novel_views.png",
            turntable=folder / "turntable.webp",
            mesh=mesh if mesh.exists() else None,
            warnings=result.report["warnings"],
            files=[*files, zip_files(folder / ARCHIVE, files)],
        )

    return work


def _shrink(image: Tensor, side: int | None) -> Tensor:
    """``[B,C,H,W]`` so that its longer side is ``side`` at most, smoothed before."""
    if side is None or max(image.shape[-2:]) <= side:
        return image
    scale = side / max(image.shape[-2:])
    size = [max(1, round(length * scale)) for length in image.shape[-2:]]
    return F.interpolate(image, size, mode="bilinear", antialias=True)
