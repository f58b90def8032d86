"""``latentdem evaluate``: all suites behind one command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from latentdem.cli import app
from latentdem.cli_common import DTYPE_HELP, DeviceOption, console
from latentdem.cli_common import fail as _fail

if TYPE_CHECKING:
    from latentdem.evaluate_model import ModelUnderTest


def _model(prior: Path | None, device: str, dtype: str | None) -> ModelUnderTest:
    from latentdem.evaluate_model import ModelUnderTest

    return ModelUnderTest.load(None if prior is None else str(prior), device, dtype)


@app.command()
def evaluate(
    output: Annotated[Path, typer.Option("--output", "-o", help="JSON file of the results.")],
    suite: Annotated[
        str,
        typer.Option(
            help="**deblur**: photographs. **synthetic**: the same over kernel sizes, noise and "
            "boundaries. **misspecified**: size or noise told wrongly. **baselines**: other "
            "methods beside ours. **folder**: your own pictures. **objects**: views without "
            "poses. **prior**: the packaged priors alone."
        ),
    ] = "deblur",
    images: Annotated[int, typer.Option(help="Test photographs, at most 8.")] = 8,
    kernels: Annotated[int, typer.Option(help="Random motion kernels an image.")] = 4,
    kernel_size: Annotated[
        int | None,
        typer.Option(
            help="Side of the kernels in pixels. Default: 25; synthetic: 15, 25, 33, 65; "
            "folder: as in deblur."
        ),
    ] = None,
    noise_std: Annotated[
        float | None,
        typer.Option(
            help="Noise of the observations. Default: 0.01; synthetic: 0, 0.01, 0.02, 0.05; "
            "folder: estimated."
        ),
    ] = None,
    method: Annotated[str, typer.Option(help="**prox** or **paper**.")] = "prox",
    steps: Annotated[int | None, typer.Option(help="Default: the method's own.")] = None,
    quality: Annotated[
        str, typer.Option(help="deblur: **standard** or **fast**, of prox.")
    ] = "standard",
    pictures: Annotated[Path | None, typer.Option(help="Folder for comparison pictures.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="folder: your pictures. objects: the held-out views. [default: data/objects]"
        ),
    ] = None,
    objects: Annotated[int, typer.Option(help="objects: how many of the held-out ones.")] = 20,
    seeds: Annotated[
        int | None,
        typer.Option(
            help="Runs of each pair [default: 1]; objects: choices of views an object [default: 3]."
        ),
    ] = None,
    views: Annotated[
        list[int] | None, typer.Option(help="objects: 2, 3, or both (the default).")
    ] = None,
    rows: Annotated[
        list[str] | None,
        typer.Option("--row", help="baselines, objects: a method; default: all."),
    ] = None,
    prior: Annotated[
        Path | None,
        typer.Option(
            help="The one to measure, as deblur and reconstruct take it; not of baselines and "
            "operators. Default: the packaged one."
        ),
    ] = None,
    device: DeviceOption = "cpu",
    dtype: Annotated[str | None, typer.Option(help=DTYPE_HELP)] = None,
    regressor: Annotated[
        Path | None, typer.Option(help="objects: what train-pose-free wrote.")
    ] = None,
) -> None:
    """Measure quality on photographs or objects that no training has seen. A killed run goes on.

    **deblur** blurs 256 x 256 crops of scikit-image's and scikit-learn's photographs with random
    motion kernels through a valid convolution, restores them blindly and with the true kernel,
    and writes shift-aligned PSNR, kernel similarity (MNC) and seconds.

    **synthetic** and **misspecified** do so over 32 and 10 conditions, with SSIM, VIF, kernel
    errors, 95 % intervals and a page of pictures; --images and --kernels bound the hours.

    **baselines** runs other methods on the pairs of **deblur**: DPS with EM, the published method,
    Fast EM, BlindDPS, kernels from edges with three deconvolutions, and ceilings; with intervals of
    each difference to prox. All rows take minutes a pair.

    **operators** runs every forward model of deblur, beside one kernel of any shape.

    **folder** deblurs your own pictures and writes a page (HTML) beside the JSON, worst first. For
    those with FOLDER/truth/NAME.png or FOLDER/kernels/NAME.npy (or .png) it tells PSNR and MNC.

    **objects** reconstructs held-out objects from pairs and triples of views without poses, and
    compares poses, 8 unseen views and surface with the truth, beside a method that sees one view,
    a feed-forward regressor, partial methods and true poses.

    **prior** measures the autoencoder's round trip, denoising beside BM3D, whether sharp pictures
    are told from blurred ones, and what the kernel prior adds to one M-step and to the first
    kernel; with --pictures it draws samples.

    `latentdem evaluate --suite baselines -o methods.json --row prox --row l0 --kernels 1`

    `latentdem evaluate --suite folder --data photographs -o out/photographs.json`

    `latentdem evaluate -o mine.json --prior stable-diffusion --device cuda --pictures out/mine`

    `latentdem evaluate --suite objects -o quality.json --objects 4 --seeds 1 --views 2`
    """
    from latentdem.devices import parse_dtype
    from latentdem.em.options import check_device

    try:
        own = prior is not None or device != "cpu" or dtype is not None
        if own and suite in ("baselines", "operators"):
            raise ValueError(
                f"the suite {suite} compares on the packaged prior, on the CPU: leave out --prior, "
                "--device and --dtype"
            )
        if suite == "prior" and (device != "cpu" or dtype is not None):
            raise ValueError("the suite prior measures on the CPU: leave out --device and --dtype")
        check_device(device)
        parse_dtype(dtype)
        if suite == "deblur":
            from latentdem.evaluate import run_suite

            run_suite(
                output,
                images=images,
                kernels=kernels,
                kernel_size=25 if kernel_size is None else kernel_size,
                noise_std=0.01 if noise_std is None else noise_std,
                method=method,
                steps=steps,
                quality=quality,
                pictures=pictures,
                console=console,
                model=_model(prior, device, dtype),
            )
        elif suite == "objects":
            from latentdem.evaluate_objects import run_objects_suite

            run_objects_suite(
                output,
                data=Path("data/objects") if data is None else data,
                prior=prior,
                regressor=regressor,
                rows=rows,
                objects=objects,
                counts=views,
                seeds=3 if seeds is None else seeds,
                pictures=pictures,
                console=console,
                device=device,
                dtype=dtype,
            )
        elif suite in ("synthetic", "misspecified"):
            from latentdem.evaluate_synthetic import run_conditions, suite_conditions

            run_conditions(
                output,
                suite=suite,
                images=images,
                kernels=kernels,
                seeds=1 if seeds is None else seeds,
                conditions=suite_conditions(suite, kernel_size, noise_std),
                method=method,
                steps=steps,
                pictures=pictures,
                console=console,
                model=_model(prior, device, dtype),
            )
        elif suite == "baselines":
            from latentdem.evaluate_baselines import run_baselines

            run_baselines(
                output,
                images=images,
                kernels=kernels,
                seeds=1 if seeds is None else seeds,
                kernel_size=25 if kernel_size is None else kernel_size,
                noise_std=0.01 if noise_std is None else noise_std,
                names=rows,
                pictures=pictures,
                console=console,
            )
        elif suite == "operators":
            from latentdem.evaluate_operators import run_operators_suite

            run_operators_suite(
                output, images=images, steps=steps, pictures=pictures, console=console
            )
        elif suite == "folder":
            from latentdem.evaluate_folder import run_folder_suite

            if data is None:
                raise ValueError("the suite folder needs your pictures: --data FOLDER")
            run_folder_suite(
                output,
                data=data,
                kernel_size=kernel_size,
                noise_std=noise_std,
                method=method,
                steps=steps,
                pictures=pictures,
                console=console,
                model=_model(prior, device, dtype),
            )
        elif suite == "prior":
            from latentdem.evaluate_prior import run_prior_suite

            run_prior_suite(output, images=images, prior=prior, pictures=pictures, console=console)
        else:
            raise ValueError(
                "suite must be deblur, synthetic, misspecified, baselines, operators, folder, "
                f"objects or prior, found '{suite}'"
            )
    except (ValueError, ImportError, FileNotFoundError) as error:
        raise _fail(str(error)) from None
