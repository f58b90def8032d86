"""The ``latentdem`` command."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from latentdem.cli_common import (
    COMPILE_HELP,
    QUALITY_HELP,
    DeviceOption,
    DtypeOption,
    FastDecoderOption,
    GuidanceOption,
    NegativePromptOption,
    PromptOption,
    SlicingOption,
    TilingOption,
    console,
    given,
    parse_grid,
)
from latentdem.cli_common import fail as _fail
from latentdem.cli_common import finished as _finished
from latentdem.cli_common import progress_bar as _progress
from latentdem.cli_objects import reconstruct
from latentdem.cli_prior import app as prior_app

TILES = ".tiles"
"""Folder of finished tiles within the output, until the photograph is finished."""

app = typer.Typer(
    name="latentdem",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="""Blind inversion with latent diffusion priors.

Recover a sharp photograph *and* the motion blur that spoiled it, from the photograph alone:

`latentdem deblur photo.jpg -o out`

Recover camera poses and a 3D object from two or more pictures of it:

`latentdem reconstruct front.png side.png -o out`
""",
)
app.command()(reconstruct)
app.add_typer(prior_app, name="prior")


def _output_folders(inputs: list[Path], output: Path) -> list[Path]:
    """One input writes to ``output`` itself, several to a subfolder each."""
    if len(inputs) == 1:
        return [output]
    folders = [output / path.stem for path in inputs]
    for index, folder in enumerate(folders):
        if folder in folders[:index]:
            raise ValueError(
                f"two inputs are called '{folder.name}': rename one, or use two output folders"
            )
    return folders


@app.command()
def deblur(
    inputs: Annotated[list[Path], typer.Argument(metavar="INPUT...", help="Blurred photographs.")],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="Folder for the results; several inputs get a subfolder each."
        ),
    ],
    kernel_size: Annotated[
        int | None,
        typer.Option(
            help="Odd side of the blur kernel in pixels, at least the length of the blur. "
            "Default: found by itself, 9 to 65."
        ),
    ] = None,
    noise_std: Annotated[
        float | None,
        typer.Option(help="Noise of the photograph, as a share of white. Default: estimated."),
    ] = None,
    blur: Annotated[
        str,
        typer.Option(
            help="**motion** (a kernel of any shape), **defocus** (a disc) or **gaussian**."
        ),
    ] = "motion",
    scale: Annotated[
        int, typer.Option(help="2 to 4: enlarge as well (blind super-resolution).")
    ] = 1,
    grid: Annotated[
        str,
        typer.Option(
            help="Patches of a blur that differs over the photograph, **3** or **3x2** (rows x "
            "columns), each with a kernel of its own."
        ),
    ] = "1",
    method: Annotated[
        str,
        typer.Option(
            help="**prox**: proximal steps, fast. **paper**: the published gradient method."
        ),
    ] = "prox",
    steps: Annotated[
        int | None, typer.Option(help="Steps of the trajectory. Default: the method's own.")
    ] = None,
    quality: Annotated[str, typer.Option(help=QUALITY_HELP)] = "standard",
    seed: Annotated[int, typer.Option(help="Same seed, same result.")] = 0,
    boundary: Annotated[
        str,
        typer.Option(
            help="What lies beyond the border: **valid** (unknown, as for every camera; also "
            "**auto**) or **circular** (wraps round; synthetic data only)."
        ),
    ] = "auto",
    prior: Annotated[
        Path | None,
        typer.Option(
            help="A prior written by train-prior, a folder in diffusers' layout, or a hub id "
            "(owner/name). Default: the packaged one."
        ),
    ] = None,
    prompt: PromptOption = None,
    negative_prompt: NegativePromptOption = None,
    guidance: GuidanceOption = None,
    fast_decoder: FastDecoderOption = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "auto",
    compile: Annotated[str | None, typer.Option(help=COMPILE_HELP)] = None,
    slicing: SlicingOption = False,
    tiling: TilingOption = False,
    tile: Annotated[
        int,
        typer.Option(
            help="Photographs of more than twice its square are restored in tiles of at most "
            "this side, which bounds memory; finished tiles survive a kill. 0: never."
        ),
    ] = 640,
    assume_blurred: Annotated[
        bool,
        typer.Option(
            "--assume-blurred",
            help="Deblur photographs that look sharp, too; without it they are left as they are.",
        ),
    ] = False,
    linear_light: Annotated[
        bool,
        typer.Option(
            "--linear-light",
            help="Blur adds light, which a camera writes through the sRGB curve: undo it. For "
            "photographs from a camera, not for blur that was made in a file's values.",
        ),
    ] = False,
    trace: Annotated[
        bool,
        typer.Option(
            "--trace",
            help="Watch it: **preview.png** is renewed at every step, **trace.webp** shows the "
            "whole course at the end.",
        ),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Compute again what is already there.")
    ] = False,
) -> None:
    """Restore blurred photographs and recover their blur kernels.

    Writes for each input: **restored.png**, **kernel.png**, **kernel.npy**, **comparison.png**
    (before, after, and the kernel inset) and **report.json** (settings, seconds, residual).

    Examples:

    `latentdem deblur photo.jpg -o out`

    `latentdem deblur *.jpg -o out --kernel-size 25` (a killed run goes on where it was)

    `latentdem deblur photo.jpg -o out --trace` (an animation of image and kernel)

    `latentdem deblur photo.jpg -o out --blur defocus` (a lens out of focus)

    `latentdem deblur small.png -o out --scale 2` (twice as large, and sharp)

    `latentdem deblur photo.jpg -o out --prior my-model --prompt "a street" --guidance 3`

    If the result rings or the kernel touches its frame, raise `--kernel-size`. A photograph that
    looks sharp is left as it is (`--assume-blurred` deblurs it).
    """
    import torch

    from latentdem.em import deblur as run
    from latentdem.em.models import ModelOptions
    from latentdem.em.options import check_compile, placement, solver_settings
    from latentdem.em.steps import StepReport
    from latentdem.io import InputError, check_writable, file_digest, to_batch
    from latentdem.priors import load_prior
    from latentdem.trace import PREVIEW, TRACE, Trace

    try:
        folders = _output_folders(inputs, output)
        for path in inputs:  # all inputs are checked before the first minute is spent
            to_batch(path)
        check_writable(output)
        placement(device, dtype, torch.device("cpu"))
        check_compile(compile, method)
        solver_settings(method, steps, quality=quality)
        rows_columns = parse_grid(grid)
        ModelOptions(blur, scale, rows_columns, linear_light).check_method(method)
        asked = given(
            prompt=prompt,
            negative_prompt=negative_prompt,
            guidance=guidance,
            fast_decoder=fast_decoder,
        )
        chosen = load_prior(prior, **asked) if prior is not None or asked else None
    except (ValueError, FileNotFoundError) as error:
        raise _fail(str(error)) from None
    failed = 0
    with _progress() as bar:
        for path, folder in zip(inputs, folders, strict=True):
            request = {
                "input_sha256": file_digest(path),
                "kernel_size": kernel_size,
                "noise_std": noise_std,
                "blur": blur,
                "scale": scale,
                "grid": list(rows_columns),
                "method": method,
                "steps": steps,
                "seed": seed,
                "boundary": boundary,
                "tile": tile,
                "assume_blurred": assume_blurred,
                "device": device,
                "prior": None if prior is None else str(prior),
                **asked,
            }
            # Results from before there were these stay what was asked for.
            request |= {"dtype": dtype} if dtype != "auto" else {}
            request |= {"tiling": True} if tiling else {}
            request |= {"linear_light": True} if linear_light else {}
            request |= {"quality": quality} if quality != "standard" else {}
            complete = not trace or (folder / TRACE).exists()
            if not force and complete and _finished(folder, request):
                console.print(f"{path}: already done, see {folder} (--force computes it again)")
                continue
            task = bar.add_task(f"{path.name}: loading, first kernel", total=None)
            started = time.perf_counter()
            folder.mkdir(parents=True, exist_ok=True)
            course = Trace(folder / PREVIEW) if trace else None

            def show(index: int, count: int, report: StepReport, task: Any = task,
                     name: str = path.name, course: Trace | None = course) -> None:  # fmt: skip
                if course is not None:
                    course.add(report)
                bar.update(
                    task,
                    completed=report.step + 1,
                    total=report.steps,
                    description=f"{name}: EM t={report.timestep} "
                    f"residual {report.residual_std:.4f}",
                )

            try:
                result = run(
                    path,
                    prior=chosen,
                    kernel_size=kernel_size,
                    noise_std=noise_std,
                    blur=blur,
                    scale=scale,
                    grid=rows_columns,
                    method=method,
                    steps=steps,
                    quality=quality,
                    seed=seed,
                    boundary=boundary,
                    tile=tile or None,
                    assume_blurred=assume_blurred,
                    linear_light=linear_light,
                    device=device,
                    dtype=dtype,
                    compile=compile,
                    slicing=slicing,
                    tiling=tiling,
                    checkpoint=folder / TILES,
                    progress=show,
                )
                result.report |= {"input": path.name, "request": request}
                # Without frames nothing was computed: all tiles were there already.
                # And a sharp photograph has no course.
                drawn = ""
                if course is not None and course.frames:
                    course.save(folder / TRACE)
                    drawn = f", {TRACE}"
                result.save(folder)
                (folder / PREVIEW).unlink(missing_ok=True)
                shutil.rmtree(folder / TILES, ignore_errors=True)
            except (InputError, ValueError) as error:
                bar.remove_task(task)
                console.print(f"error: {path}: {error}", style="red", markup=False, soft_wrap=True)
                failed += 1
                continue
            bar.update(task, description=f"{path.name}: done")
            for warning in result.report["warnings"][0]:
                console.print(f"{path}: {warning}", style="yellow", soft_wrap=True)
            console.print(
                f"{path}: {time.perf_counter() - started:.1f} s -> {folder}/restored.png, "
                f"kernel.png, comparison.png" + drawn,
                highlight=False,
                soft_wrap=True,
            )
    if failed:
        raise typer.Exit(1)


@app.command()
def info() -> None:
    """Show versions, the native build and the packaged priors."""
    import latentdem_ext as ext
    from latentdem.em.driver import versions
    from latentdem.priors import objects
    from latentdem.priors.packaged import packaged_files

    facts: dict[str, Any] = versions() | {f"native {k}": v for k, v in ext.build_info().items()}
    for path in (*packaged_files(), objects.PACKAGED_OBJECTS):
        facts[path.name] = f"{path.stat().st_size / 1e6:.1f} MB" if path.exists() else "missing"
    for name, value in facts.items():
        typer.echo(f"{name:24} {value}")


# Each registers its commands with ``app``, which must exist by then.
from latentdem import (  # noqa: E402
    cli_batch,  # noqa: F401
    cli_evaluate,  # noqa: F401
    cli_profile,  # noqa: F401
    cli_serve,  # noqa: F401
    cli_training,  # noqa: F401
)


def main() -> None:
    """Entry point of the console script."""
    try:
        app()
    except KeyboardInterrupt:
        console.print("stopped; what was finished is kept, the same command goes on from there")
        sys.exit(130)
