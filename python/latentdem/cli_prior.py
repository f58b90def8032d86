"""``latentdem prior info``: what is in a prior, packaged or one's own."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from latentdem.cli_common import fail

app = typer.Typer(help="Look into the packaged priors, or into a trained one.")

PACKAGED = ("natural", "kernel", "sharpness", "objects")
"""Names of the packaged priors: ``assets/NAME.safetensors`` and its card ``NAME.md``."""


# Without a callback, typer would run a single command under the group's own name.
@app.callback()
def prior() -> None:
    """Look into the packaged priors, or into a trained one."""


@app.command()
def info(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="**natural**, **kernel**, **sharpness**, **objects**, a "
            "safetensors file, or a folder in diffusers' layout.",
        ),
    ],
) -> None:
    """Print a packaged prior's card: architecture, data, licences, figures, limits.

    For a file: its metadata, the parameters of each network, and its size. For a folder: its kind,
    networks, schedule, and whether it takes text and guidance.

    `latentdem prior info natural`

    `latentdem prior info my-prior.safetensors`

    `latentdem prior info my-diffusers-folder`
    """
    from latentdem.priors.latent import ASSETS

    try:
        if name in PACKAGED:
            typer.echo((ASSETS / f"{name}.md").read_text().rstrip())
        elif Path(name).is_dir():
            from latentdem.priors.folder_info import describe_folder

            for line in describe_folder(Path(name)):
                typer.echo(line)
        else:
            for line in describe(Path(name)):
                typer.echo(line)
    except (OSError, ValueError) as error:
        raise fail(str(error)) from None


def describe(path: Path) -> Iterable[str]:
    """Lines on a safetensors file: size, parameters by the first part of their names, metadata.

    Metadata that is JSON is printed a key a line, without what diffusers keeps for itself.

    Raises:
        ValueError: no such file, or not safetensors.
    """
    if not path.is_file():
        raise ValueError(f"{path} is neither one of {', '.join(PACKAGED)} nor a file or folder")
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as handle:
            metadata = handle.metadata() or {}
            tensors = [(key, handle.get_slice(key)) for key in handle.keys()]  # noqa: SIM118
            sizes = [(key, math.prod(t.get_shape()), t.get_dtype()) for key, t in tensors]
    except Exception as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    lines = [f"{'file':24} {path.name}, {path.stat().st_size / 1e6:.1f} MB"]
    # Statistics such as latent_mean stand at the top level; they are no network's parameters.
    for part in dict.fromkeys(key.split(".")[0] for key, _, _ in sizes if "." in key):
        found = [(n, dtype) for key, n, dtype in sizes if key.split(".")[0] == part and "." in key]
        kinds = "/".join(sorted({dtype for _, dtype in found}))
        lines.append(f"{part:24} {sum(n for n, _ in found):,} parameters, {kinds}")
    for key, text in metadata.items():
        lines += _metadata_lines(key, text)
    return lines


def _metadata_lines(key: str, text: str) -> list[str]:
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    if not isinstance(value, dict):
        return [f"{key:24} {', '.join(map(str, value)) if isinstance(value, list) else value}"]
    entries = {k: v for k, v in value.items() if not k.startswith("_") and v is not None}
    return [f"{key}", *(f"  {k:22} {v}" for k, v in entries.items())]
