"""``torch.vmap`` over every operator against a loop: mapped and shared arguments, nested, grad."""

from dataclasses import dataclass

import pytest
import torch

import latentdem_ext as ext

V, B = 3, 2
SIZE = (11, 10)
SETTINGS = {"noise_std": 0.05, "penalty": 1e3, "regularization": 0.5, "iterations": 3}
VIEW = {"image_size": (5, 4), "near": 0.5, "far": 4.0, "samples_per_ray": 9}
WEIGHTS = ext.blend_windows(*SIZE, 1, 2, 4, dtype=torch.float64)
GRID = [torch.rand(c, 5, 4, 6, generator=torch.Generator().manual_seed(c)).double() for c in (1, 3)]


def random(*shape):
    return torch.rand(shape, dtype=torch.float64)


def images(count=1, channels=2, size=SIZE):
    return tuple(random(V, B, channels, *size) for _ in range(count))


def mask():
    return (random(V, 1, 1, *SIZE) > 0.3).double()


def cameras():
    angle = torch.linspace(-60, 60, V * B, dtype=torch.float64)
    poses = ext.pose_from_spherical(angle / 2, angle, 2.0).unflatten(0, (V, B))
    lens = ext.intrinsics_from_fov(60 + angle / 9, VIEW["image_size"]).unflatten(0, (V, B))
    return poses, lens


@dataclass
class Case:
    """An operator and a maker of its tensors, ``[V,...]`` each."""

    function: object
    tensors: object
    differentiable: int = 0  # how many arguments, from the first

    def mapped(self, dims, tensors):
        """What vmap is given: an argument's slice, or the mapped dimension where it belongs."""
        return [t[0] if d is None else t.movedim(0, d) for t, d in zip(tensors, dims, strict=True)]

    def loop(self, function, dims, tensors):
        results = [
            function(*(t[0 if d is None else v] for t, d in zip(tensors, dims, strict=True)))
            for v in range(V)
        ]
        if isinstance(results[0], torch.Tensor):
            return torch.stack(results)
        return tuple(torch.stack(parts) for parts in zip(*results, strict=True))


def update(prior="l1", **options):
    def call(x, y, k, w=None):
        return ext.kernel_map_update(x, y, k, window=w, prior=prior, **SETTINGS, **options)

    return call


def prepared_update(x, y, k):
    ready = ext.kernel_map_prepare(y, (4, 3))
    return ext.kernel_map_update(x, y, k, prepared=ready, **SETTINGS)


def shrink(kernel, strength):
    return ext.project_simplex(kernel - 0.01 * strength)


def render(density, color):
    def call(poses, lens):
        background = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
        return ext.volume_render(density, color, poses, lens, background=background, **VIEW)

    return call


CASES = {
    "blur gradients, shared kernel": Case(
        ext.blur_gradients, lambda: (*images(), random(V, 1, 1, 4, 3), *images())
    ),
    "blur gradients, kernel of each": Case(
        lambda x, k, y, m: ext.blur_gradients(x, k, y, mask=m, boundary="reflect"),
        lambda: (*images(), random(V, B, 2, 4, 3), *images(), mask()),
    ),
    "downsample": Case(
        lambda x, k: ext.blur_downsample2d(x, k, 3),
        lambda: (*images(), random(V, 1, 1, 4, 3)),
        differentiable=2,
    ),
    "downsample, valid": Case(
        lambda x, k: ext.blur_downsample2d(x, k, 2, boundary="valid"),
        lambda: (*images(), random(V, B, 2, 4, 3)),
        differentiable=2,
    ),
    "downsample adjoint": Case(
        lambda r, k: ext.blur_downsample2d_adjoint(r, k, 2, boundary="zero"),
        lambda: (*images(size=(6, 5)), random(V, 1, 2, 4, 3)),
        differentiable=2,
    ),
    "varying blur": Case(
        lambda x, k: ext.varying_blur2d(x, k, WEIGHTS, boundary="zero"),
        lambda: (*images(), random(V, 2, 4, 3)),
        differentiable=2,
    ),
    "varying blur, kernels of each": Case(
        lambda x, k: ext.varying_blur2d(x, k, WEIGHTS, boundary="valid"),
        lambda: (*images(), random(V, B, 2, 4, 3)),
        differentiable=2,
    ),
    "varying blur adjoint": Case(
        lambda r, k: ext.varying_blur2d_adjoint(r, k, WEIGHTS),
        lambda: (*images(), random(V, 2, 4, 3)),
        differentiable=2,
    ),
    "varying blur gradients": Case(
        lambda x, k, y: ext.varying_blur_gradients(x, k, WEIGHTS, y),
        lambda: (*images(), random(V, 2, 4, 3), *images()),
    ),
    "statistics": Case(
        lambda x, y, w: ext.kernel_map_statistics(x, y, (4, 3), window=w, domain="gradient"),
        lambda: (*images(2), mask()),
    ),
    "solve": Case(
        lambda b, z, a: ext.kernel_map_solve(a, b, z, z, alpha=9.0, steps=4),
        lambda: (random(V, B, 3, 3), random(V, B, 3, 3), random(V, B, 5, 5)),
    ),
    "kernel estimate": Case(update(), lambda: (*images(2), random(V, B, 1, 4, 3))),
    "kernel estimate, window": Case(
        update("l2", domain="gradient"),
        lambda: (*images(2), random(V, B, 1, 4, 3), mask()),
    ),
    "kernel estimate, full grid": Case(
        update("none", support_exact=False), lambda: (*images(2), random(V, B, 1, 4, 3))
    ),
    "kernel estimate, prepared": Case(
        prepared_update, lambda: (*images(2, size=(16, 12)), random(V, B, 1, 4, 3))
    ),
    "kernel estimate, callable": Case(update(shrink), lambda: (*images(2), random(V, B, 1, 4, 3))),
    "wiener": Case(
        lambda x, y, k: ext.wiener_deconv2d(x, y, k, 0.3),
        lambda: (*images(2), random(V, 1, 1, 4, 3)),
        differentiable=3,
    ),
    "wiener, masked": Case(
        lambda x, y, k, r, m: ext.wiener_deconv2d(x, y, k, r, mask=m, passes=3),
        lambda: (*images(), random(V, 1, 2, *SIZE), random(V, B, 2, 4, 3), 0.1 + random(V), mask()),
        differentiable=4,
    ),
    "wiener, ratio of each": Case(
        ext.wiener_deconv2d,
        lambda: (*images(2), random(V, 1, 2, 4, 3), 0.1 + random(V, B)),
        differentiable=4,
    ),
    "wiener, ratio of each frequency": Case(
        ext.wiener_deconv2d,
        lambda: (*images(2), random(V, 1, 1, 4, 3), 0.1 + random(V, 1, 1, 11, 6)),
        differentiable=4,
    ),
    "richardson-lucy": Case(
        lambda y, k: ext.richardson_lucy(y, k, iterations=3, boundary="valid"),
        lambda: (*images(), random(V, 1, 1, 4, 3)),
    ),
    "richardson-lucy, masked": Case(
        lambda y, k, u, m: ext.richardson_lucy(y, k, iterations=3, initial=u, mask=m),
        lambda: (*images(), random(V, B, 1, 4, 3), *images(), mask()),
    ),
    "recenter": Case(ext.recenter_kernel, lambda: (random(V, B, 4, 5),), differentiable=1),
    "volume rendering": Case(render(*GRID), cameras, differentiable=2),
}
all_cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def variants(count):
    """All mapped in front, all mapped elsewhere, each alone, all but each."""
    yield (0,) * count
    yield (1,) * count
    for alone in range(count if count > 1 else 0):
        yield tuple(0 if i == alone else None for i in range(count))
        yield tuple(None if i == alone else 0 for i in range(count))


@all_cases
def test_vmap_is_a_loop(case):
    tensors = case.tensors()
    for dims in dict.fromkeys(variants(len(tensors))):
        if any(d and t.dim() < 2 for t, d in zip(tensors, dims, strict=True)):
            continue  # one number each has no second dimension
        found = torch.vmap(case.function, in_dims=dims)(*case.mapped(dims, tensors))
        expected = case.loop(case.function, dims, tensors)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@all_cases
def test_nested_vmap(case):
    first, second = case.tensors(), case.tensors()
    both = [torch.stack(pair, 1) for pair in zip(first, second, strict=True)]
    # The inner one maps the first argument only.
    inner = (0, *(None for _ in first[1:]))
    outer = [t if i == 0 else t[:, 0] for i, t in enumerate(both)]
    found = torch.vmap(torch.vmap(case.function, in_dims=inner))(*outer)
    for index, heads in enumerate((first[0], second[0])):
        expected = case.loop(case.function, (0,) * len(first), (heads, *first[1:]))
        single = isinstance(found, torch.Tensor)
        part = found[:, index] if single else tuple(t[:, index] for t in found)
        torch.testing.assert_close(part, expected, rtol=1e-9, atol=1e-11)


def scalar(results):
    """A loss that is not linear in the result."""
    results = (results,) if isinstance(results, torch.Tensor) else results
    return sum((r * (1 + r.cos())).sum() for r in results)


@pytest.mark.parametrize(
    "case",
    [c for c in CASES.values() if c.differentiable],
    ids=[name for name, c in CASES.items() if c.differentiable],
)
def test_gradients_under_vmap(case):
    tensors = case.tensors()
    wanted = tuple(range(case.differentiable))

    def loss(*inputs):
        return scalar(case.function(*inputs))

    for dims in dict.fromkeys([(0,) * len(tensors), *variants(len(tensors))]):
        if any(d and t.dim() < 2 for t, d in zip(tensors, dims, strict=True)):
            continue
        gradient = torch.func.grad(loss, argnums=wanted)
        inputs = case.mapped(dims, tensors)
        found = torch.vmap(gradient, in_dims=dims)(*inputs)
        expected = case.loop(gradient, dims, tensors)
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
        # Plain autograd through vmap, where shared arguments collect from every map.
        tracked = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(inputs)]
        total = torch.vmap(loss, in_dims=dims)(*tracked).sum()
        gradients = torch.autograd.grad(total, tracked[: case.differentiable])
        for t, d, e in zip(gradients, dims, expected, strict=False):
            e = e.sum(0) if d is None else e.movedim(0, d)
            torch.testing.assert_close(t, e, rtol=1e-8, atol=1e-10)


def test_gradients_of_the_shared_grid():
    """Each set of cameras has its own gradient in the grid; their sum is that of all."""
    poses, lens = cameras()

    def loss(density, color, p, k):
        return scalar(render(density, color)(p, k))

    gradient = torch.func.grad(loss, argnums=(0, 1, 2, 3))
    found = torch.vmap(gradient, in_dims=(None, None, 0, 0))(*GRID, poses, lens)
    for v in range(V):
        expected = gradient(*GRID, poses[v], lens[v])
        torch.testing.assert_close(tuple(t[v] for t in found), expected)
    jacobian = torch.func.jacrev(lambda d: render(d, GRID[1])(poses[0, :1], lens[0, :1])[1])(
        GRID[0]
    )
    row = torch.func.grad(lambda d: render(d, GRID[1])(poses[0, :1], lens[0, :1])[1][0, 0, 2, 1])(
        GRID[0]
    )
    torch.testing.assert_close(jacobian[0, 0, 2, 1], row)


def test_jacobian_of_a_pose():
    (poses, lens), twist = cameras(), torch.zeros(1, 6, dtype=torch.float64)

    def opacity(xi):
        moved = ext.se3_exp(xi) @ torch.nn.functional.pad(poses[0, :1, :3], (0, 0, 0, 1))
        return render(*GRID)(moved, lens[0, :1])[1]

    found = torch.func.jacrev(opacity)(twist)
    expected = torch.autograd.functional.jacobian(opacity, twist)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("call", "mapped", "text"),
    [
        (
            lambda w: ext.varying_blur2d(torch.ones(1, 1, *SIZE), torch.ones(2, 3, 3), w),
            lambda: WEIGHTS.expand(V, 2, *SIZE),
            "weights must not be mapped by vmap: varying_blur2d shares one among the whole batch",
        ),
        (
            lambda w: ext.varying_blur2d_adjoint(torch.ones(1, 1, *SIZE), torch.ones(2, 3, 3), w),
            lambda: WEIGHTS.expand(V, 2, *SIZE),
            "weights must not be mapped by vmap: varying_blur2d_adjoint shares",
        ),
        (
            lambda d: render(d, GRID[1])(*(t[0] for t in cameras())),
            lambda: GRID[0].expand(V, *GRID[0].shape),
            "density must not be mapped by vmap: volume_render shares one .*; loop over it",
        ),
        (
            lambda c: torch.func.grad(lambda p: render(GRID[0], c)(p, cameras()[1][0])[0].sum())(
                cameras()[0][0]
            ),
            lambda: GRID[1].expand(V, *GRID[1].shape),
            "color must not be mapped by vmap: volume_render shares",
        ),
    ],
)
def test_what_cannot_be_mapped(call, mapped, text):
    with pytest.raises(ValueError, match=text):
        torch.vmap(call)(mapped())


def test_a_mismatch_stays_an_error():
    # One image and two kernels: refused in a batch, so not broadcast by vmap either.
    with pytest.raises(ValueError, match="kernel must have"):
        torch.vmap(ext.blur_conv2d)(random(V, 1, 1, 8, 8), random(V, 2, 1, 3, 3))
    with pytest.raises(ValueError, match="kernel must have"):
        torch.vmap(update())(*images(2), random(V, 1, 1, 4, 3))


def test_second_derivative_of_the_renderer_is_refused():
    poses, lens = (t[0] for t in cameras())

    def slope(p):
        return torch.func.grad(lambda q: render(*GRID)(q, lens)[0].sum())(p).square().sum()

    with pytest.raises(NotImplementedError, match="once, not twice"):
        torch.func.grad(slope)(poses)
