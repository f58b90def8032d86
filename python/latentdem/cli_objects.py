"""The command ``latentdem reconstruct``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from latentdem.cli_common import (
    DTYPE_HELP,
    DeviceOption,
    console,
    fail,
    finished,
    progress_bar,
)


def reconstruct(
    inputs: Annotated[
        list[Path], typer.Argument(metavar="VIEW1 VIEW2 [VIEW3...]", help="Pictures of one object.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")],
    mask: Annotated[
        list[Path] | None,
        typer.Option(
            help="A mask for each view in the same order, white where the object is; give the "
            "option once a view. Default: the alpha channel, or what differs from the border."
        ),
    ] = None,
    elevation: Annotated[
        float | None,
        typer.Option(
            help="Degrees that the first view looks down by (its camera's height above the "
            "object's horizon). Default: estimated."
        ),
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(help="Alternations of sampling and fitting, at most. Default: 2."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same result.")] = 0,
    prior: Annotated[
        Path | None,
        typer.Option(
            help="A prior written by train-objects-prior, or a folder or hub id of Zero123 or "
            "Stable Zero123. Default: the packaged one."
        ),
    ] = None,
    device: DeviceOption = "cpu",
    dtype: Annotated[str | None, typer.Option(help=DTYPE_HELP)] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Compute again what is already there.")
    ] = False,
) -> None:
    """Turn two or more pictures of one object, without camera poses, into a 3D object.

    Writes **poses.json** (where each camera stood), **novel_views.png** (the object from all
    sides), **turntable.webp**, **field.safetensors** (the radiance field), **mesh.glb** (opens in
    any viewer) and **report.json** (settings, seconds, residuals, warnings).

    Examples:

    `latentdem reconstruct front.png side.png -o out`

    `latentdem reconstruct a.jpg b.jpg c.jpg --mask a.png --mask b.png --mask c.png -o out`

    `latentdem reconstruct a.png b.png -o out --prior stable-zero123 --device cuda`

    The views should overlap: up to about 90 degrees apart. Cut-outs with an alpha channel, or
    pictures on a plain ground, need no mask. If a view is reported to contradict the others,
    try another `--seed`, or leave it out.
    """
    from latentdem.devices import parse_dtype
    from latentdem.em.options import check_device
    from latentdem.em.reconstruct import reconstruct as run
    from latentdem.em.reconstruct_settings import ReconstructSettings
    from latentdem.io import check_writable, file_digest
    from latentdem.priors.objects import load_objects_prior
    from latentdem.views import load_views

    try:
        request: dict[str, Any] = {
            "views_sha256": [file_digest(path) for path in inputs],
            "masks_sha256": [file_digest(path) for path in mask or []],
            "elevation": elevation,
            "rounds": rounds,
            "seed": seed,
            "prior": None if prior is None else str(prior),
        }
        # Results from before there were these stay what was asked for.
        request |= {"device": device} if device != "cpu" else {}
        request |= {"dtype": dtype} if dtype is not None else {}
        if not force and finished(output, request):
            console.print(f"already done, see {output} (--force computes it again)")
            return
        check_device(device)
        parse_dtype(dtype)
        check_writable(output)
        if rounds is not None:
            ReconstructSettings(rounds=rounds)
        # Everything is checked before the first minute is spent.
        load_views(inputs, masks=mask)
        chosen = load_objects_prior(prior)
        started = time.perf_counter()
        with progress_bar() as bar:
            task = bar.add_task("loading", total=1.0)

            def show(phase: str, share: float) -> None:
                bar.update(task, completed=share, description=phase)

            result = run(
                inputs,
                prior=chosen,
                masks=mask,
                elevation=elevation,
                rounds=rounds,
                seed=seed,
                device=device,
                dtype=dtype,
                progress=show,
            )
            result.report["request"] = request
            result.save(output)
            bar.update(task, completed=1.0, description="done")
    except (ValueError, FileNotFoundError) as error:
        raise fail(str(error)) from None
    for line in result.report["warnings"]:
        console.print(f"warning: {line}", style="yellow", markup=False, soft_wrap=True)
    for name, pose, spread in zip(
        result.views.names, result.poses.tolist(), result.uncertainty.tolist(), strict=True
    ):
        console.print(
            f"{name}: elevation {pose[0]:.0f}, azimuth {pose[1]:.0f} (+- {spread:.0f}) degrees, "
            f"distance {pose[2]:.2f}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    console.print(
        f"{time.perf_counter() - started:.1f} s -> {output}/mesh.glb, turntable.webp, "
        "novel_views.png, poses.json",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
