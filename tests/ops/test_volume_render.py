"""Volume rendering against the plain torch reference, nerfacc, and finite differences."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import latentdem_ext as ext
from latentdem_ext import reference
from latentdem_ext.testing import assert_accurate

ROOT = Path(__file__).resolve().parents[2]
F64 = torch.float64


@dataclass(frozen=True)
class Scene:
    grid: tuple[int, int, int]
    views: int = 2
    image: tuple[int, int] = (9, 11)
    samples: int = 40
    radius: float = 2.5
    near: float = 0.5
    far: float = 4.7
    empty: float = 0.0  # share of the grid, from one end, that has no density

    def __str__(self):
        return "-".join("x".join(map(str, part)) for part in (self.grid, self.image)) + (
            f"-s{self.samples}-r{self.radius}-e{self.empty}-n{self.views}"
        )

    @property
    def options(self):
        return {
            "image_size": self.image,
            "near": self.near,
            "far": self.far,
            "samples_per_ray": self.samples,
        }

    def tensors(self, dtype=torch.float32, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def random(*shape):
            return torch.rand(shape, generator=generator, dtype=F64)

        density = 3 * random(1, *self.grid)
        density[..., : round(self.empty * self.grid[2])] = 0
        pose = ext.pose_from_spherical(
            100 * random(self.views) - 50, 360 * random(self.views), self.radius
        )
        pose = pose @ ext.se3_exp(0.1 * random(self.views, 6) - 0.05)  # not quite at the origin
        lens = ext.intrinsics_from_fov(40 + 20 * random(self.views), self.image)
        lens = lens * (1 + 0.1 * random(self.views, 4))
        return tuple(t.to(dtype) for t in (density, random(3, *self.grid), pose, lens))

    def tracked(self, dtype=F64):
        return tuple(t.requires_grad_() for t in self.tensors(dtype))


PLAIN = Scene((7, 6, 5))
SCENES = [
    PLAIN,
    Scene((12, 9, 21), image=(17, 8), samples=70),  # several slabs, ragged tiles
    Scene((5, 5, 40), empty=0.8, samples=90),  # mostly empty: skips
    Scene((40, 33, 36), views=1, empty=0.9, samples=150),
    Scene((40, 33, 36), views=1, image=(5, 5), empty=0.9, samples=900),  # several chunks
    Scene((6, 7, 8), image=(3, 10), samples=900),
    Scene((6, 6, 6), radius=0.3, near=0.0, far=2.0),  # camera inside the cube
    Scene((1, 1, 1), image=(3, 4)),
    Scene((1, 4, 3), image=(1, 7)),
    Scene((3, 1, 2), views=1, image=(1, 1), samples=1),
    Scene((4, 5, 6), views=3, samples=3),
    Scene((2, 2, 2), samples=300, far=30.0),
    Scene((19, 23, 30), views=1, image=(70, 67), samples=30),  # several blocks of tiles
    Scene((9, 8, 7), views=1, image=(66, 3), samples=140, radius=1.2),
]
all_scenes = pytest.mark.parametrize("scene", SCENES, ids=str)
OUTPUTS = ("color", "opacity", "depth")
INPUTS = ("density", "color", "camera_to_world", "intrinsics")


def weigh(outputs, seed=1):
    """A scalar that depends on every output differently."""
    generator = torch.Generator().manual_seed(seed)
    return sum(
        (o * torch.randn(o.shape, generator=generator, dtype=F64).to(o)).sum() for o in outputs
    )


def gradient(render, index, options):
    def call(*inputs):
        tracked = [t.detach().requires_grad_(i == index) for i, t in enumerate(inputs)]
        return torch.autograd.grad(weigh(render(*tracked, **options)), tracked[index])[0]

    return call


@all_scenes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("index", range(3), ids=OUTPUTS)
def test_forward_is_accurate(scene, dtype, index):
    assert_accurate(
        lambda *inputs: ext.volume_render(*inputs, **scene.options)[index],
        lambda *inputs: reference.volume_render(*inputs, **scene.options)[index],
        *scene.tensors(dtype),
        slack=32,
    )


@all_scenes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("index", range(4), ids=INPUTS)
def test_gradients_are_accurate(scene, dtype, index):
    assert_accurate(
        gradient(ext.volume_render, index, scene.options),
        gradient(reference.volume_render, index, scene.options),
        *scene.tensors(dtype),
        slack=64,
    )


@pytest.mark.parametrize("scene", [PLAIN, *SCENES[5:11]], ids=str)
def test_gradcheck(scene):
    background = torch.rand(3, dtype=F64, requires_grad=True)

    def render(*inputs):
        return ext.volume_render(*inputs[:4], background=inputs[4], **scene.options)

    assert torch.autograd.gradcheck(render, (*scene.tracked(), background), fast_mode=True)


def test_pose_gradient_against_finite_differences():
    density, color, pose, lens = Scene((12, 12, 12), samples=64).tensors(F64)
    # Smooth fields, so that the kinks between voxels do not spoil the differences.
    axis = torch.linspace(-1, 1, 12, dtype=F64)
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    density = 4 * torch.exp(-2 * (x * x + 2 * y * y + z * z) + x)[None]
    color = torch.stack((x, y, z)) + 1
    target = torch.rand(2, 3, 9, 11, dtype=F64)

    def loss(twist):
        moved = pose @ ext.se3_exp(twist)
        rendered, *_ = ext.volume_render(
            density, color, moved, lens, image_size=(9, 11), near=0.5, far=4.7, samples_per_ray=64
        )
        return (rendered - target).square().sum()

    twist = torch.zeros(2, 6, dtype=F64, requires_grad=True)
    (found,) = torch.autograd.grad(loss(twist), twist)
    eps = 1e-6
    for view in range(2):
        for i in range(6):
            step = torch.zeros(2, 6, dtype=F64)
            step[view, i] = eps
            slope = (loss(step) - loss(-step)) / (2 * eps)
            torch.testing.assert_close(found[view, i], slope, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scene", [PLAIN, SCENES[2]], ids=str)
def test_against_nerfacc(scene):
    # Not at the top: what the device's tests take from this file needs no nerfacc.
    from nerfacc.volrend import accumulate_along_rays, render_weight_from_density

    inputs = scene.tracked()
    density, color, pose, lens = inputs
    (h, w), s, n = scene.image, scene.samples, scene.views
    edges = torch.linspace(scene.near, scene.far, s + 1, dtype=F64)
    t = 0.5 * (edges[1:] + edges[:-1])
    u, v = torch.arange(w, dtype=F64) + 0.5, torch.arange(h, dtype=F64) + 0.5
    x = (u - lens[:, 2:3])[:, None, :] / lens[:, :1, None]
    y = (v - lens[:, 3:4])[:, :, None] / lens[:, 1:2, None]
    pinhole = torch.stack((x.expand(n, h, w), y.expand(n, h, w), torch.ones(n, h, w)), -1)
    direction = F.normalize((pose[:, None, None, :3, :3] @ pinhole[..., None])[..., 0], dim=-1)
    points = pose[:, None, None, None, :3, 3] + t[:, None] * direction[..., None, :]
    values = F.grid_sample(
        torch.cat((density, color))[None], points.reshape(1, -1, 1, s, 3), align_corners=True
    )
    values = values.reshape(4, -1, s)
    rays = values.shape[1]
    weights, _, _ = render_weight_from_density(
        edges[:-1].expand(rays, -1), edges[1:].expand(rays, -1), values[0]
    )

    def image(values):
        return accumulate_along_rays(weights, values).reshape(n, h, w, -1).movedim(3, 1)

    expected = (image(values[1:].movedim(0, -1)), image(None), image(t.expand(rays, -1)[..., None]))
    found = ext.volume_render(*inputs, **scene.options)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(
        torch.autograd.grad(weigh(found), inputs),
        torch.autograd.grad(weigh(expected), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_a_uniform_cube_has_the_closed_form():
    # Straight through a slab of constant density: Beer and Lambert.
    pose = ext.pose_from_spherical(
        torch.tensor([0.0], dtype=F64), torch.tensor([0.0], dtype=F64), 3.0
    )
    lens = torch.tensor([[1.0, 1.0, 0.5, 0.5]], dtype=F64)
    grid = torch.ones(1, 33, 33, 33, dtype=F64), 0.25 * torch.ones(3, 33, 33, 33, dtype=F64)
    color, opacity, depth = ext.volume_render(
        0.7 * grid[0], grid[1], pose, lens, image_size=(1, 1), near=2.0, far=4.0,
        samples_per_ray=2000,
    )  # fmt: skip
    absorbed = 1 - torch.exp(torch.tensor(-1.4, dtype=F64))
    torch.testing.assert_close(opacity.squeeze(), absorbed)
    torch.testing.assert_close(color.squeeze(), (0.25 * absorbed).expand(3))
    mean = 2 * absorbed + absorbed / 0.7 - 2 * (1 - absorbed)
    torch.testing.assert_close(depth.squeeze(), mean, rtol=1e-6, atol=0)


def test_axes_and_orientation():
    # OpenCV: a camera below z = 0 looking along +z sees x to the right and y down.
    pose = torch.eye(4)[None].clone()
    pose[0, 2, 3] = -3
    lens = torch.tensor([[8.0, 8.0, 5.0, 4.0]])
    options = {"image_size": (8, 10), "near": 1.0, "far": 5.0, "samples_per_ray": 100}
    for axis, (row, column) in ((3, (slice(None), slice(5, 10))), (2, (slice(4, 8), slice(None)))):
        density = torch.zeros(1, 8, 8, 8)
        density.narrow(axis, 5, 3).fill_(5)
        opacity = ext.volume_render(density, torch.ones(3, 8, 8, 8), pose, lens, **options)[1][0, 0]
        assert opacity[row, column].sum() > 0.95 * opacity.sum() > 1
    near_side = torch.zeros(1, 8, 8, 8)
    near_side[:, :2] = 50
    depth = ext.volume_render(near_side, torch.ones(3, 8, 8, 8), pose, lens, **options)[2]
    # The faces fade over one voxel, 2 / 7, beyond the cube, whose front is 2 away.
    assert 1.72 < depth[0, 0, 4, 5] < 2


def test_rays_that_miss_see_the_background():
    density, color, pose, lens = PLAIN.tracked()
    away = pose @ ext.convert_pose(torch.eye(4, dtype=F64), "opencv", "opengl")
    background = torch.tensor([0.1, 0.2, 0.3], dtype=F64, requires_grad=True)
    outputs = ext.volume_render(density, color, away, lens, background=background, **PLAIN.options)
    assert outputs[1].abs().max() == 0
    assert outputs[2].abs().max() == 0
    assert torch.equal(outputs[0], background.detach().view(1, 3, 1, 1).expand(2, 3, 9, 11))
    grads = torch.autograd.grad(outputs[0].sum(), (density, color, pose, lens, background))
    assert all(g.abs().max() == 0 for g in grads[:4])
    assert grads[4].tolist() == [2 * 9 * 11] * 3


def test_density_has_a_gradient_where_it_is_zero():
    scene = SCENES[3]
    density = scene.tensors()[0]
    found = gradient(ext.volume_render, 0, scene.options)(*scene.tensors())
    assert (found[density == 0] != 0).float().mean() > 0.2


def test_early_stop():
    scene = Scene((6, 6, 6), samples=200)
    density, color, pose, lens = scene.tensors(F64)
    opaque = (60 * density, color, pose, lens)
    never = ext.volume_render(*opaque, early_stop_eps=0, **scene.options)
    for a, b in zip(ext.volume_render(*opaque, **scene.options), never, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-15)
    early = ext.volume_render(*opaque, early_stop_eps=0.05, **scene.options)
    missed = (never[1] - early[1]).abs().max()
    assert 1e-4 < missed < 0.05


def test_negative_density_is_taken_at_its_word():
    density, color, pose, lens = PLAIN.tensors(F64)
    density = density - 2
    found = ext.volume_render(density, color, pose, lens, **PLAIN.options)
    expected = reference.volume_render(density, color, pose, lens, **PLAIN.options)
    assert found[1].min() < 0
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_camera_that_is_not_finite_gives_nan():
    density, color, pose, lens = PLAIN.tracked()
    scale = torch.ones(2, 1, 1, dtype=F64)
    scale[1] = 0  # no direction
    outputs = ext.volume_render(density, color, pose * scale, lens, **PLAIN.options)
    for out in outputs:
        assert out[0].isfinite().all()
        assert out[1].isnan().all()
    outputs = ext.volume_render(density, color, pose * scale, lens, **PLAIN.options)
    grad_pose, grad_lens = torch.autograd.grad(weigh(outputs), (pose, lens))
    assert grad_lens[0].isfinite().all()
    assert grad_lens[1].isnan().all()
    assert grad_pose[0].isfinite().all()


@all_scenes
def test_opcheck(scene):
    ops, options = torch.ops.latentdem, list(scene.options.values())
    inputs = scene.tracked(torch.float32)
    torch.library.opcheck(ops.volume_render, (*inputs, *options, None))
    plain = [t.detach() for t in inputs]
    outputs = ops.volume_render(*plain, *options, None)
    for needs in ((True, True, True), (False, True, False), (False, False, True)):
        torch.library.opcheck(
            ops.volume_render_backward, (*outputs, *plain, *options[1:], None, *needs)
        )


def test_compile():
    density, color, pose, lens = PLAIN.tensors()

    def loss(d, p):
        color_, opacity, depth = ext.volume_render(
            d, color, p, lens, background=torch.ones(3), **PLAIN.options
        )
        return color_.square().sum() + opacity.sum() + depth.mean()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)):
        d, p = density.clone().requires_grad_(), pose.clone().requires_grad_()
        function(d, p).backward()
        results.append((d.grad, p.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_no_views():
    scene = Scene((3, 4, 5), views=0)
    inputs = scene.tracked()
    outputs = ext.volume_render(*inputs, **scene.options)
    assert [o.shape for o in outputs] == [(0, 3, 9, 11), (0, 1, 9, 11), (0, 1, 9, 11)]
    grads = torch.autograd.grad(sum(o.sum() for o in outputs), inputs)
    for grad, tensor in zip(grads, inputs, strict=True):
        assert grad.shape == tensor.shape
        assert grad.abs().sum() == 0


def test_strides_and_the_fourth_row_do_not_matter():
    density, color, pose, lens = PLAIN.tensors()
    plain = ext.volume_render(density, color, pose[:, :3], lens, **PLAIN.options)
    strided = ext.volume_render(
        density.mT.contiguous().mT,
        color.contiguous(memory_format=torch.channels_last),
        pose.repeat_interleave(2, -1)[..., ::2],
        lens.mT.contiguous().mT,
        **PLAIN.options,
    )
    for a, b in zip(plain, strided, strict=True):
        assert torch.equal(a, b)
    # A gradient that is expanded, not stored.
    leaf = density.clone().requires_grad_()
    ext.volume_render(leaf, color, pose, lens, **PLAIN.options)[0].sum().backward()
    other = density.clone().requires_grad_()
    out = ext.volume_render(other, color, pose, lens, **PLAIN.options)[0]
    out.backward(torch.ones_like(out).contiguous(memory_format=torch.channels_last))
    assert torch.equal(leaf.grad, other.grad)


def test_dtypes_mix():
    density, color, pose, lens = PLAIN.tracked()
    mixed = (density.half(), color.float(), pose, lens.bfloat16())
    outputs = ext.volume_render(*mixed, **PLAIN.options)
    assert {o.dtype for o in outputs} == {torch.float32}
    grads = torch.autograd.grad(weigh(outputs), mixed)
    assert [g.dtype for g in grads] == [t.dtype for t in mixed]
    assert ext.volume_render(density.float(), color, pose, lens, **PLAIN.options)[0].dtype == F64


def test_results_do_not_depend_on_the_thread_count():
    scene = Scene((30, 20, 24), views=3, image=(40, 37), samples=150)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            inputs = scene.tracked(torch.float32)
            outputs = ext.volume_render(*inputs, **scene.options)
            results.append((*outputs, *torch.autograd.grad(weigh(outputs), inputs)))
    finally:
        torch.set_num_threads(threads)
    for one, *others in zip(*results, strict=True):
        for other in others:
            assert torch.equal(one, other)


MEMORY_SCRIPT = """
import sys, torch, latentdem_ext as ext
from pathlib import Path
def high_water_mark():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
pose = ext.pose_from_spherical(torch.zeros(1), torch.zeros(1), 3.0)
lens = ext.intrinsics_from_fov(torch.tensor([30.0]), (64, 64))
inputs = [t.requires_grad_() for t in (torch.rand(1, 8, 8, 8), torch.rand(3, 8, 8, 8), pose, lens)]
def step(samples):
    color, opacity, depth = ext.volume_render(
        *inputs, image_size=(64, 64), near=1.0, far=5.0, samples_per_ray=samples)
    torch.autograd.grad((color.sum() + depth.sum()), inputs)
step(64)
before = high_water_mark()
step(4096)
print(high_water_mark() - before)
"""


def test_memory_does_not_grow_with_the_samples():
    # 16.8 million samples; kept at one float each they would take 64 MiB.
    run = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    assert int(run.stdout) < 4 * 1024  # KiB


@settings(max_examples=40, deadline=None)
@given(
    grid=st.tuples(*[st.integers(1, 12)] * 3),
    image=st.tuples(*[st.integers(1, 18)] * 2),
    views=st.integers(1, 2),
    samples=st.integers(1, 140),
    radius=st.sampled_from([0.0, 0.5, 1.2, 3.0]),
    empty=st.sampled_from([0.0, 0.7, 1.0]),
    seed=st.integers(0, 1000),
)
def test_any_shape(grid, image, views, samples, radius, empty, seed):
    scene = Scene(grid, views, image, samples, radius, near=0.1, far=4.0, empty=empty)
    results = []
    for render in (ext.volume_render, reference.volume_render):
        inputs = [t.requires_grad_() for t in scene.tensors(F64, seed)]
        outputs = render(*inputs, **scene.options)
        results.append((*outputs, *torch.autograd.grad(weigh(outputs), inputs)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(
            a, b, rtol=1e-7, atol=1e-9 * max(1.0, float(b.detach().abs().max()))
        )


def test_second_derivatives_are_refused():
    inputs = PLAIN.tracked()
    outputs = ext.volume_render(*inputs, **PLAIN.options)
    (grad,) = torch.autograd.grad(outputs[0].square().sum(), inputs[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiated once, not twice"):
        torch.autograd.grad(grad.square().sum(), inputs[0])


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"density": torch.rand(4, 4, 4)}, ValueError, r"density must have shape \[1,D,H,W\]"),
        ({"density": torch.rand(2, 4, 4, 4)}, ValueError, r"density must .*found \[2, 4, 4, 4\]"),
        ({"density": torch.rand(1, 4, 0, 4)}, ValueError, "density must not be empty"),
        ({"color": torch.rand(3, 4, 4, 5)}, ValueError, r"color must .*\[4, 4, 4\], found"),
        ({"color": torch.rand(1, 4, 4, 4)}, ValueError, r"color must have shape \[3,D,H,W\]"),
        ({"camera_to_world": torch.eye(4)}, ValueError, r"camera_to_world must have shape \[N,3"),
        ({"camera_to_world": torch.rand(2, 4, 3)}, ValueError, r"found \[2, 4, 3\]"),
        ({"intrinsics": torch.rand(2, 3)}, ValueError, r"intrinsics must have shape \[N,4\]"),
        ({"intrinsics": torch.rand(3, 4)}, ValueError, r"camera_to_world's N \(2\), found \[3, 4"),
        ({"image_size": (0, 3)}, ValueError, "image_size must be two positive sizes"),
        ({"image_size": (3,)}, ValueError, r"image_size must be .*found \[3\]"),
        ({"near": 6.0}, ValueError, r"far must be finite and beyond near \(6\), found 5"),
        ({"near": -1.0}, ValueError, "near must be finite and not negative, found -1"),
        ({"near": float("nan")}, ValueError, "near must be finite"),
        ({"far": float("inf")}, ValueError, "far must be finite"),
        ({"samples_per_ray": 0}, ValueError, "samples_per_ray must be positive, found 0"),
        ({"samples_per_ray": 2**31}, ValueError, r"samples_per_ray .* below 2\^31, found 2147"),
        (
            {
                "density": torch.empty(1).expand(1, 1, 1, 2**31),
                "color": torch.empty(1).expand(3, 1, 1, 2**31),
            },
            ValueError,
            r"density must be shorter than 2\^31 - 4 along every axis, found \[1, 1, 1, 2147",
        ),
        ({"early_stop_eps": 1.0}, ValueError, r"early_stop_eps must be in \[0, 1\), found 1"),
        ({"background": torch.rand(1, 3)}, ValueError, r"background must have shape \[3\], found"),
        ({"density": torch.ones(1, 4, 4, 4, dtype=torch.int)}, TypeError, "density must be float"),
        ({"color": torch.ones(3, 4, 4, 4, dtype=torch.long)}, TypeError, "color must be float"),
        ({"intrinsics": torch.ones(2, 4, dtype=torch.int)}, TypeError, "intrinsics must be float"),
        ({"camera_to_world": torch.ones(2, 4, 4).bool()}, TypeError, "camera_to_world must be flo"),
    ],
)
def test_bad_arguments(change, error, text):
    arguments = {
        "density": torch.rand(1, 4, 4, 4),
        "color": torch.rand(3, 4, 4, 4),
        "camera_to_world": torch.eye(4).expand(2, 4, 4),
        "intrinsics": torch.ones(2, 4),
        "image_size": (3, 3),
        "near": 1.0,
        "far": 5.0,
        "samples_per_ray": 8,
    } | change
    with pytest.raises(error, match=text):
        ext.volume_render(**arguments)


def test_the_backward_operator_checks_its_images():
    inputs = PLAIN.tensors()
    outputs = ext.volume_render(*inputs, **PLAIN.options)
    wrong = (outputs[0], outputs[1][..., :-1], outputs[2])
    with pytest.raises(ValueError, match=r"grad_opacity must have shape \[2, 1, 9, 11\], found"):
        torch.ops.latentdem.volume_render_backward(
            *wrong, *inputs, 0.5, 4.7, 40, None, True, True, True
        )
