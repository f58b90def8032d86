"""Training photographs: where they come from, how they are split and cropped.

The pictures are those of a few Debian packages, listed file by file with their
SHA-256 in ``manifest.json``.  :func:`fetch` downloads and unpacks the packages,
:func:`load_images` reads the listed files, checks their hashes, and shrinks each
until it is sharp at the pixel level, because a photograph that is soft at its
native resolution would teach a deblurring prior that soft is natural.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

MANIFEST = Path(__file__).with_name("manifest.json")
SHARPNESS = 0.45
"""Least ratio of gradient energy at the pixel scale to that at twice the scale."""

MIN_SIDE = 192
MAX_SIDE = 1600


@dataclass(frozen=True)
class Source:
    """One file of the manifest; ``dhash`` is its :func:`difference_hash` as 16 hex digits."""

    package: str
    path: str
    sha256: str
    split: str
    weight: float
    dhash: str = ""


def read_manifest(path: Path = MANIFEST) -> list[Source]:
    """Return the listed files; ``path`` is a JSON file with a ``files`` list."""
    entries = json.loads(path.read_text())["files"]
    return [Source(**entry) for entry in entries]


def fetch(folder: Path, sources: Iterable[Source]) -> None:
    """Download and unpack the Debian packages of ``sources`` below ``folder``.

    Needs ``apt-get`` and ``dpkg-deb`` (any Debian or Ubuntu); elsewhere unpack
    the packages named in ``manifest.json`` by hand, one folder a package.
    """
    for package in sorted({source.package for source in sources}):
        target = folder / package
        if target.is_dir():
            continue
        if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
            raise RuntimeError(
                f"{target} is missing and this system has no apt-get: unpack the Debian "
                f"package {package} there (dpkg-deb -x {package}.deb {target})"
            )
        downloads = folder / "debs"
        downloads.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", package], cwd=downloads, check=True)
        archive = next(downloads.glob(f"{package}_*.deb"))
        partial = folder / f".{package}.partial"
        subprocess.run(["dpkg-deb", "-x", str(archive), str(partial)], check=True)
        partial.rename(target)


def _read_bytes(folder: Path, source: Source) -> bytes:
    """Read one file.

    ``archive.pk3!inner`` names a member of a zip archive, ``resources.rcc@start+length`` bytes of
    a Qt resource file, which keeps pictures as they are.
    """
    outer, _, span = source.path.partition("@")
    if span:
        start, length = (int(number) for number in span.split("+"))
        return (folder / source.package / outer).read_bytes()[start : start + length]
    outer, _, inner = source.path.partition("!")
    path = folder / source.package / outer
    if not inner:
        return path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        return archive.read(inner)


def gradient_ratio(image: np.ndarray) -> float:
    """Gradient energy of ``image [H,W,3]`` over that of its 2x reduction.

    About 1 for a scale-invariant (sharp) picture, near 0.25 or less for a soft one.
    """

    def energy(a: np.ndarray) -> float:
        return float((np.diff(a, axis=0) ** 2).mean() + (np.diff(a, axis=1) ** 2).mean())

    height, width = image.shape[0] // 2 * 2, image.shape[1] // 2 * 2
    half = image[:height, :width].reshape(height // 2, 2, width // 2, 2, -1).mean((1, 3))
    return energy(image) / max(energy(half), 1e-9)


def difference_hash(image: Image.Image) -> int:
    """64 bits that nearly survive scaling, recompression and exposure (dHash).

    Bit (r, c): is pixel (r, c) of the 9 x 8 reduction in grey darker than its right neighbour?
    Two versions of one picture differ in a few bits, unrelated pictures in about 32.
    """
    grey = image.convert("L").resize((9, 8), Image.Resampling.BOX)
    pixels = np.asarray(grey, dtype=np.int16)
    return int.from_bytes(np.packbits(pixels[:, :-1] < pixels[:, 1:]).tobytes(), "big")


def hash_distance(a: int, b: int) -> int:
    """Number of bits in which two difference hashes disagree."""
    return (a ^ b).bit_count()


def shrink_until_sharp(image: Image.Image) -> Image.Image | None:
    """Reduce ``image`` by factors of sqrt(2) until it is sharp; ``None`` if it never is."""
    scale = min(1.0, MAX_SIDE / max(image.size))
    while min(image.size) * scale >= MIN_SIDE:
        size = (round(image.width * scale), round(image.height * scale))
        reduced = image.resize(size, Image.Resampling.LANCZOS) if scale < 1 else image
        if gradient_ratio(np.asarray(reduced, dtype=np.float32) / 255) >= SHARPNESS:
            return reduced
        scale *= 0.5**0.5
    return None


def load_images(
    folder: Path, split: str, *, sources: list[Source] | None = None
) -> list[tuple[Tensor, float]]:
    """Read the files of one split (``train`` or ``validation``).

    Returns ``(image [3,H,W] uint8, weight)`` pairs.  Raises ``ValueError`` if a
    file's hash is not the listed one.  Sharp pictures are cached in ``folder/cache``.
    """
    images: list[tuple[Tensor, float]] = []
    cache = folder / "cache"
    cache.mkdir(parents=True, exist_ok=True)
    for source in sources or read_manifest():
        if source.split != split:
            continue
        cached = cache / f"{source.sha256}.png"
        if not cached.exists():
            data = _read_bytes(folder, source)
            found = hashlib.sha256(data).hexdigest()
            if found != source.sha256:
                raise ValueError(f"{source.path}: sha256 is {found}, expected {source.sha256}")
            sharp = shrink_until_sharp(_decode(data))
            if sharp is None:
                cached.with_suffix(".soft").touch()
                continue
            # Whole or not at all: other processes read it, and this one may be killed.
            partial = cached.with_suffix(f".{os.getpid()}.partial")
            sharp.save(partial, "PNG")
            partial.replace(cached)
        if cached.with_suffix(".soft").exists():
            continue
        pixels = np.asarray(Image.open(cached).convert("RGB"))
        images.append((torch.from_numpy(pixels.copy()).permute(2, 0, 1), source.weight))
    return images


def _decode(data: bytes) -> Image.Image:
    image: Image.Image = Image.open(io.BytesIO(data))
    if image.mode in ("P", "RGBA", "LA"):
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(canvas, image)
    return image.convert("RGB")


class CropSampler:
    """Endless random crops, with flat ones thinned out.

    Args:
        images: what :func:`load_images` returned.
        size: side of the square crop in pixels.
        seed: seed of the sampler's own generator.
    """

    def __init__(self, images: list[tuple[Tensor, float]], size: int, seed: int) -> None:
        self.images = [(image, w) for image, w in images if min(image.shape[1:]) > size]
        self.size = size
        self.rng = np.random.default_rng(seed)
        areas = np.array([w * float(i.shape[1] * i.shape[2]) ** 0.5 for i, w in self.images])
        self.probability = areas / areas.sum()

    def crop(self) -> Tensor:
        """One crop ``[3,size,size]`` uint8, flipped, turned and sometimes halved in scale."""
        rng, size = self.rng, self.size
        for _ in range(8):
            image, _ = self.images[rng.choice(len(self.images), p=self.probability)]
            span = size
            if rng.random() < 0.25 and min(image.shape[1:]) > 2 * size:
                span = 2 * size
            top = int(rng.integers(image.shape[1] - span + 1))
            left = int(rng.integers(image.shape[2] - span + 1))
            crop = image[:, top : top + span, left : left + span]
            if span == 2 * size:
                blocks = crop.float().reshape(3, size, 2, size, 2)
                crop = blocks.mean((2, 4)).round().to(torch.uint8)
            gradient = (crop[:, 1:].float() - crop[:, :-1].float()).abs().mean()
            gradient += (crop[:, :, 1:].float() - crop[:, :, :-1].float()).abs().mean()
            if rng.random() < float(gradient) / 12 + 0.03:
                break
        if rng.random() < 0.5:
            crop = crop.flip(-1)
        if rng.random() < 0.15:
            crop = crop.transpose(-1, -2)
        if rng.random() < 0.25:
            crop = crop[torch.from_numpy(rng.permutation(3))]
        return crop

    def batch(self, count: int) -> Tensor:
        """``count`` crops ``[count,3,size,size]`` as float32 in [-1, 1]."""
        crops = torch.stack([self.crop().contiguous() for _ in range(count)])
        images = crops.float().div_(127.5).sub_(1)
        # Exposure and contrast vary between cameras; the prior should not care.
        gain = torch.from_numpy(self.rng.uniform(0.7, 1.0, (count, 1, 1, 1))).float()
        shift = torch.from_numpy(self.rng.uniform(-1.0, 1.0, (count, 1, 1, 1))).float()
        return images * gain + shift * (1 - gain)


CELL = 32
"""Side in pixels of the cells by whose contrast :class:`PictureBank` draws its crops."""


class PictureBank:
    """Random crops of pictures that lie in the memory of a device, drawn without a loop.

    Every picture is there twice if it is large: as it is and at half size.  Crops centre on
    cells of 32 x 32 pixels, drawn by contrast, so that flat ones are thinned out.

    Args:
        images: what :func:`load_images` returned.
        device: where the pictures and crops live.
        seed: seed of the bank's own generator.
    """

    def __init__(
        self, images: list[tuple[Tensor, float]], device: torch.device, *, seed: int
    ) -> None:
        self.device = device
        self.generator = torch.Generator(device).manual_seed(seed)
        pixels: list[Tensor] = []
        shapes: list[tuple[int, int, int]] = []
        cells: list[Tensor] = []
        first = 0
        for image, weight in images:
            versions = [image]
            if min(image.shape[1:]) >= 2 * MIN_SIDE:
                versions.append(F.avg_pool2d(image.float(), 2).round().to(torch.uint8))
            for version in versions:
                height, width = version.shape[1:]
                cells.append(_cells(version, len(shapes), weight))
                shapes.append((first, height, width))
                first += height * width
                pixels.append(version.permute(1, 2, 0).reshape(-1, 3))
        self.pixels = torch.cat(pixels).to(device)  # [P,3] uint8: all pictures, row by row
        self.shapes = torch.tensor(shapes, device=device)  # [N,3]: first pixel, height, width
        table = torch.cat(cells)
        self.cells = table[:, :3].long().to(device)  # [K,3]: picture, row, column
        self.weights = table[:, 3].to(device)  # [K] float64
        self._cumulative: dict[int, Tensor] = {}

    def uniform(self, *shape: int) -> Tensor:
        """Random numbers in [0, 1) of the bank's own generator, on its device."""
        return torch.rand(*shape, device=self.device, generator=self.generator)

    def _draw_cells(self, count: int, size: int) -> Tensor:
        """``[count,3]`` rows of the cell table, of pictures that hold crops of ``size``."""
        if size not in self._cumulative:
            large = (self.shapes[self.cells[:, 0], 1:] >= size).all(1)
            if not bool(large.any()):
                raise ValueError(f"no picture is as large as the crops, {size} pixels")
            total = (self.weights * large).cumsum(0)
            self._cumulative[size] = total / total[-1].clone()
        # Double: a million small steps would be lost in float32.
        places = torch.rand(
            count, dtype=torch.float64, device=self.device, generator=self.generator
        )
        index = torch.searchsorted(self._cumulative[size], places, right=True)
        return self.cells[index.clamp_max(len(self.cells) - 1)]

    def crops(self, count: int, size: int) -> Tensor:
        """``[count,3,size,size]`` uint8: flipped, sometimes turned or with permuted channels."""
        picture, *corner = self._draw_cells(count, size).unbind(1)
        first, *sides = self.shapes[picture].unbind(1)
        lines = []
        for start, side, share in zip(corner, sides, (0.15, 0.5), strict=True):
            flip = self.uniform(count) < share
            jitter = (self.uniform(count) * CELL).long()
            place = (start + jitter - size // 2).clamp_min(0).minimum(side - size)
            steps = torch.arange(size, device=self.device)
            steps = torch.where(flip[:, None], size - 1 - steps, steps)
            lines.append(place[:, None] + steps)  # [count,size]
        rows, columns = lines
        turned = (self.uniform(count) < 0.15)[:, None, None]
        y = torch.where(turned, rows[:, None, :], rows[:, :, None])
        x = torch.where(turned, columns[:, :, None], columns[:, None, :])
        index = first[:, None, None] + y * sides[1][:, None, None] + x
        images = self.pixels[index].permute(0, 3, 1, 2)  # channels_last in memory
        order = self.uniform(count, 3).argsort(1)
        order = torch.where(
            self.uniform(count, 1) < 0.25, order, torch.arange(3, device=self.device)
        )
        return images.gather(1, order[:, :, None, None].expand_as(images))

    def batch(self, count: int, size: int) -> Tensor:
        """Crops as float32 in [-1, 1] with varying exposure and contrast, channels_last."""
        images = self.crops(count, size).float() / 127.5 - 1
        # Exposure and contrast vary between cameras; the prior should not care.
        gain = 0.7 + 0.3 * self.uniform(count, 1, 1, 1)
        shift = 2 * self.uniform(count, 1, 1, 1) - 1
        images = images * gain + shift * (1 - gain)
        return images.contiguous(memory_format=torch.channels_last)


def _cells(image: Tensor, index: int, weight: float) -> Tensor:
    """``[K,4]`` float64 rows (index, row, column, weight) of the cells of ``image [3,H,W]``.

    A picture counts by the root of its area, a cell by its mean absolute gradient.
    """
    grey = image.float().mean(0)
    contrast = torch.zeros_like(grey)
    contrast[1:] += (grey[1:] - grey[:-1]).abs()
    contrast[:, 1:] += (grey[:, 1:] - grey[:, :-1]).abs()
    means = F.avg_pool2d(contrast[None], CELL, ceil_mode=True)[0].double()
    interest = (means / 12 + 0.03).clamp_max(1) * weight / grey.numel() ** 0.5
    rows, columns = torch.meshgrid(
        torch.arange(means.shape[0]), torch.arange(means.shape[1]), indexing="ij"
    )
    owner = torch.full_like(interest, index)
    return torch.stack(
        [owner, CELL * rows.double(), CELL * columns.double(), interest], -1
    ).reshape(-1, 4)
