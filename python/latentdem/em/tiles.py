"""Large photographs: the kernel from one informative window, the image tile by tile.

One blur has spoiled the whole photograph, so a window rich in edges tells its kernel as well as
everything would; with the kernel known, tiles are independent but for their borders.  Memory is
that of one tile and of the photograph itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from latentdem.em.steps import EMState, StepReport

WINDOW = 512
"""Side of the window that the kernel is found in."""

MARGIN = 16
"""Pixels beside a kernel's width that neighbouring tiles share."""

CLIPPED = 0.98
"""Grey values from here on may be clipped: no convolution explains them."""

Solve = Callable[[Tensor, Tensor | None, int, Callable[[StepReport], None]], EMState]
"""``solve(observation, kernel or None, seed, callback)``: the image on the observation."""


@dataclass(frozen=True)
class TiledState:
    """A restored photograph.

    Args:
        image: ``[1,3,H,W]``, not clamped.
        state: of the kernel's window, with the counts of all tiles added.
        window: top, left, height and width of that window; none if the kernel was known.
        tiles: top, left, height and width of each tile.
    """

    image: Tensor
    state: EMState
    window: tuple[int, int, int, int] | None
    tiles: list[tuple[int, int, int, int]]


def spans(length: int, side: int, overlap: int) -> list[int]:
    """Where intervals of ``side`` begin so that they cover ``length``, evenly spaced.

    Neighbours share at least ``overlap``; one interval (of ``length``) suffices for short lengths.

    >>> spans(1000, 400, 50)
    [0, 300, 600]
    """
    if length <= side:
        return [0]
    count = -(-(length - overlap) // (side - overlap))
    return [round(k * (length - side) / (count - 1)) for k in range(count)]


def even_side(length: int, side: int, overlap: int) -> int:
    """Least side of as many intervals as it takes of ``side`` to cover ``length``.

    Tiles of 640 pixels would cover 1000 with 1240, these with 1040: what they share, and no more.

    >>> even_side(1000, 640, 40)
    520
    """
    count = len(spans(length, side, overlap))
    return max(-(-(length + (count - 1) * overlap) // count), min(2 * overlap, length))


def informative_window(image: Tensor, side: int) -> tuple[int, int, int, int]:
    """Top, left, height and width of the window of ``image [1,C,H,W]`` that tells most of a kernel.

    The one with most gradient energy after a 3 x 3 mean, which keeps edges and takes noise; clipped
    pixels and their neighbours count for nothing.
    """
    height, width = (min(side, length) for length in image.shape[-2:])
    grey = F.avg_pool2d(
        image.mean(1, keepdim=True), 3, stride=1, padding=1, count_include_pad=False
    )
    energy = torch.zeros_like(grey)
    energy[..., :-1, :] += grey.diff(dim=-2).square()
    energy[..., :, :-1] += grey.diff(dim=-1).square()
    clipped = (image.amax(1, keepdim=True) >= CLIPPED).to(grey)
    energy = energy * (1 - F.max_pool2d(clipped, 9, stride=1, padding=4))
    stride = max(1, min(height, width) // 16)
    sums = F.avg_pool2d(energy, (height, width), stride=stride)
    top, left = divmod(int(sums.flatten().argmax()), sums.shape[-1])
    return top * stride, left * stride, height, width


def blend_weight(
    height: int, width: int, inner: tuple[bool, bool, bool, bool], dead: int, overlap: int
) -> Tensor:
    """``[1,1,height,width]``: a tile's share, falling towards the neighbours' sides.

    Args:
        height: of the tile.
        width: of the tile.
        inner: whether there is a neighbour above, below, left, right.
        dead: pixels at such a side that count for next to nothing: half a kernel, where the
            tile knows less than its neighbour.
        overlap: of neighbours, at least; over what is left of it the share rises to one.
    """

    def ramp(length: int, before: bool, after: bool) -> Tensor:
        place = torch.arange(length) + 0.5
        rise = max(1, overlap - 2 * dead)
        share = torch.ones(length)
        for there, distance in ((before, place), (after, length - place)):
            if there:
                share = torch.minimum(share, ((distance - dead) / rise).clamp(0, 1))
        return share.clamp_min(1e-4)  # where tiles overlap more, nobody is at fault

    above, below, left, right = inner
    return torch.outer(ramp(height, above, below), ramp(width, left, right))[None, None]


class _Store:
    """Finished parts in a folder, so that a killed run goes on; of no use to another request."""

    def __init__(self, folder: Path | None, key: str, device: torch.device) -> None:
        self.folder, self.key, self.device = folder, key, device

    def load(self, name: str) -> tuple[Tensor, list[dict[str, float]]] | None:
        """A part and its history, or nothing."""
        path = None if self.folder is None else self.folder / f"{name}.safetensors"
        if path is None or not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as handle:
                metadata = handle.metadata() or {}
                if metadata.get("key") != self.key:
                    return None
                return handle.get_tensor("part").to(self.device), json.loads(metadata["history"])
        except Exception:  # cut off by a crash of the machine: as if it were not there
            return None

    def save(self, name: str, part: Tensor, history: list[dict[str, float]]) -> None:
        """Keep a part; whole or not at all."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f"{name}.partial"
        metadata = {"key": self.key, "history": json.dumps(history)}
        save_file({"part": part.cpu().contiguous()}, partial, metadata)
        partial.replace(self.folder / f"{name}.safetensors")


def request_key(observation: Tensor, kernel: Tensor | None, facts: dict[str, object]) -> str:
    """Digest of all that a result depends on."""
    digest = hashlib.sha256(observation.cpu().contiguous().numpy().tobytes())
    if kernel is not None:
        digest.update(kernel.cpu().contiguous().numpy().tobytes())
    digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def solve_in_tiles(
    observation: Tensor,
    solve: Solve,
    *,
    kernel: Tensor | None,
    kernel_size: int,
    steps: int,
    kernel_steps: int | None = None,
    tile: int,
    seed: int,
    checkpoint: Path | None = None,
    key: str = "",
    callback: Callable[[StepReport], None] | None = None,
) -> TiledState:
    """Restore ``observation [1,3,H,W]`` with one kernel.

    Args:
        observation: the photograph.
        solve: see :data:`Solve`.
        kernel: if it is known.
        kernel_size: k, for the overlap.
        steps: reports of one call of ``solve``.
        kernel_steps: of the one that finds the kernel; by default as many.
        tile: largest side of the tiles in pixels.
        seed: of the window; tile n has a seed of its own that depends on it and on n.
        checkpoint: folder that finished parts are kept in.
        key: what they belong to (:func:`request_key`).
        callback: told every step, with the whole photograph as it stands.
    """
    height, width = observation.shape[-2:]
    overlap = kernel_size + MARGIN
    side = max(tile, 2 * overlap)
    rows, columns = (even_side(length, side, overlap) for length in (height, width))
    tops, lefts = spans(height, rows, overlap), spans(width, columns, overlap)
    tiles = [(top, left, rows, columns) for top in tops for left in lefts]
    # Parts of another geometry, such as an earlier version's, are of no use.
    store = _Store(checkpoint, f"{key} {rows}x{columns}", observation.device)
    if kernel_steps is None:
        kernel_steps = steps
    reports = len(tiles) * steps + (kernel_steps if kernel is None else 0)
    shown = observation.clone()
    state = EMState(observation, torch.empty(0) if kernel is None else kernel)
    reported = 0

    def run(
        name: str, place: tuple[int, int, int, int], known: Tensor | None, own_seed: int
    ) -> Tensor:
        """The kernel of a window, or the image of a tile with the kernel known."""
        nonlocal reported
        top, left, tall, wide = place
        area = (..., slice(top, top + tall), slice(left, left + wide))

        def step(report: StepReport) -> None:
            shown[area] = report.image
            if callback is not None:
                now = reported + report.step
                callback(replace(report, step=now, steps=reports, image=shown))

        kept = store.load(name)
        if kept is None:
            found = solve(observation[area].contiguous(), known, own_seed, step)
            kept = (
                (found.kernel, found.history)
                if known is None
                else (found.image, found.history[-1:])
            )
            store.save(name, *kept)
            state.evaluations += found.evaluations
            state.backward_passes += found.backward_passes
            state.peak_memory_bytes = max(state.peak_memory_bytes, found.peak_memory_bytes)
            for phase, seconds in found.seconds.items():
                state.seconds[phase] = state.seconds.get(phase, 0.0) + seconds
        state.history += kept[1]
        reported += kernel_steps if known is None else steps
        return kept[0]

    window = None
    if kernel is None:
        window = informative_window(observation, min(WINDOW, side))
        kernel = run("kernel", window, None, seed)
        shown.copy_(observation)
    state.kernel = kernel
    total = torch.zeros_like(observation)
    share = observation.new_zeros(1, 1, height, width)
    for number, place in enumerate(tiles):
        top, left, tall, wide = place
        image = run(f"tile-{number:04d}", place, kernel, seed + 1 + number)
        inner = (top > 0, top + tall < height, left > 0, left + wide < width)
        weight = blend_weight(tall, wide, inner, kernel_size // 2, overlap).to(observation)
        area = (..., slice(top, top + tall), slice(left, left + wide))
        total[area] += weight * image
        share[area] += weight
        shown[area] = total[area] / share[area]
    state.image = total / share
    return TiledState(state.image, state, window, tiles)
