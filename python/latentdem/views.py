"""Pictures of one object, made ready for the objects prior: masked, framed, on white.

The prior knows square views on a white ground, the object around the middle, and reads its
distance off its size.  So either the caller's framing is kept as it is, or every view is centred
on its object and **one** scale is used for all, which keeps the ratio of the distances.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from torch import Tensor

from latentdem.io import ImageLike, InputError, to_batch

MASK_ADVICE = (
    "give an image with an alpha channel, a plain background, or a mask (white where the object is)"
)
_FILL = 0.75  # share of the side that the largest object takes after framing
_OPAQUE = 0.5


@dataclass(frozen=True)
class Views:
    """Views of one object, ready for the prior.

    Args:
        images: ``[K,3,S,S]`` in [0, 1], on white.
        masks: ``[K,1,S,S]`` in [0, 1], share of the pixel that the object covers.
        names: K names for reports.
    """

    images: Tensor
    masks: Tensor
    names: list[str]

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device | str) -> Views:
        """The same views on another device."""
        return Views(self.images.to(device), self.masks.to(device), self.names)


def load_views(
    inputs: Sequence[ImageLike],
    *,
    masks: Sequence[ImageLike] | None = None,
    size: int = 64,
    at_least: int = 2,
) -> Views:
    """Read two or more views of one object and bring them to the prior's form.

    The object is told from its background by ``masks`` where they are given, else by the alpha
    channel, else by the colour of the picture's border.  Square views whose objects lie wholly
    inside and around the middle keep their framing: size and place then tell where the camera
    was.  All others (photographs) are centred on the object and scaled by one factor for all, so
    that the largest object fills three quarters of the side.  Views may differ in size and be
    turned upright, but not in shape: a crop has lost what tells the scale.

    Args:
        inputs: paths, PIL images, arrays ``[H,W(,C)]`` or tensors ``[(1,)C,H,W]``.
        masks: one for each view, of its size; white is the object.  ``None`` among them leaves
            that view to its own alpha channel or border.
        size: S.
        at_least: so many views; one is enough where its pose is known.

    Raises:
        InputError: fewer views, identical views, views of different shapes, masks of
            another size or number, an empty mask, an object that cannot be told from its
            background.

    >>> wedge = torch.ones(2, 3, 80, 80)
    >>> wedge[0, :, 20:60, 30:50] = wedge[1, :, 30:60, 20:70] = 0.2
    >>> views = load_views(list(wedge))
    >>> views.images.shape, views.names
    (torch.Size([2, 3, 64, 64]), ['view 1', 'view 2'])
    """
    single = isinstance(inputs, np.ndarray | Tensor) and inputs.ndim < 4
    if single or isinstance(inputs, str | os.PathLike | Image.Image):
        raise InputError("views must be a list of two or more images, found one image")
    count = len(inputs)
    if count < at_least:
        raise InputError(
            f"at least two views of the object are needed, found {count}; add a picture from "
            "another side"
        )
    if masks is not None and len(masks) != count:
        raise InputError(f"one mask for each view is needed, found {len(masks)} for {count} views")
    names = [_name(view, k) for k, view in enumerate(inputs)]
    cut = [
        _cut_out(view, None if masks is None else masks[k], names[k])
        for k, view in enumerate(inputs)
    ]
    _refuse_twins([image for image, _ in cut], names)
    _same_shape([image for image, _ in cut], names)
    if _framed([mask for _, mask in cut]):
        framed = [_resize(image, mask, size) for image, mask in cut]
    else:
        framed = _reframe(cut, size)
    return Views(torch.cat([i for i, _ in framed]), torch.cat([m for _, m in framed]), names)


def _name(view: ImageLike, index: int) -> str:
    return Path(view).name if isinstance(view, str | os.PathLike) else f"view {index + 1}"


# Masks --------------------------------------------------------------------------------------


def _cut_out(view: ImageLike, mask: ImageLike | None, name: str) -> tuple[Tensor, Tensor]:
    """``[1,3,H,W]`` on white and its mask ``[1,1,H,W]``."""
    batch = to_batch(view)
    if len(batch) != 1:
        raise InputError(
            f"{name}: one image for each view is needed, found a batch of {len(batch)}"
        )
    color = batch[:, :3] if batch.shape[1] >= 3 else batch.expand(-1, 3, -1, -1)
    color = color.clamp(0, 1)
    alpha = batch[:, 3:].clamp(0, 1) if batch.shape[1] == 4 else None
    if mask is not None:
        cover = _given_mask(mask, name, color.shape[-2:])
    elif alpha is not None and float(alpha.min()) < _OPAQUE:
        cover = alpha
    else:
        cover = _mask_from_border(color, name)
        if alpha is not None:
            cover = cover * alpha
    _check_mask(cover > _OPAQUE, name)
    return color * cover + (1 - cover), cover


def _given_mask(mask: ImageLike, name: str, size: torch.Size) -> Tensor:
    cover = to_batch(mask)
    if cover.shape[-2:] != size:
        (h, w), (mh, mw) = size, cover.shape[-2:]
        raise InputError(
            f"{name}: its mask is {mw} x {mh} pixels, the view {w} x {h}; they must be the same"
        )
    if len(cover) != 1:
        raise InputError(f"{name}: one mask is needed, found a batch of {len(cover)}")
    if cover.shape[1] == 4 and float(cover[:, 3].min()) < _OPAQUE:
        cover = cover[:, 3:]  # a cut-out given as a mask
    else:
        cover = cover[:, :3].mean(1, keepdim=True)
    return cover.clamp(0, 1)


def _border(image: np.ndarray) -> np.ndarray:
    """Pixels ``[P,...]`` of the outermost frame of ``[H,W,...]``, one in thirty pixels wide."""
    width = max(1, min(image.shape[:2]) // 30)
    inner = np.zeros(image.shape[:2], dtype=bool)
    inner[width:-width, width:-width] = True
    return image[~inner]


def _mask_from_border(color: Tensor, name: str) -> Tensor:
    """Everything that differs from the border's colour, without specks and holes.

    Source: the median and the median absolute deviation are the border's robust mean and spread;
    an object may cross a third of it.
    """
    image = color[0].permute(1, 2, 0).double().numpy()
    border = _border(image)
    ground = np.median(border, axis=0)
    away = np.linalg.norm(border - ground, axis=1)
    spread = 1.4826 * float(np.median(away))
    if spread > 0.12:
        raise InputError(
            f"{name}: the background is too uneven to tell the object from it; {MASK_ADVICE}"
        )
    found = np.linalg.norm(image - ground, axis=2) > max(0.03, 4 * spread)
    labels, count = ndimage.label(found, structure=np.ones((3, 3)))
    if count == 0:
        raise InputError(f"{name}: no object stands out from the background; {MASK_ADVICE}")
    areas = np.bincount(labels.ravel())[1:]
    # The object may consist of several parts; specks are a tenth of the largest or less.
    kept = np.isin(labels, 1 + np.flatnonzero(areas > 0.1 * areas.max()))
    filled = ndimage.binary_fill_holes(kept)
    return torch.from_numpy(filled.astype(np.float32))[None, None]


def _check_mask(mask: Tensor, name: str) -> None:
    share = float(mask.float().mean())
    if share == 0:
        raise InputError(f"{name}: the mask is empty; {MASK_ADVICE}")
    if share < 0.003 or int(mask.sum()) < 16:
        raise InputError(
            f"{name}: the object covers only {100 * share:.2g} % of the picture; crop the picture "
            f"or {MASK_ADVICE}"
        )
    touching = float(_border(mask[0, 0].numpy()).mean())
    if share > 0.95 or touching > 0.35:
        raise InputError(
            f"{name}: the object cannot be told from its background (it would cover "
            f"{100 * share:.0f} % of the picture); {MASK_ADVICE}"
        )


def _refuse_twins(images: list[Tensor], names: list[str]) -> None:
    for k, image in enumerate(images):
        for j in range(k):
            same = images[j].shape == image.shape
            if same and float((images[j] - image).abs().max()) < 1.5 / 255:
                raise InputError(
                    f"{names[j]} and {names[k]} are the same picture; views from different sides "
                    "are needed"
                )


def _same_shape(images: list[Tensor], names: list[str]) -> None:
    shapes = [max(image.shape[-2:]) / min(image.shape[-2:]) for image in images]
    for k, shape in enumerate(shapes):
        if abs(shape / shapes[0] - 1) > 0.02:
            (h0, w0), (h, w) = images[0].shape[-2:], images[k].shape[-2:]
            raise InputError(
                f"{names[0]} is {w0} x {h0} pixels and {names[k]} {w} x {h}: views of different "
                "shapes cannot be brought to one scale; give uncropped pictures of one camera, or "
                "crop all to squares"
            )


# Framing ------------------------------------------------------------------------------------


def _box(mask: Tensor) -> tuple[int, int, int, int]:
    """First and one past the last row, then columns, of ``[1,1,H,W]``."""
    inside = mask[0, 0] > _OPAQUE
    rows = torch.nonzero(inside.any(1))[:, 0]
    columns = torch.nonzero(inside.any(0))[:, 0]
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1


def _framed(masks: list[Tensor]) -> bool:
    """Whether the views can be taken as they are."""
    for mask in masks:
        height, width = mask.shape[-2:]
        top, bottom, left, right = _box(mask)
        large = max(bottom - top, right - left) >= 0.2 * height
        centre = (top + bottom) / 2 - height / 2, (left + right) / 2 - width / 2
        central = max(map(abs, centre)) <= 0.2 * height
        inside = min(top, left) > 0 and max(bottom, right) < height
        if not (height == width and large and central and inside):
            return False
    return True


def _resize(image: Tensor, mask: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """To ``size``, smoothed first where that is smaller; colours stay those on white."""
    if image.shape[-2:] == (size, size):
        return image, mask
    stack = torch.cat((image, mask), 1)
    scaled = torch.nn.functional.interpolate(
        stack, (size, size), mode="bilinear", antialias=True, align_corners=False
    )
    return scaled[:, :3].clamp(0, 1), scaled[:, 3:].clamp(0, 1)


def _reframe(cut: list[tuple[Tensor, Tensor]], size: int) -> list[tuple[Tensor, Tensor]]:
    """Centre every view on its object; one scale for all, in units of each picture's long side."""
    boxes = [_box(mask) for _, mask in cut]
    extents = [
        max(bottom - top, right - left) / max(image.shape[-2:])
        for (image, _), (top, bottom, left, right) in zip(cut, boxes)
    ]
    window = max(extents) / _FILL
    result = []
    for (image, mask), (top, bottom, left, right) in zip(cut, boxes):
        side = max(1, round(window * max(image.shape[-2:])))
        row, column = (top + bottom - side) // 2, (left + right - side) // 2
        canvas = torch.ones(1, 4, side, side)
        canvas[:, 3] = 0
        stack = torch.cat((image, mask), 1)
        r0, r1 = max(row, 0), min(row + side, image.shape[-2])
        c0, c1 = max(column, 0), min(column + side, image.shape[-1])
        canvas[..., r0 - row : r1 - row, c0 - column : c1 - column] = stack[..., r0:r1, c0:c1]
        result.append(_resize(canvas[:, :3], canvas[:, 3:], size))
    return result
