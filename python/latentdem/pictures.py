"""Pictures of three-dimensional results: a sheet of views, a turntable."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from latentdem.io import to_pil
from latentdem.operators.radiance_field import RadianceField

_LABEL_HEIGHT = 14
_GAP = 4


def sheet(
    images: Tensor, columns: int, labels: Sequence[str] | None = None, *, tile: int = 128
) -> Image.Image:
    """Views ``[N,3,s,s]`` in [0, 1] in rows of ``columns``, each with its label below.

    Args:
        images: the views; at least one.
        columns: views in a row.
        labels: one for each; cut to the width of a tile.
        tile: side in pixels; smaller views are enlarged by a whole factor, unsmoothed.

    Raises:
        ValueError: no view, no column, or labels that do not match.
    """
    if images.dim() != 4 or images.shape[1] != 3 or not len(images):
        raise ValueError(f"images must have shape [N,3,s,s], N >= 1, found {list(images.shape)}")
    if columns < 1:
        raise ValueError(f"columns must be positive, found {columns}")
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"labels must be {len(images)}, one for each view, found {len(labels)}")
    height, width = (side * max(1, tile // side) for side in images.shape[2:])
    below = 0 if labels is None else _LABEL_HEIGHT
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    size = (columns * (width + _GAP) + _GAP, rows * (height + below + _GAP) + _GAP)
    canvas = Image.new("RGB", size, "gray")
    draw = ImageDraw.Draw(canvas)
    for k, image in enumerate(images):
        x = _GAP + k % columns * (width + _GAP)
        y = _GAP + k // columns * (height + below + _GAP)
        picture = to_pil(image.detach().cpu()).resize((width, height), Image.Resampling.NEAREST)
        canvas.paste(picture, (x, y))
        if labels is not None:
            text = labels[k]
            while text and draw.textlength(text) > width:
                text = text[:-1]
            draw.text((x, y + height + 1), text, fill="white")
    return canvas


@torch.no_grad()
def turntable(
    field: RadianceField,
    path: Path,
    *,
    fov: float,
    elevation: float = 20.0,
    radius: float = 2.6,
    frames: int = 36,
    image_size: int = 192,
    milliseconds: int = 80,
) -> Path:
    """Write a looping animation (webp) of one turn around ``field``.

    Args:
        field: what to show.
        path: file to write, by custom ``*.webp``.
        fov: full angle of view in degrees.
        elevation: of the camera in degrees.
        radius: its distance.
        frames: in a turn.
        image_size: side of a frame in pixels.
        milliseconds: a frame lasts.

    Returns:
        ``path``.
    """
    azimuth = torch.arange(frames) * (360 / frames)
    poses = torch.stack(
        (torch.full_like(azimuth, elevation), azimuth, torch.full_like(azimuth, radius)), 1
    )
    pictures = []
    for pose in poses.split(6):
        color, _, _ = field.render(pose, fov=fov, image_size=image_size)
        pictures += [to_pil(image) for image in color.cpu()]
    pictures[0].save(
        path,
        format="WEBP",
        save_all=True,
        append_images=pictures[1:],
        duration=milliseconds,
        loop=0,
        quality=85,
        method=2,
    )
    return path
