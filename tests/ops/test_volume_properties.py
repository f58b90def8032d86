"""Properties of the volume renderer over random scenes, strides and memory."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.test_volume_render import PLAIN, weigh

import latentdem_ext as ext
from latentdem_ext import reference
from latentdem_ext.testing import assert_accurate

ROOT = Path(__file__).resolve().parents[2]
F64 = torch.float64
NEAR, FAR = 0.1, 5.0
CAMERAS = ("outside", "inside", "looking away", "missing")


@st.composite
def scenes(draw, least_views=0):
    """Tensors (density, color, camera_to_world, intrinsics, background) and the other options."""
    grid = draw(st.tuples(*[st.integers(1, 9)] * 3))
    image = draw(st.tuples(*[st.integers(1, 9)] * 2))
    views, samples = draw(st.integers(least_views, 3)), draw(st.integers(1, 20))
    cameras = draw(st.lists(st.sampled_from(CAMERAS), min_size=views, max_size=views))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def random(*shape):
        return torch.rand(shape, generator=generator, dtype=F64)

    pose = ext.pose_from_spherical(100 * random(views) - 50, 360 * random(views), 2.5)
    pose = pose @ ext.se3_exp(0.2 * random(views, 6) - 0.1)
    for i, camera in enumerate(cameras):
        if camera == "inside":
            pose[i, :3, 3] = 1.6 * random(3) - 0.8
        elif camera == "looking away":
            pose[i, :3, 1:] *= torch.tensor([-1, -1, 4])  # and far enough from the fading border
        elif camera == "missing":  # ahead of the cube, but far to the side of it
            pose[i, :3, 3] += 9 * pose[i, :3, 0]
    lens = ext.intrinsics_from_fov(40 + 20 * random(views), image) * (1 + 0.1 * random(views, 4))
    density, background = 4 * random(1, *grid), random(3)
    if draw(st.booleans()):
        density[:, grid[0] // 3 :] = 0
    if draw(st.booleans()):
        background = None
    options = {"image_size": image, "near": NEAR, "far": FAR, "samples_per_ray": samples}
    return (density, random(3, *grid), pose, lens), background, options, cameras


def with_background(render, background, options):
    def call(*inputs):
        shade = None if background is None else background.to(inputs[0])
        return render(*inputs, background=shade, **options)

    return call


@settings(max_examples=60, deadline=None)
@given(scene=scenes(), dtype=st.sampled_from([torch.float32, F64]), output=st.integers(0, 2))
def test_outputs_are_accurate(scene, dtype, output):
    inputs, background, options, _ = scene
    assert_accurate(
        lambda *i: with_background(ext.volume_render, background, options)(*i)[output],
        lambda *i: with_background(reference.volume_render, background, options)(*i)[output],
        *(t.to(dtype) for t in inputs),
        slack=32,
    )


# Gradients in cameras jump where a sample crosses from one cell to the next, which rounding in
# float32 moves: only those in the grid are continuous.
@settings(max_examples=60, deadline=None)
@given(
    scene=scenes(),
    case=st.sampled_from([(torch.float32, 0), (torch.float32, 1), *((F64, i) for i in range(4))]),
)
def test_gradients_are_accurate(scene, case):
    inputs, background, options, _ = scene
    dtype, index = case

    def gradient(render):
        def call(*inputs):
            tracked = [t.detach().requires_grad_(i == index) for i, t in enumerate(inputs)]
            outputs = with_background(render, background, options)(*tracked)
            return torch.autograd.grad(weigh(outputs), tracked[index])[0]

        return call

    assert_accurate(
        gradient(ext.volume_render),
        gradient(reference.volume_render),
        *(t.to(dtype) for t in inputs),
        slack=64,
    )


@settings(max_examples=60, deadline=None)
@given(scene=scenes(), dtype=st.sampled_from([torch.float32, F64]))
def test_ranges(scene, dtype):
    inputs, background, options, cameras = scene
    color, opacity, depth = with_background(ext.volume_render, background, options)(
        *(t.to(dtype) for t in inputs)
    )
    assert ((opacity >= 0) & (opacity <= 1)).all()
    assert ((depth >= 0) & (depth <= FAR)).all()
    rounding = 1 + 64 * torch.finfo(dtype).eps
    assert ((color >= 0) & (color <= rounding)).all()
    if min(inputs[0].shape[1:]) == 1:
        return  # along an axis of one voxel the grid has no end
    for view, camera in enumerate(cameras):
        if camera in ("missing", "looking away"):
            assert opacity[view].max() == depth[view].max() == 0


# A step that crosses from one cell to the next would spoil the difference: rare, and with
# examples that are always the same, never.
@settings(max_examples=60, deadline=None, derandomize=True)
@given(scene=scenes(least_views=1))
def test_the_backward_pass_is_the_adjoint_of_the_derivative(scene):
    inputs, background, options, _ = scene
    render = with_background(ext.volume_render, background, options)
    tracked = [t.clone().requires_grad_() for t in inputs]
    outputs = render(*tracked)
    residuals = [torch.randn_like(o) for o in outputs]
    gradients = torch.autograd.grad(outputs, tracked, residuals)
    for index, gradient in enumerate(gradients):
        direction = torch.randn_like(gradient)
        if index == 2:
            direction[:, 3] = 0
        step = 1e-7
        moved = [
            render(*inputs[:index], inputs[index] + way * direction, *inputs[index + 1 :])
            for way in (step, -step)
        ]
        # <r, J d> and <J' r, d>
        forwards = sum(
            (r * (a - b)).sum() / (2 * step) for r, a, b in zip(residuals, *moved, strict=True)
        )
        backwards = (gradient * direction).sum()
        scale = float(gradient.norm() * direction.norm()) + 1e-3
        assert abs(float(forwards - backwards)) <= 1e-5 * scale


def strided(density, color):
    """The same grids, in many layouts."""
    last = torch.channels_last_3d
    spread = torch.zeros(3, *(2 * n for n in density.shape[1:]), dtype=color.dtype)
    spread[:, ::2, ::2, ::2] = color
    return {
        "channels_last_3d": (
            density[None].contiguous(memory_format=last)[0],
            color[None].contiguous(memory_format=last)[0],
        ),
        "transposed": (density.mT.contiguous().mT, color.permute(0, 3, 2, 1).contiguous().permute(
            0, 3, 2, 1)),
        "sliced": (density, spread[:, ::2, ::2, ::2]),
        "one tensor": tuple(torch.cat((density, color)).split((1, 3))),
    }  # fmt: skip


@pytest.mark.parametrize("layout", strided(torch.zeros(1, 2, 2, 2), torch.zeros(3, 2, 2, 2)))
def test_layouts_do_not_matter(layout):
    density, color, pose, lens = PLAIN.tensors()
    grids = strided(density, color)[layout]
    assert torch.equal(grids[0], density)
    assert torch.equal(grids[1], color)
    results = []
    for pair in ((density, color), grids):
        tracked = [t.detach().requires_grad_() for t in pair]
        outputs = ext.volume_render(*tracked, pose, lens, **PLAIN.options)
        results.append((*outputs, *torch.autograd.grad(weigh(outputs), tracked)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_a_grid_may_be_expanded():
    density, color, pose, lens = PLAIN.tensors()
    flat = (density[..., :1].expand_as(density), color[:1, :, :1].expand_as(color))
    found = ext.volume_render(*flat, pose, lens, **PLAIN.options)
    expected = ext.volume_render(*(t.contiguous() for t in flat), pose, lens, **PLAIN.options)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


MEMORY_SCRIPT = """
import ctypes, sys, torch, latentdem_ext as ext
from pathlib import Path
def high_water_mark():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
torch.set_num_threads(2)
layout, grads = sys.argv[1:]
n = 128
shape = (n, n, n, 4) if layout == "last" else (4, n, n, n)
grid = torch.rand(shape)
if layout == "last":
    grid = grid.movedim(-1, 0)
pose = ext.pose_from_spherical(torch.full((4,), 20.0), torch.arange(4) * 90.0 + 10, 2.5)
lens = ext.intrinsics_from_fov(torch.full((4,), 45.0), (n, n))
inputs = [grid[:1], grid[1:], pose, lens]
inputs = [t.detach().requires_grad_(grads == "all") for t in inputs]
def step():
    outputs = ext.volume_render(*inputs, image_size=(n, n), near=0.8, far=4.2, samples_per_ray=n)
    return torch.autograd.grad(outputs[0].sum(), inputs) if grads == "all" else outputs
step()
ctypes.CDLL(None).malloc_trim(0)
Path("/proc/self/clear_refs").write_text("5")
before = high_water_mark()
step()
print(high_water_mark() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux only")
@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize(("grads", "limit"), [("none", 38), ("all", 60)])
def test_memory(layout, grads, limit):
    # 32 MiB are the grid: packed on the way forwards, the gradient on the way back, never both;
    # and never a copy of a grid that is not contiguous.
    run = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT, layout, grads],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    assert 32 * 1024 < int(run.stdout) < limit * 1024  # KiB
