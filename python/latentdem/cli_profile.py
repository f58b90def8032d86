"""``latentdem profile``: where the time goes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from latentdem.cli import app
from latentdem.cli_common import QUALITY_HELP, DeviceOption, DtypeOption, console
from latentdem.cli_common import fail as _fail

SHOWN = 12
"""Operators in the terminal; the files have more."""


@app.command()
def profile(
    image: Annotated[Path, typer.Argument(help="A photograph.", show_default=False)],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of trace, tables and picture.")
    ] = Path("out/profile"),
    kernel_size: Annotated[int | None, typer.Option(help="As in deblur.")] = None,
    method: Annotated[str, typer.Option(help="**prox** or **paper**.")] = "prox",
    steps: Annotated[
        int, typer.Option(help="Steps of the trajectory; few tell as much as many.")
    ] = 4,
    quality: Annotated[str, typer.Option(help=QUALITY_HELP)] = "standard",
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "auto",
    prior: Annotated[Path | None, typer.Option(help="As in deblur.")] = None,
) -> None:
    """Deblur one photograph under torch's profiler: seconds by phase and by operator.

    Writes **trace.json** (open it in ui.perfetto.dev or TensorBoard), **operators.txt**,
    **phases.png** and **report.json**. The search for the first kernel is timed, not recorded.
    GB/s counts what an operator is given, each tensor once; its results come on top.

    `latentdem profile photo.jpg -o out/profile`
    """
    from latentdem.priors import load_prior
    from latentdem.profiling import profile_deblurring

    try:
        report = profile_deblurring(
            image,
            output,
            kernel_size=kernel_size,
            method=method,
            steps=steps,
            quality=quality,
            device=device,
            dtype=dtype,
            prior=None if prior is None else load_prior(prior),
        )
    except (ValueError, FileNotFoundError) as error:
        raise _fail(str(error)) from None
    height, width = report["image_size"]
    table = Table(title=f"{height} x {width}, {steps} steps on {report['device']}")
    for heading in ("phase", "seconds", "share"):
        table.add_column(heading, justify="left" if heading == "phase" else "right")
    for name, figures in report["phases"].items():
        table.add_row(name, f"{figures['seconds']:.2f}", f"{figures['share']:.0%}")
    console.print(table)
    operators = Table()
    for heading in ("operator", "ms", "calls", "GFLOP/s", "GB/s"):
        operators.add_column(heading, justify="left" if heading == "operator" else "right")
    for row in report["operators"][:SHOWN]:
        rates = [
            "" if row[rate] is None else f"{row[rate]:.{digits}f}"
            for rate, digits in (("gflop_per_s", 0), ("gb_per_s", 1))
        ]
        operators.add_row(row["name"], f"{row['milliseconds']:.1f}", str(row["calls"]), *rates)
    console.print(operators)
    console.print(f"look at {output / 'phases.png'} and {output / 'trace.json'}", soft_wrap=True)
