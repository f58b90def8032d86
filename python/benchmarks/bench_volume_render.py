"""Rendering with gradients in density, colour and cameras, against ``grid_sample`` + nerfacc.

``nerfacc``: samples by ``grid_sample``, composited by nerfacc, under autograd.
``plain torch``: the same with the compositing of :mod:`latentdem_ext.reference`.
Where nerfacc is not installed its figures are left out, and the results say so.
``native, grid only`` and ``native, cameras only`` ask for fewer gradients.

Peak memory is that of the second call, on a CPU in a process of its own, above what it held
before.
``--memory CANDIDATE --case CASE`` is that process.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from common import interleaved, peak_mebibytes, seeded, separate_peak, store
from torch import Tensor

import latentdem_ext as ext
from latentdem_ext import reference
from latentdem_ext.reference.volume_render import _rays

try:
    from nerfacc.volrend import accumulate_along_rays, render_weight_from_density

    ABSENT = []
except ImportError:
    ABSENT = ["nerfacc"]

SIZE, VIEWS, VIEW, SAMPLES = 128, 4, 128, 128
NEAR, FAR = 0.8, 4.2
OPTIONS: dict[str, Any] = {
    "image_size": (VIEW, VIEW),
    "near": NEAR,
    "far": FAR,
    "samples_per_ray": SAMPLES,
}
CASES = ("dense", "sparse")


def scene(case: str) -> list[Tensor]:
    """A haze that fills the cube, or a ball of a seventh of its volume in empty space."""
    generator = seeded(0)
    axis = torch.linspace(-1, 1, SIZE)
    density = torch.rand(1, SIZE, SIZE, SIZE, generator=generator)
    if case == "dense":
        density *= 0.5
    else:
        z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
        density *= 20 * (x * x + y * y + z * z < 0.4)
    color = torch.rand(3, SIZE, SIZE, SIZE, generator=generator)
    azimuth = torch.arange(VIEWS) * (360 / VIEWS) + 10
    pose = ext.pose_from_spherical(torch.full((VIEWS,), 20.0), azimuth, 2.5)
    lens = ext.intrinsics_from_fov(torch.full((VIEWS,), 45.0), (VIEW, VIEW))
    return [density, color, pose, lens]


def nerfacc_render(
    density: Tensor, color: Tensor, pose: Tensor, lens: Tensor
) -> tuple[Tensor, ...]:
    """``grid_sample`` and nerfacc's compositing of batched rays."""
    origin, direction = _rays(pose, lens, (VIEW, VIEW))
    edges = torch.linspace(NEAR, FAR, SAMPLES + 1)
    t = 0.5 * (edges[1:] + edges[:-1])
    points = origin[..., None, :] + t[:, None] * direction[..., None, :]
    values = F.grid_sample(
        torch.cat((density, color))[None],
        points.reshape(1, -1, 1, SAMPLES, 3),
        align_corners=True,
    )
    values = values.reshape(4, -1, SAMPLES).movedim(0, -1)  # [rays,S,4]
    rays = values.shape[0]
    weights, _, _ = render_weight_from_density(
        edges[:-1].expand(rays, -1), edges[1:].expand(rays, -1), values[..., 0]
    )
    return (
        accumulate_along_rays(weights, values[..., 1:]).reshape(VIEWS, VIEW, VIEW, 3).movedim(3, 1),
        accumulate_along_rays(weights, None).reshape(VIEWS, 1, VIEW, VIEW),
        accumulate_along_rays(weights, t.expand(rays, -1)[..., None]).reshape(VIEWS, 1, VIEW, VIEW),
    )


def with_gradients(
    render: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor], needed: tuple[int, ...]
) -> tuple[Tensor, ...]:
    """The outputs, and gradients of their summed squares in the inputs named by index."""
    tracked = [t.detach().requires_grad_(i in needed) for i, t in enumerate(inputs)]
    outputs = render(*tracked)
    loss = sum((o * o).sum() for o in outputs)
    return *outputs, *torch.autograd.grad(loss, [tracked[i] for i in needed])


def native(*inputs: Tensor) -> tuple[Tensor, ...]:
    """The operator."""
    return ext.volume_render(*inputs, **OPTIONS)


def plain(*inputs: Tensor) -> tuple[Tensor, ...]:
    """The reference."""
    return reference.volume_render(*inputs, **OPTIONS)


CANDIDATES: dict[str, tuple[Callable[..., tuple[Tensor, ...]], tuple[int, ...]]] = {
    "native": (native, (0, 1, 2, 3)),
    "native, grid only": (native, (0, 1)),
    "native, cameras only": (native, (2, 3)),
    "nerfacc": (nerfacc_render, (0, 1, 2, 3)),
    "plain torch": (plain, (0, 1, 2, 3)),
}
for name in ABSENT:
    del CANDIDATES[name]


def peak_in_this_process(case: str, candidate: str) -> float:
    """MiB above what the inputs hold."""
    inputs = scene(case)
    render, needed = CANDIDATES[candidate]
    return peak_mebibytes(lambda: with_gradients(render, inputs, needed))


def peak(case: str, candidate: str, inputs: list[Tensor]) -> float:
    """The same, on a CPU in a process of its own."""
    return separate_peak(
        lambda: with_gradients(CANDIDATES[candidate][0], inputs, CANDIDATES[candidate][1]),
        __file__, "--memory", candidate, "--case", case,
    )  # fmt: skip


def main() -> None:
    """Time all cases and store ``results/volume_render.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memory", choices=CANDIDATES)
    parser.add_argument("--case", choices=CASES, default=CASES[0])
    arguments = parser.parse_args()
    if arguments.memory:
        print(peak_in_this_process(arguments.case, arguments.memory))
        return
    rows = []
    for case in CASES:
        inputs = scene(case)
        found = with_gradients(native, inputs, (0, 1, 2, 3))
        expected = with_gradients(plain if ABSENT else nerfacc_render, inputs, (0, 1, 2, 3))
        for a, b in zip(found, expected, strict=True):
            # The noise in the grid makes pose gradients rough; nerfacc is 1e-3 off float64.
            assert float((a - b).detach().abs().max()) <= 1e-2 * float(b.detach().abs().max())
        del found, expected
        calls = {
            name: lambda r=render, n=needed: with_gradients(r, inputs, n)  # noqa: B023
            for name, (render, needed) in CANDIDATES.items()
        }
        times = interleaved(calls, rounds=5)
        memory = {name: peak(case, name, inputs) for name in CANDIDATES}
        ratios = {"plain torch / native": times["plain torch"] / times["native"]}
        if not ABSENT:
            ratios |= {
                "nerfacc / native": times["nerfacc"] / times["native"],
                "memory, nerfacc / native": memory["nerfacc"] / memory["native"],
            }
        rows.append(
            {
                "case": f"{case}, {SIZE}^3, {VIEWS} views {VIEW}x{VIEW}, {SAMPLES} samples",
                "milliseconds": times,
                "peak_mebibytes": memory,
                "ratios": ratios,
            }
        )
    store("volume_render", rows, ABSENT)


if __name__ == "__main__":
    main()
