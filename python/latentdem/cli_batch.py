"""``latentdem batch`` and ``latentdem batch-status``: many images."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)

from latentdem.cli import app
from latentdem.cli_common import (
    COMPILE_HELP,
    DtypeOption,
    FastDecoderOption,
    GuidanceOption,
    NegativePromptOption,
    PromptOption,
    SlicingOption,
    TilingOption,
    console,
    parse_grid,
)
from latentdem.cli_common import fail as _fail

if TYPE_CHECKING:
    from latentdem.batch.run import Summary

SHOWN = 10
"""Failures in the terminal; the files have all."""


def _duration(seconds: float) -> str:
    """Hours, minutes and seconds, as far as they matter."""
    if seconds == float("inf"):
        return "?"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _speed(rate: float) -> str:
    return f"{rate:.2f} images/s" if rate >= 1 else f"{rate * 60:.1f} images/min"


class _Reporter:
    """A bar in a terminal; elsewhere a line every ``every`` images.  Failures always."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.last: float | None = None
        self.bar: Progress | None = None
        if console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[rate]}"),
                console=console,
            )
            self.task = self.bar.add_task("starting", total=None, rate="")
            self.bar.start()

    def __call__(self, summary: Summary, line: str) -> None:
        finished = summary.done + summary.failed
        if ": failed: " in line:
            console.print(line, style="red", markup=False, highlight=False, soft_wrap=True)
        speed = f"{_speed(summary.rate)}, {_duration(summary.left)} left"
        failed = f", {summary.failed} failed" if summary.failed else ""
        if self.bar is not None:
            self.bar.update(
                self.task,
                completed=finished,
                total=summary.images,
                description="deblurring" + failed,
                rate=speed,
            )
        elif (finished - summary.before) % self.every == 0:
            console.print(
                f"{finished}/{summary.images}{failed}, {speed}", highlight=False, soft_wrap=True
            )

    def stop(self) -> None:
        """Leave the bar as it is."""
        if self.bar is not None:
            self.bar.stop()


def _share(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    first, _, second = text.partition("/")
    if not (first.isdecimal() and second.isdecimal()):
        raise ValueError(f"--share must look like 0/4, found '{text}'")
    return int(first), int(second)


@app.command()
def batch(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT...",
            help="Folders, globs in quotes, images, CSV or Parquet manifests, tar shards.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the results and of the manifest.")
    ],
    kernel_size: Annotated[
        int | None, typer.Option(help="As in deblur; a manifest's row overrides it.")
    ] = None,
    noise_std: Annotated[
        float | None, typer.Option(help="As in deblur; a manifest's row overrides it.")
    ] = None,
    blur: Annotated[str, typer.Option(help="As in deblur.")] = "motion",
    scale: Annotated[int, typer.Option(help="As in deblur.")] = 1,
    grid: Annotated[str, typer.Option(help="As in deblur.")] = "1",
    method: Annotated[str, typer.Option(help="**prox** or **paper**, as in deblur.")] = "prox",
    steps: Annotated[int | None, typer.Option(help="As in deblur.")] = None,
    quality: Annotated[str, typer.Option(help="As in deblur.")] = "standard",
    seed: Annotated[int, typer.Option(help="Of every image; a manifest's row overrides it.")] = 0,
    boundary: Annotated[str, typer.Option(help="As in deblur.")] = "auto",
    prior: Annotated[str | None, typer.Option(help="As in deblur.")] = None,
    prompt: PromptOption = None,
    negative_prompt: NegativePromptOption = None,
    guidance: GuidanceOption = None,
    fast_decoder: FastDecoderOption = None,
    device: Annotated[
        str, typer.Option(help="**cpu**, **cuda**, or several: **cuda:0,cuda:1**, a worker each.")
    ] = "cpu",
    dtype: DtypeOption = "auto",
    compile: Annotated[str | None, typer.Option(help=COMPILE_HELP)] = None,
    slicing: SlicingOption = False,
    tiling: TilingOption = False,
    batch_size: Annotated[
        str,
        typer.Option(
            metavar="N|auto",
            help="Images of one size that a worker restores together. **auto**: on a GPU as many "
            "as fit, on a CPU one.",
        ),
    ] = "auto",
    tile: Annotated[int, typer.Option(help="As in deblur. 0: never.")] = 640,
    assume_blurred: Annotated[
        bool, typer.Option("--assume-blurred", help="As in deblur: sharp photographs, too.")
    ] = False,
    linear_light: Annotated[
        bool, typer.Option("--linear-light", help="As in deblur: blur before the display curve.")
    ] = False,
    layout: Annotated[
        str,
        typer.Option(
            help="**folders**: what deblur writes, a folder an image. **flat**: NAME.png and "
            "NAME.json, which holds the kernel."
        ),
    ] = "folders",
    workers: Annotated[
        int | None,
        typer.Option(help="Each with a prior of its own. Default: one, or one a device."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="Of each worker. Default: its share of the cores.")
    ] = None,
    engine: Annotated[
        str,
        typer.Option(
            help="**local**: in this process. **processes**. **ray**: actors (extra ray). "
            "**auto**: processes, if there are several workers."
        ),
    ] = "auto",
    address: Annotated[
        str | None,
        typer.Option(help="ray: of a running cluster (**auto**, HOST:PORT). Default: a new one."),
    ] = None,
    share: Annotated[
        str | None,
        typer.Option(
            metavar="r/R",
            help="Take every R-th image from the r-th on, beside R-1 other commands on the same "
            "output.",
        ),
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try again what has failed.")
    ] = False,
    log_every: Annotated[
        int, typer.Option(min=1, help="Images between lines where there is no terminal.")
    ] = 10,
) -> None:
    """Deblur many images. A killed run goes on where it was; the same command again is enough.

    Writes a folder an image, called by its path within INPUT (or by its id), and
    **manifest.sqlite**: states, reasons, attempts, seconds. Images that fail are listed in
    **failed.csv**; the others go on, and the command ends with code 1.

    A manifest has a column **path** (relative to it), and if you like **id**, **kernel_size**,
    **noise_std**, **seed**.

    `latentdem batch photos -o out --kernel-size 25`

    `latentdem batch 'shards/*.tar' -o out --workers 4 --layout flat`

    `latentdem batch list.csv -o out --engine ray --address auto --workers 16`

    `latentdem batch photos -o out --retry-failed`
    """
    from latentdem.batch import Options, run_batch
    from latentdem.em.options import check_device

    reporter = None
    started = time.perf_counter()
    try:
        options = Options(
            kernel_size=kernel_size,
            noise_std=noise_std,
            blur=blur,
            scale=scale,
            grid=parse_grid(grid),
            method=method,
            steps=steps,
            quality=quality,
            seed=seed,
            boundary=boundary,
            tile=tile or None,
            assume_blurred=assume_blurred,
            linear_light=linear_light,
            tiling=tiling,
            prior=prior,
            prompt=prompt,
            negative_prompt=negative_prompt,
            guidance=guidance,
            fast_decoder=fast_decoder,
            dtype=dtype,
        )
        if engine != "ray":  # whose devices are elsewhere
            for place in device.split(","):
                check_device(place.strip())
        reporter = _Reporter(log_every)
        summary = run_batch(
            inputs,
            output,
            options,
            engine=engine,
            workers=workers,
            device=device,
            threads=threads,
            address=address,
            layout=layout,
            share=_share(share),
            retry_failed=retry_failed,
            batch_size=int(batch_size) if batch_size.isdecimal() else batch_size,
            compile=compile,
            slicing=slicing,
            report=reporter,
        )
    except (ValueError, FileNotFoundError) as error:
        raise _fail(str(error)) from None
    finally:
        if reporter is not None:
            reporter.stop()
    again = summary.images - summary.computed
    console.print(
        f"{summary.images} images: {summary.done} done"
        + (f" ({summary.done - summary.computed} of them before)" if again else "")
        + f", {summary.failed} failed; {_duration(time.perf_counter() - started)}",
        highlight=False,
        soft_wrap=True,
    )
    if summary.failed:
        console.print(
            f"reasons: {output}/failed{'' if share is None else '-' + share.partition('/')[0]}.csv "
            f"or latentdem batch-status {output}; --retry-failed tries again",
            highlight=False,
            soft_wrap=True,
        )
        raise typer.Exit(1)


@app.command(name="batch-status")
def batch_status(
    output: Annotated[Path, typer.Argument(help="The output of latentdem batch.")],
    failures: Annotated[
        int, typer.Option(min=0, help="Failed images to list, with their reasons.")
    ] = SHOWN,
) -> None:
    """Count the images of a batch by state, and list failures; also while it runs.

    `latentdem batch-status out`
    """
    from latentdem.batch.manifest import DONE, FAILED, STATES, Manifest
    from latentdem.batch.output import in_use

    paths = sorted(output.glob("manifest*.sqlite"))
    try:
        manifests = [
            Manifest(path, readonly=True) for path in paths or [output / "manifest.sqlite"]
        ]
    except ValueError as error:
        raise _fail(str(error)) from None
    try:
        counts = [manifest.counts() for manifest in manifests]
        totals = {state: sum(count[state] for count in counts) for state in STATES}
        for state, total in totals.items():
            typer.echo(f"{state:8} {total:8}")
        if in_use(output):
            typer.echo("a run is going on")
        elif sum(totals.values()) > totals[DONE] + totals[FAILED]:
            typer.echo("no run is going on: the same command again finishes it")
        failed = [failure for manifest in manifests for failure in manifest.failures()]
        for failure in failed[:failures]:
            typer.echo(f"{failure.id}: {failure.reason} (attempts: {failure.attempts})")
        if len(failed) > failures:
            typer.echo(f"... and {len(failed) - failures} more: --failures {len(failed)}")
        if failed:
            typer.echo("run the same batch with --retry-failed to try them again")
    finally:
        for manifest in manifests:
            manifest.close()
