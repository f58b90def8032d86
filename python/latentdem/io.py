"""Images in and out: anything a user holds becomes ``[B,C,H,W]`` in [0, 1]."""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError
from torch import Tensor

ImageLike = str | os.PathLike[str] | Image.Image | np.ndarray | Tensor


class InputError(ValueError):
    """Input that cannot be used; the message is one line and says why."""


def open_image(path: str | os.PathLike[str]) -> Image.Image:
    """Open an image file, apply its EXIF rotation, and read it completely."""
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file")
    if path.is_dir():
        raise InputError(f"{path}: is a folder, not an image")
    try:
        stream = path.open("rb")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    with stream:
        return decode_image(stream, path)


def decode_image(stream: IO[bytes], name: str | os.PathLike[str]) -> Image.Image:
    """The image that ``stream`` holds, upright and read completely; ``name`` is for messages."""
    try:
        image = Image.open(stream)
        image.load()
        return ImageOps.exif_transpose(image)
    except UnidentifiedImageError:
        raise InputError(f"{name}: not an image that Pillow can read") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{name}: damaged or truncated image ({error})") from None


def from_pil(image: Image.Image) -> Tensor:
    """``[1,C,H,W]`` in [0, 1] with C = 1 (grey), 3 (RGB) or 4 (RGBA); 16-bit grey is kept."""
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        deep = torch.from_numpy(np.array(image, dtype=np.float32))
        return deep[None, None] / (65535.0 if image.mode != "F" else 1.0)
    if image.mode in ("1", "L"):
        target = "L"
    elif image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        target = "RGBA"
    else:
        target = "RGB"
    array = np.array(image.convert(target), dtype=np.float32) / 255
    tensor = torch.from_numpy(array)
    return tensor[None, None] if tensor.dim() == 2 else tensor.permute(2, 0, 1)[None]


def _from_numpy(array: np.ndarray) -> Tensor:
    """``[H,W]``, ``[H,W,C]`` or ``[B,H,W,C]``; integers are scaled by their full range."""
    scale = float(np.iinfo(array.dtype).max) if np.issubdtype(array.dtype, np.integer) else 1.0
    tensor = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32) / np.float32(scale))
    if tensor.dim() == 2:
        return tensor[None, None]
    if tensor.dim() == 3:
        return tensor.permute(2, 0, 1)[None]
    if tensor.dim() == 4:
        return tensor.permute(0, 3, 1, 2)
    raise InputError(f"an array must be [H,W], [H,W,C] or [B,H,W,C], found shape {array.shape}")


def to_batch(image: ImageLike) -> Tensor:
    """Convert a path, PIL image, array ``[H,W(,C)]`` or tensor ``[(B,)C,H,W]``.

    Returns:
        ``[B,C,H,W]`` float32 in [0, 1], C = 1, 3 or 4.

    Raises:
        InputError: unreadable, empty, not finite, or outside [0, 1].
    """
    if isinstance(image, str | os.PathLike):
        batch = from_pil(open_image(image))
    elif isinstance(image, Image.Image):
        batch = from_pil(ImageOps.exif_transpose(image))
    elif isinstance(image, np.ndarray):
        batch = _from_numpy(image)
    elif isinstance(image, Tensor):
        full = 255.0 if image.dtype == torch.uint8 else 1.0
        batch = image.detach().cpu().float() / full
        batch = batch[None] if batch.dim() == 3 else batch
        batch = batch[None, None] if batch.dim() == 2 else batch
    else:
        raise InputError(f"cannot read an image from {type(image).__name__}")
    if batch.dim() != 4 or batch.shape[1] not in (1, 3, 4):
        raise InputError(
            f"an image needs 1, 3 or 4 channels as [B,C,H,W], found shape {tuple(batch.shape)}"
        )
    if batch.numel() == 0:
        raise InputError(f"the image is empty, shape {tuple(batch.shape)}")
    if not torch.isfinite(batch).all():
        raise InputError("the image has values that are not finite")
    if float(batch.min()) < -0.5 or float(batch.max()) > 1.5:
        raise InputError(
            f"image values must lie in [0, 1], found {float(batch.min()):.3g} to "
            f"{float(batch.max()):.3g}"
        )
    return batch.contiguous()


def to_pil(image: Tensor) -> Image.Image:
    """``[C,H,W]`` in [0, 1] as an 8-bit picture."""
    array = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


def kernel_picture(kernel: Tensor, side: int = 192) -> Image.Image:
    """``[k,k]`` as a grey picture, peak white, enlarged without smoothing."""
    scale = max(1, side // kernel.shape[-1])
    tile = to_pil((kernel / kernel.max().clamp_min(1e-12))[None])
    size = (kernel.shape[-1] * scale, kernel.shape[-2] * scale)
    return tile.resize(size, Image.Resampling.NEAREST)


def kernel_sheet(kernels: Tensor, columns: int | None = None) -> Tensor:
    """Kernels ``[P,k,k]`` in rows of ``columns``, each with its own peak at one: a plane.

    By default about as many rows as columns; a single kernel is left as it is.
    """
    count, side = kernels.shape[0], kernels.shape[-1]
    if count == 1:
        return kernels[0]
    columns = math.ceil(count**0.5) if columns is None else columns
    rows = -(-count // columns)
    sheet = kernels.new_zeros(rows * (side + 1) - 1, columns * (side + 1) - 1)
    for index, kernel in enumerate(kernels):
        top, left = (place * (side + 1) for place in divmod(index, columns))
        sheet[top : top + side, left : left + side] = kernel / kernel.max().clamp_min(1e-12)
    return sheet


def comparison_picture(before: Tensor, after: Tensor, kernel: Tensor) -> Image.Image:
    """Observation and restoration side by side, the kernel inset in the first.

    A smaller observation is enlarged to the restoration's size.
    """
    left, right = (to_pil(x[:3] if x.shape[0] == 4 else x).convert("RGB") for x in (before, after))
    left = left.resize(right.size, Image.Resampling.BICUBIC)
    gap = 8
    canvas = Image.new("RGB", (left.width + gap + right.width, left.height), "white")
    canvas.paste(left, (0, 0))
    canvas.paste(right, (left.width + gap, 0))
    side = max(kernel.shape[-1], min(left.size) // 4)
    inset = kernel_picture(kernel, side).convert("RGB")
    canvas.paste(inset, (0, 0))
    ImageDraw.Draw(canvas).rectangle((0, 0, *inset.size), outline="white")
    return canvas


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, as hex digits.

    Raises:
        FileNotFoundError: there is none, or it is a folder.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: {'is a folder' if path.is_dir() else 'no such file'}")
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def atomic_folder(
    folder: Path, *, last: str = "report.json", scratch: Path | None = None
) -> Iterator[Path]:
    """Yield a hidden folder; move its files into ``folder`` when all are written.

    Args:
        folder: where the files go.
        last: the file that says that a result is complete: of an older result it goes before the
            first file is replaced, of this one it comes after all others.
        scratch: where the hidden folder is made, on the same file system; by default ``folder``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=scratch or folder) as partial:
        yield Path(partial)
        files = sorted(Path(partial).iterdir(), key=lambda path: path.name == last)
        if any(file.name == last for file in files):
            (folder / last).unlink(missing_ok=True)
        for file in files:
            file.replace(folder / file.name)


def check_writable(folder: Path) -> None:
    """Fail now, not after minutes of work, if ``folder`` cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror or error}") from None
