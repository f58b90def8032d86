"""What all commands share: messages, the progress bar, and whether a result is there already."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

console = Console(stderr=True)

QUALITY_HELP = "**standard**, or **fast**: in half the time, a little worse; of prox."
DTYPE_HELP = "Of the networks: **fp16**, **bf16** or **fp32**. Default: fp16 on CUDA, else fp32."
DtypeOption = Annotated[
    str,
    typer.Option(
        help="Of the networks: **fp16**, **bf16**, **fp32**, or **auto**: fp16 on CUDA, bf16 on "
        "processors that have instructions for it, else fp32."
    ),
]
COMPILE_HELP = (
    "Compile the E-step into one graph: **default**, or with CUDA graphs **reduce-overhead** or "
    "**max-autotune**. The first image of a size waits for the compiler."
)
DeviceOption = Annotated[
    str, typer.Option(help="**cpu**, **cuda**, **cuda:1** ... (float16 on CUDA).")
]
SlicingOption = Annotated[
    bool,
    typer.Option(
        "--slicing", help="Pictures pass the autoencoder one by one: less memory, more time."
    ),
]
TilingOption = Annotated[
    bool,
    typer.Option(
        "--tiling", help="The autoencoder works in tiles: for canvases that it could not hold."
    ),
]
PromptOption = Annotated[
    str | None,
    typer.Option(help="What the pictures show, for a prior that takes text."),
]
NegativePromptOption = Annotated[
    str | None, typer.Option(help="What they don't show; with --guidance.")
]
GuidanceOption = Annotated[
    float | None,
    typer.Option(
        help="Scale of classifier-free guidance, from 1 (none) on, at twice the cost. Default: 1."
    ),
]
FastDecoderOption = Annotated[
    str | None,
    typer.Option(
        help="Folder or hub id of an AutoencoderTiny (TAESD) that decodes in place of the prior's "
        "autoencoder."
    ),
]


def fail(message: str) -> typer.Exit:
    """Print one line in red; raise what it returns."""
    console.print(f"error: {message}", style="red", markup=False, highlight=False, soft_wrap=True)
    return typer.Exit(1)


def progress_bar() -> Progress:
    """Description, bar, share, seconds gone and left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )


def finished(folder: Path, request: dict[str, Any]) -> bool:
    """Whether ``folder`` holds the complete result of the same request."""
    try:
        report = json.loads((folder / "report.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(report, dict) and report.get("request") == request


def given(**options: Any) -> dict[str, Any]:
    """The options that were given: those that are not None."""
    return {name: value for name, value in options.items() if value is not None}


def parse_grid(text: str) -> tuple[int, int]:
    """Rows and columns from ``3`` or ``3x2``."""
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() for part in parts):
        raise ValueError(f"--grid takes 3 or 3x2 (rows x columns), found '{text}'")
    return int(parts[0]), int(parts[-1])
