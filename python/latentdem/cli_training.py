"""Commands that train the packaged priors and draw what the objects prior is trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from latentdem.cli import _fail, app

TrainedPrior = Annotated[
    Path, typer.Option("--output", "-o", help="The prior to write (safetensors).")
]
TrainingData = Annotated[
    Path, typer.Option(help="Folder of the training pictures; fetched if missing.")
]
Checkpoints = Annotated[Path, typer.Option(help="Folder of the checkpoints.")]
Device = Annotated[
    str, typer.Option(help="**auto** (a GPU if there is one), **cpu**, **cuda**, **cuda:1** ...")
]
Views = Annotated[Path, typer.Option(help="Folder of the drawn views; drawn if missing.")]


@app.command("train-prior")
def train_prior(
    output: TrainedPrior = Path("natural.safetensors"),
    data: TrainingData = Path("data"),
    runs: Checkpoints = Path("runs"),
    autoencoder_minutes: Annotated[float, typer.Option(help="Minutes for the autoencoder.")] = 45,
    diffusion_minutes: Annotated[float, typer.Option(help="Minutes for the denoiser.")] = 48,
    device: Device = "auto",
) -> None:
    """Train the natural-image prior: an autoencoder, then a latent diffusion model.

    The pictures come from Debian packages (listed with their hashes in the package) and are
    fetched with apt-get. Killed or stopped, the same command goes on from the last checkpoint.
    """
    from latentdem.training.common import choose_device
    from latentdem.training.packaged import make_prior

    try:
        make_prior(
            data,
            runs,
            output,
            autoencoder_minutes=autoencoder_minutes,
            diffusion_minutes=diffusion_minutes,
            device=choose_device(device),
        )
    except (ValueError, RuntimeError) as error:
        raise _fail(str(error)) from None


@app.command("train-kernel-prior")
def train_kernel_prior(
    output: TrainedPrior = Path("kernel.safetensors"),
    data: TrainingData = Path("data"),
    runs: Checkpoints = Path("runs"),
    minutes: Annotated[float, typer.Option(help="Minutes on synthetic damage.")] = 7,
    shards: Annotated[
        int, typer.Option(help="Files of ten blind deblurrings each to learn from; 0 for none.")
    ] = 100,
    refine_minutes: Annotated[float, typer.Option(help="Minutes on both.")] = 40,
    start: Annotated[
        Path | None,
        typer.Option(
            help="A trained one to go on from: it collects, and learns from what it met. Give "
            "another --runs folder."
        ),
    ] = None,
) -> None:
    """Train the kernel prior, a network that reads the M-step's equations.

    First on synthetic kernels with synthetic damage, as a denoiser; then on the evidence that the
    method itself, with that first network and the packaged image prior, meets on training
    photographs (half a minute a shard). Killed or stopped, the same command goes on where it was.
    """
    from latentdem.priors import load_kernel_prior
    from latentdem.training.packaged import make_kernel_prior

    try:
        make_kernel_prior(
            data,
            runs,
            output,
            minutes=minutes,
            shards=shards,
            refine_minutes=refine_minutes,
            start=None if start is None else load_kernel_prior(start),
        )
    except (ValueError, RuntimeError, FileNotFoundError) as error:
        raise _fail(str(error)) from None


@app.command("train-sharpness")
def train_sharpness(
    output: TrainedPrior = Path("sharpness.safetensors"),
    data: TrainingData = Path("data"),
    runs: Checkpoints = Path("runs"),
    shards: Annotated[
        int, typer.Option(help="Files of 200 pairs each to learn from, half a minute a file.")
    ] = 25,
    minutes: Annotated[float, typer.Option(help="Minutes of training.")] = 2,
) -> None:
    """Train the classifier that tells a sharp photograph from a blurred one.

    Killed or stopped, the same command goes on where it was.
    """
    from latentdem.training.sharpness import make_sharpness

    try:
        make_sharpness(data, runs, output, shards=shards, minutes=minutes)
    except (ValueError, RuntimeError, FileNotFoundError) as error:
        raise _fail(str(error)) from None


@app.command("train-objects-prior")
def train_objects_prior(
    output: TrainedPrior = Path("objects.safetensors"),
    data: Views = Path("data/objects"),
    runs: Checkpoints = Path("runs"),
    autoencoder_minutes: Annotated[
        float, typer.Option(help="Minutes for the autoencoder; the default is for a GPU.")
    ] = 2,
    denoiser_minutes: Annotated[
        float, typer.Option(help="Minutes for the denoiser; a laptop needs hours.")
    ] = 10,
    start: Annotated[
        Path | None,
        typer.Option(
            help="An objects prior to go on from (its autoencoder stays, its denoiser learns). "
            "Its checkpoint is kept apart from that of a training from nothing."
        ),
    ] = None,
    device: Device = "auto",
) -> None:
    """Train the objects prior: draw 10,000 objects, then an autoencoder and the denoiser.

    Needs pybullet (`pip install latentdem[objects]`): its software renderer draws the views, about
    two hundred a second on a core. Five minutes on a GPU teach more than five hours on a laptop.
    Killed or stopped, the same command goes on from the last checkpoint.
    """
    from latentdem.training.common import choose_device
    from latentdem.training.objects import make_objects_prior

    try:
        make_objects_prior(
            data,
            runs,
            output,
            autoencoder_minutes=autoencoder_minutes,
            denoiser_minutes=denoiser_minutes,
            start=start,
            device=choose_device(device),
        )
    except (ValueError, RuntimeError, FileNotFoundError) as error:
        raise _fail(str(error)) from None


@app.command("train-pose-free")
def train_pose_free(
    output: TrainedPrior = Path("pose_free.safetensors"),
    data: Annotated[Path, typer.Option(help="Folder of the drawn training views.")] = Path(
        "data/objects"
    ),
    runs: Checkpoints = Path("runs"),
    minutes: Annotated[float, typer.Option(help="Minutes of training.")] = 22,
    device: Device = "auto",
) -> None:
    """Train the feed-forward regressor that the objects suite compares with.

    It sees the same views as the objects prior. Killed or stopped, the same command goes on.
    """
    from latentdem.training.common import choose_device
    from latentdem.training.pose_free import make_pose_free

    try:
        make_pose_free(data, runs, output, minutes=minutes, device=choose_device(device))
    except (ValueError, RuntimeError, FileNotFoundError) as error:
        raise _fail(str(error)) from None


@app.command("draw-objects")
def draw_objects(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the views.")],
    split: Annotated[str, typer.Option(help="**heldout** (204 objects) or **train**.")] = "heldout",
    pictures: Annotated[
        Path | None, typer.Option(help="Also write each object's first views here, as PNG.")
    ] = None,
) -> None:
    """Draw views of the training or test objects with pybullet's CPU renderer.

    Writes shards of RGBA views with their poses. With `--pictures`, each object's first four views
    become files to try `latentdem reconstruct` on.
    """
    from latentdem.io import check_writable, to_pil
    from latentdem.training.object_views import draw_split, read_shards

    try:
        check_writable(output)
        draw_split(output, split)
        if pictures is not None:
            check_writable(pictures)
            for names, shard in read_shards(output, split):
                for name, images in zip(names, shard["images"], strict=True):
                    for index, image in enumerate(images[:4]):
                        to_pil(image.float() / 255).save(pictures / f"{name}-{index}.png")
    except (ValueError, RuntimeError) as error:
        raise _fail(str(error)) from None
